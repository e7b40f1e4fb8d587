"""Which arrays are carried, and how new ones are made."""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Sequence
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import LayoutError

BFLOAT16 = "bfloat16"
"""The one dtype that NumPy has not itself: it comes with ``ml_dtypes``, the extra ``bfloat16``."""
TRAINABLE = (BFLOAT16, "float16", "float32", "float64")
"""Dtypes that an update changes, in the order of their arenas."""
DTYPES = (*TRAINABLE, "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
"""Every dtype that is carried, in the order of the arenas."""

SMALL_BYTES = 64 * 1024
"""Up to here a call costs more than the copying that it does."""

_ALIGNMENT, _PAGE, _LARGE_BYTES = 64, 4096, 1 << 20
_SHAPE, _DTYPE, _RAVEL = attrgetter("shape"), attrgetter("dtype"), methodcaller("ravel")
_CARRIED = {dtype: dtype for dtype in map(np.dtype, DTYPES[1:])}  # longlong and int64 are equal, but two objects


def dtype_of(name: str) -> np.dtype[Any]:
    """Find a dtype by its name.

    Parameters
    ----------
    name : str
        One of `DTYPES`.

    Returns
    -------
    dtype
        In native byte order.

    Raises
    ------
    LayoutError
        If it is bfloat16, and ``ml_dtypes`` is not installed.
    """
    if name != BFLOAT16:
        return np.dtype(name)
    try:
        import ml_dtypes  # only who has such parameters pays for it
    except ImportError as error:
        raise LayoutError(
            "bfloat16 parameters need the extra: pip install '.[bfloat16]' in the clone of distgrad"
        ) from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


@functools.cache
def largest(dtype: np.dtype[Any]) -> float:
    """Give the largest finite number of a dtype.

    Parameters
    ----------
    dtype : dtype
        One of `TRAINABLE`.

    Returns
    -------
    float
        The number.
    """
    # That of bfloat16, which `numpy.finfo` does not know, has float32's exponent and seven bits behind the point.
    return (2 - 2**-7) * 2.0**127 if dtype.name == BFLOAT16 else float(np.finfo(dtype).max)


def carried_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Find the dtype under which an array is carried.

    Parameters
    ----------
    dtype : dtype
        Any dtype, in any byte order.

    Returns
    -------
    dtype or None
        One of `DTYPES` in native byte order, always the same object; ``None`` if it is not carried.
    """
    found = _CARRIED.get(dtype.newbyteorder("="))
    return dtype_of(BFLOAT16) if found is None and dtype.name == BFLOAT16 else found


def aligned_empty(size: int, dtype: DTypeLike) -> NDArray[Any]:
    """Make an uninitialised array that starts on a cache line, or on a page if it is large.

    Parameters
    ----------
    size : int
        Number of elements, >= 0.
    dtype : dtype_like
        Their type.

    Returns
    -------
    ndarray of dtype, shape (size,)
        64-byte aligned; page-aligned from 1 MiB on.
    """
    dtype = np.dtype(dtype)
    n_bytes = size * dtype.itemsize
    alignment = _PAGE if n_bytes >= _LARGE_BYTES else _ALIGNMENT
    raw = np.empty(n_bytes + alignment, np.uint8)
    start = -raw.__array_interface__["data"][0] % alignment
    return raw[start : start + n_bytes].view(dtype)


def lasting_empty(size: int, dtype: DTypeLike) -> NDArray[Any]:
    """Make an array that will live long: parameters, optimizer state.

    A large one gets pages of its own, huge ones where there are any, instead of a piece of malloc's heap. That heap is
    kept for messages (`distgrad.malloc`), and what lives long would break it up.

    Parameters
    ----------
    size : int
        Number of elements, >= 0.
    dtype : dtype_like
        Their type.

    Returns
    -------
    ndarray of dtype, shape (size,)
        Aligned as by `aligned_empty`; a large one is zero.
    """
    dtype = np.dtype(dtype)
    n_bytes = size * dtype.itemsize
    if n_bytes < _LARGE_BYTES:
        return aligned_empty(size, dtype)
    if hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        pages = mmap.mmap(-1, n_bytes)  # Windows, where such memory is private anyway
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype)


def joined_as_is(
    values: Sequence[Any], shapes: list[tuple[int, ...]], dtype: np.dtype[Any], out: NDArray[Any] | None = None
) -> NDArray[Any] | None:
    """Copy leaves of one dtype behind each other by one call, if each is just as it should be.

    Nothing here is done for each leaf in Python, so that ten thousand small ones cost little more than one large one.

    Parameters
    ----------
    values : sequence of object
        What a caller gave for each leaf.
    shapes : list of tuple of int
        The shape of each.
    dtype : dtype
        Of all.
    out : ndarray, 1-D, optional
        Where to; a new array without.

    Returns
    -------
    ndarray or None
        The 1-D array; ``None`` if a value is anything but an array of its leaf's shape and dtype.
    """
    if set(map(type, values)) != {np.ndarray} or set(map(_DTYPE, values)) != {dtype}:
        return None
    if list(map(_SHAPE, values)) != shapes:
        return None
    if out is None and len(values) == 1:
        joined: NDArray[Any] = values[0].flatten()
        return joined
    return np.concatenate(list(map(_RAVEL, values)), out=out)


def as_array(value: Any, name: str) -> NDArray[Any]:
    """View a leaf as an array, without copying what is one already.

    Parameters
    ----------
    value : array_like
        An ndarray, a number, or anything with ``__array__`` (a tensor on the CPU, say).
    name : str
        Path of the leaf, for the error.

    Returns
    -------
    ndarray
        The leaf.

    Raises
    ------
    LayoutError
        If the leaf is nothing of this kind.
    """
    if type(value) is np.ndarray:
        return value
    numeric = isinstance(value, (bool, int, float, complex, np.generic)) or hasattr(value, "__array__")
    if not numeric or isinstance(value, np.ma.MaskedArray):
        raise LayoutError(
            f"leaf {name!r} is a {type(value).__name__}; expected arrays nested in dict, list, tuple or namedtuple",
            leaf=name,
        )
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # a tensor elsewhere
        raise LayoutError(f"leaf {name!r} cannot be read as an array: {error}", leaf=name) from error
