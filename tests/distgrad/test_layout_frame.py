"""Layout frames: what is written comes back, and nothing else does anything."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distgrad.errors import LayoutError, MalformedMessage
from distgrad.layout import MAX_FRAME_BYTES, Layout
from support.random_nests import nests, same, without_namedtuples


@given(nests())
def test_a_layout_survives_its_frame(nest: Any) -> None:
    try:
        layout = Layout.of(nest)
    except LayoutError:
        assume(False)

    copy = Layout.from_frame(memoryview(layout.to_frame()))

    assert copy == layout
    assert copy.fingerprint == layout.fingerprint
    assert copy.structure == layout.structure
    assert same(copy.nest(copy.views(layout.pack(nest))), without_namedtuples(nest))


def test_the_fingerprint_is_the_one_of_the_wire_format() -> None:
    # Fixed for ever: written by this format's first version.
    layout = Layout.of({"w": np.ones((2, 3), np.float32), "b": [np.ones(3), np.arange(2)]})

    assert layout.fingerprint == 0x61B1DE8AD0451E19
    assert msgpack.unpackb(layout.to_frame()) == {
        "leaves": [["w", [2, 3], "float32"], ["b.0", [3], "float64"], ["b.1", [2], "int64"]],
        "structure": ["dict", [["w", 0], ["b", ["list", [1, 2]]]]],
    }


def test_a_layout_larger_than_a_frame_is_refused_on_both_sides() -> None:
    layout = Layout.of({"x" * MAX_FRAME_BYTES: np.ones(1)})

    with pytest.raises(LayoutError, match="at most 4194304"):
        layout.to_frame()
    with pytest.raises(MalformedMessage, match="more than 4194304 bytes"):
        Layout.from_frame(bytes(MAX_FRAME_BYTES + 1))


def frame(leaves: Any = (("a", (2,), "float32"),), structure: Any = ("dict", (("a", 0),))) -> bytes:
    """Encode a layout frame that may be wrong."""
    packed: bytes = msgpack.packb({"leaves": leaves, "structure": structure})
    return packed


def deep(depth: int) -> Any:
    structure: Any = 0
    for _ in range(depth):
        structure = ["list", [structure]]
    return structure


HOSTILE = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "cut": frame()[:-1],
    "more behind": frame() + b"\0",
    "no map": msgpack.packb([1, 2]),
    "no leaves": msgpack.packb({"structure": 0}),
    "no structure": msgpack.packb({"leaves": [["", [], "float32"]]}),
    "empty": frame([], ["dict", []]),
    "leaf of two": frame([["a", [2]]]),
    "leaf is text": frame(["abc"]),
    "name is a number": frame([[1, [2], "float32"]]),
    "dtype unknown": frame([["a", [2], "complex64"]]),
    "dtype is a list": frame([["a", [2], ["float32"]]]),
    "dtype is code": frame([["a", [2], "f4"]]),
    "shape is a number": frame([["a", 2, "float32"]]),
    "negative length": frame([["a", [-1], "float32"]]),
    "length is true": frame([["a", [True], "float32"]]),
    "length is a float": frame([["a", [2.0], "float32"]]),
    "too many dimensions": frame([["a", [1] * 33, "float32"]]),
    "too large": frame([["a", [2**40, 2**40], "float32"]]),
    "too large beside a zero": frame([["a", [0, 2**60, 2**60], "float32"]]),
    "too large together": frame([[str(i), [2**57], "int8"] for i in range(9)], ["list", list(range(9))]),
    "same leaf twice": frame(structure=["dict", [["a", 0], ["b", 0]]]),
    "leaf not in structure": frame([["a", [2], "int8"], ["b", [2], "int8"]]),
    "leaf elsewhere": frame(structure=["dict", [["b", 0]]]),
    "leaf does not exist": frame(structure=["dict", [["a", 1]]]),
    "negative leaf": frame(structure=["dict", [["a", -1]]]),
    "leaf is true": frame([["a", [], "int8"], ["b", [], "int8"]], ["dict", [["a", False], ["b", True]]]),
    "two leaves of a name": frame([["a", [2], "int8"], ["a", [2], "int8"]], ["dict", [["a", 0], ["a", 1]]]),
    "same key twice": frame(structure=["dict", [["a", 0], ["a", ["dict", []]]]]),
    "unknown container": frame(structure=["set", [0]]),
    "container is a map": frame(structure={"a": 0}),
    "key is a list": frame(structure=["dict", [[["a"], 0]]]),
    "key is a float": frame([["1.5", [2], "int8"]], ["dict", [[1.5, 0]]]),
    "item of three": frame(structure=["dict", [["a", 0, 0]]]),
    "list of pairs for a name": frame(structure=["dict", "x", [["a", 0]]]),
    "namedtuple without a name": frame(structure=["namedtuple", [["a", 0]]]),
    "field is a number": frame([["1", [2], "int8"]], ["namedtuple", "N", [[1, 0]]]),
    "too deep": frame([[".".join("0" * 65), [2], "int8"]], deep(65)),
    "deep enough to end a recursion": frame(structure=0)[:-1] + b"\x91" * 100_000 + b"\xc0",
    "array of four billion": b"\xdd" + struct.pack(">I", 2**32 - 1),
    "map with a list as key": b"\x81\x91\x01\x01",
    "extension": frame(structure=msgpack.ExtType(5, b"x" * 10)),
    "timestamp": b"\xd7\xff" + b"\xff" * 8,
    "no utf-8": b"\x82\xa6leaves\x91\x93\xa1\xff\x90\xa7float32\xa9structure\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_frame_is_malformed_and_nothing_else(name: str) -> None:
    with pytest.raises(MalformedMessage):
        Layout.from_frame(HOSTILE[name])


def test_the_deepest_layout_that_is_allowed_comes_back() -> None:
    layout = Layout.from_frame(frame([[".".join("0" * 64), [2], "int8"]], deep(64)))

    assert Layout.of(layout.nest([np.ones(2, np.int8)])) == layout


def test_leaves_may_be_numbered_in_another_order_than_they_nest() -> None:
    swapped = frame([["b", [1], "int8"], ["a", [2], "int8"]], ["dict", [["a", 1], ["b", 0]]])
    layout = Layout.from_frame(swapped)
    nest = {"a": np.array([1, 2], np.int8), "b": np.array([3], np.int8)}

    assert layout.pack(nest)[0].tolist() == [3, 1, 2]
    assert same(layout.nest(layout.views(layout.pack(nest))), nest)


@given(st.binary(max_size=200))
def test_bytes_are_malformed_or_a_layout(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        Layout.from_frame(data)


LEAF_LIKE = st.tuples(
    st.text("ab.", max_size=3), st.lists(st.integers(-1, 3), max_size=3), st.sampled_from(["int8", "f"])
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["dict", "list", "tuple", "namedtuple", "a", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=20,
)


@given(st.lists(LEAF_LIKE, max_size=3), ANYTHING)
def test_any_message_is_malformed_or_a_layout_that_survives(leaves: Any, structure: Any) -> None:
    try:
        layout = Layout.from_frame(frame(leaves, structure))
    except MalformedMessage:
        return
    assert Layout.from_frame(layout.to_frame()) == layout


@given(nests(), st.data())
def test_a_damaged_frame_is_malformed_or_a_layout(nest: Any, data: st.DataObject) -> None:
    try:
        damaged = bytearray(Layout.of(nest).to_frame())
    except LayoutError:
        assume(False)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))

    try:
        layout = Layout.from_frame(bytes(damaged))
    except MalformedMessage:
        return
    assert Layout.from_frame(layout.to_frame()) == layout
