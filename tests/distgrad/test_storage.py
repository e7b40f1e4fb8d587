"""Storage: adopted arrays change in place, and impossible ones are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad.errors import LayoutError
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.storage import Storage

BASE = np.arange(24.0)


def adopt(nest: Any) -> Storage:
    return Storage.adopt(Layout.of(nest), nest)


def read_only() -> np.ndarray[Any, Any]:
    array = np.ones(3)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("nest", "claim"),
    [
        ({"a": read_only()}, "'a' is read-only"),
        ({"a": np.broadcast_to(np.float64(1), (3,))}, "'a' is read-only"),
        ({"a": 1.5}, "'a' is no array"),
        ({"a": np.ones(3, ">f8")}, "'a' is not in native byte order"),
        ({"a": np.frombuffer(bytearray(25), np.float64, 3, offset=1)}, "'a' is not aligned"),
        ({"a": np.lib.stride_tricks.as_strided(np.ones(4), (2, 3), (8, 8))}, "'a' has elements that share memory"),
        ({"a": np.lib.stride_tricks.as_strided(np.ones(4), (4,), (0,))}, "'a' has elements that share memory"),
        ({"a": BASE, "b": BASE}, "'a' and 'b' share memory"),
        ({"a": BASE[:10], "b": BASE[9:]}, "'a' and 'b' share memory"),
        ({"a": BASE[::2], "b": BASE[4:5]}, "'a' and 'b' share memory"),
        ({"a": BASE[::-1], "b": BASE[:1]}, "'a' and 'b' share memory"),
        ({"a": BASE, "b": BASE.view(np.int64)}, "'a' and 'b' share memory"),
    ],
)
def test_arrays_that_cannot_be_updated_in_place_are_refused_by_name(nest: Any, claim: str) -> None:
    with pytest.raises(LayoutError, match=claim):
        adopt(nest)


@pytest.mark.parametrize(
    "nest",
    [
        {"even": BASE[::2], "odd": BASE[1::2]},
        {"left": BASE.reshape(4, 6)[:, :3], "right": BASE.reshape(4, 6)[:, 3:]},
        {"empty": np.ones(0), "also": np.ones((3, 0))},
        {"turned": BASE.reshape(4, 6).T},
    ],
)
def test_arrays_that_only_interleave_are_adopted(nest: Any) -> None:
    storage = adopt(nest)

    for leaf, array in zip(storage.leaves(), nest.values(), strict=True):
        assert np.shares_memory(leaf, array) or not array.size
        assert not leaf.flags.writeable


@pytest.mark.parametrize("cut", [1, 5, 24])
def test_strided_arrays_follow_updates_and_what_the_caller_wrote_between(cut: int) -> None:
    whole = np.zeros((4, 6))
    nest = {"left": whole[:, :3], "turned": whole[:, 3:].T}
    holder = ParameterHolder(executor="numpy")
    holder.set_nest(nest, adopt=True)
    gradient = -np.arange(24.0)

    for _ in range(2):
        holder.apply([gradient[low : low + cut] for low in range(0, 24, cut)])
        whole += 100

    expected = np.concatenate([np.arange(12.0).reshape(4, 3), np.arange(12.0, 24).reshape(3, 4).T], axis=1)
    assert (whole == 2 * expected + 200).all()
