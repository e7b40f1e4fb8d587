"""Arbitrary parameters for property tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distgrad.arrays import dtype_of
from distgrad.layout import DTYPES


class Pair(NamedTuple):
    """A namedtuple to nest in."""

    left: Any
    right: Any


def arrays(dtypes: tuple[str, ...] = DTYPES) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """Make small arrays, empty and 0-d ones included, with numbers that are exact in every dtype."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return st.tuples(shapes, st.sampled_from(dtypes), st.integers(0, 2**32 - 1)).map(
        lambda drawn: np.random.default_rng(drawn[2]).integers(0, 2, drawn[0]).astype(dtype_of(drawn[1]))
    )


def nests(
    leaves: st.SearchStrategy[Any] | None = None, keys: st.SearchStrategy[Any] | None = None
) -> st.SearchStrategy[Any]:
    """Nest arrays in dicts, lists, tuples and namedtuples. Keys hold no dot, so paths do not collide."""
    keys = keys if keys is not None else st.text("abcéß_", min_size=1, max_size=3) | st.integers(-(2**63), 2**63 - 1)
    return st.recursive(
        leaves if leaves is not None else arrays(),
        lambda inner: (
            st.dictionaries(keys, inner, max_size=4)
            | st.lists(inner, max_size=4)
            | st.lists(inner, max_size=3).map(tuple)
            | st.builds(Pair, inner, inner)
        ),
        max_leaves=12,
    )


def same(one: Any, other: Any) -> bool:
    """Compare two nests: containers by kind, arrays by dtype, shape and bits."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())


def without_namedtuples(nest: Any) -> Any:
    """Replace every namedtuple by the dict that comes back over the wire."""
    if isinstance(nest, dict):
        return {key: without_namedtuples(value) for key, value in nest.items()}
    if isinstance(nest, Pair):
        return {field: without_namedtuples(value) for field, value in zip(nest._fields, nest, strict=True)}
    if isinstance(nest, (list, tuple)):
        return type(nest)(without_namedtuples(value) for value in nest)
    return nest
