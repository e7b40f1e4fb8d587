"""One array of the parameters, and what a caller gives for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import as_array
from .errors import LayoutError


class Leaf(NamedTuple):
    """One array of the parameters; `offset` and `size` count elements of its arena."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    arena: int
    offset: int
    size: int


class Arena(NamedTuple):
    """All leaves of one dtype, one behind the other; `size` counts elements."""

    dtype: np.dtype[Any]
    size: int
    trainable: bool


def checked(leaf: Leaf, value: Any) -> NDArray[Any]:
    """View what was given for a leaf as an array of its shape.

    Parameters
    ----------
    leaf : Leaf
        Which.
    value : array_like or None
        What was given.

    Returns
    -------
    ndarray
        Of any dtype; not copied if it is one.

    Raises
    ------
    LayoutError
        If it is missing, no array, or of another shape.
    """
    if value is None:
        raise LayoutError(f"leaf {leaf.name!r} is missing", leaf=leaf.name)
    array = as_array(value, leaf.name)
    if array.shape != leaf.shape:
        raise LayoutError(f"leaf {leaf.name!r} must have shape {leaf.shape}, got {array.shape}", leaf=leaf.name)
    return array


def put(leaf: Leaf, value: Any, arena: NDArray[Any]) -> None:
    """Copy a leaf's gradient into its place, cast to the leaf's dtype.

    Parameters
    ----------
    leaf : Leaf
        Which.
    value : array_like or None
        Its gradient.
    arena : ndarray, 1-D
        The leaf's arena.

    Raises
    ------
    LayoutError
        As `checked`, and if the dtype does not cast as ``same_kind``.
    """
    array = checked(leaf, value)
    target = arena[leaf.offset : leaf.offset + leaf.size].reshape(leaf.shape)
    if array.dtype is leaf.dtype:
        target[...] = array
    elif np.can_cast(array.dtype, leaf.dtype, "same_kind"):
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            np.copyto(target, array, casting="same_kind")
    else:
        raise LayoutError(f"gradient of {leaf.name!r} must cast to {leaf.dtype}, got {array.dtype}", leaf=leaf.name)


def is_as_stored(leaf: Leaf, value: Any) -> bool:
    """Tell whether what was given for a leaf has the very bytes that its place in the arena would have.

    Parameters
    ----------
    leaf : Leaf
        Which.
    value : object
        What was given.

    Returns
    -------
    bool
        Whether it is a contiguous, aligned array of the leaf's dtype and shape.
    """
    return (
        type(value) is np.ndarray
        and value.dtype is leaf.dtype
        and value.shape == leaf.shape
        and value.flags.c_contiguous
        and value.flags.aligned
    )


def check_absent(leaf: Leaf, value: Any) -> None:
    """Refuse a gradient for a leaf that is not trained.

    Parameters
    ----------
    leaf : Leaf
        Which.
    value : array_like or None
        What was given; an empty array counts as nothing.

    Raises
    ------
    LayoutError
        If it is something.
    """
    if value is not None and as_array(value, leaf.name).size:
        raise LayoutError(f"leaf {leaf.name!r} is {leaf.dtype} and has no gradient", leaf=leaf.name)
