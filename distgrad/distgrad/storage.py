"""One version of the parameters in memory: arenas of ours, or arrays that the caller keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import LayoutError
from .layout import Layout
from .nests import Nest

_OVERLAP_WORK = 10_000  # candidates that the exact test of two interleaved arrays may try


class Storage:
    """One version of the parameters.

    Parameters
    ----------
    layout : Layout
        What is stored.
    arenas : sequence of ndarray
        One per arena, 1-D; for adopted arrays one flat buffer per leaf.
    adopted : sequence of ndarray, optional
        The caller's arrays, one per leaf. Where one is not C-contiguous its buffer is a copy, which
        `load` and `store` keep in step.
    """

    __slots__ = ("_strided", "adopted", "arenas", "layout")

    def __init__(
        self, layout: Layout, arenas: Sequence[NDArray[Any]], adopted: Sequence[NDArray[Any]] | None = None
    ) -> None:
        self.layout = layout
        self.arenas = list(arenas)
        self.adopted = adopted
        self._strided = [
            (array, buffer.reshape(array.shape))
            for array, buffer in zip(adopted or (), arenas if adopted else (), strict=True)
            if not array.flags.c_contiguous
        ]

    @classmethod
    def adopt(cls, layout: Layout, nest: Nest) -> Storage:
        """Make the caller's own arrays the storage.

        Parameters
        ----------
        layout : Layout
            The layout of the nest.
        nest : nest of ndarray
            Arrays to be changed in place.

        Returns
        -------
        Storage
            One buffer per leaf.

        Raises
        ------
        LayoutError
            If a leaf is no array, is read-only, in foreign byte order, or shares memory with itself
            or another.
        """
        arrays = layout.flatten(nest)
        for leaf, array, again in zip(layout.leaves, arrays, layout.flatten(nest), strict=True):
            problem = None
            if array.size and not np.may_share_memory(array, again):  # a number: each look makes a new array
                problem = "is no array"
            elif not array.flags.writeable:
                problem = "is read-only"
            elif array.dtype != leaf.dtype:
                problem = "is not in native byte order"
            elif not array.flags.aligned:
                problem = "is not aligned"
            elif _overlaps_itself(array):
                problem = "has elements that share memory"
            if problem:
                raise LayoutError(
                    f"leaf {leaf.name!r} {problem}: it cannot be updated in place; pass a copy, or let "
                    f"set_model_parameters make one",
                    leaf=leaf.name,
                )
        _check_apart(layout, arrays)
        buffers = [
            array.reshape(-1) if array.flags.c_contiguous else np.empty(array.size, array.dtype) for array in arrays
        ]
        storage = cls(layout, buffers, arrays)
        storage.load()
        return storage

    def load(self) -> None:
        """Copy the caller's strided arrays into their buffers: the caller may have changed them."""
        for array, buffer in self._strided:
            buffer[...] = array

    def store(self) -> None:
        """Copy the buffers back into the caller's strided arrays."""
        for array, buffer in self._strided:
            array[...] = buffer

    def leaves(self) -> list[NDArray[Any]]:
        """See every leaf.

        Returns
        -------
        list of ndarray
            Read-only views, in the layout's order.
        """
        if self.adopted is None:
            return self.layout.views(self.arenas, writeable=False)
        views = [array.view() for array in self.adopted]
        for view in views:
            view.flags.writeable = False
        return views


def _overlaps_itself(array: NDArray[Any]) -> bool:
    """Tell whether two elements may share memory, as in a broadcast or sliding-window view."""
    reach = array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return array.size > 0
        reach += stride * (length - 1)
    return False


def _check_apart(layout: Layout, arrays: Sequence[NDArray[Any]]) -> None:
    """Refuse arrays of which two share memory."""
    spans = sorted((*_bounds(array), number) for number, array in enumerate(arrays) if array.size)
    open_spans: list[tuple[int, int]] = []
    for low, high, number in spans:
        open_spans = [span for span in open_spans if span[0] > low]
        for _, other in open_spans:
            if _share(arrays[number], arrays[other]):
                first, second = (layout.leaves[index].name for index in sorted((other, number)))
                raise LayoutError(f"leaves {first!r} and {second!r} share memory", leaf=second)
        open_spans.append((high, number))


def _bounds(array: NDArray[Any]) -> tuple[int, int]:
    """Give the first address of an array, and the one behind its last (NumPy moved its own)."""
    low = high = array.__array_interface__["data"][0]
    for stride, length in zip(array.strides, array.shape, strict=True):
        reach = stride * (length - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + array.itemsize


def _share(one: NDArray[Any], other: NDArray[Any]) -> bool:
    try:
        return np.shares_memory(one, other, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]  # NumPy's stub knows only 0 and -1
    except np.exceptions.TooHardError:
        return True  # cannot be ruled out
