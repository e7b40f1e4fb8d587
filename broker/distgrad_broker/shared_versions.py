"""Version buffers that other processes of this host read where they are, and the stamps that tell them what they read.

A stamp lies before each buffer: 0 while it is written to, and afterwards a number that it never had before. Who reads
is told the stamp of the version that it is to have, copies, and looks whether the stamp is still the same; if not, the
broker has used the buffer for a later version meanwhile, and it asks again (`distgrad.shared_reading`). So readers cost
the broker neither copies nor waiting nor memory, however slow they are and however they end.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distgrad.arrays import lasting_empty
from distgrad.shared_pages import SharedPages, Unavailable, fence
from distgrad.shared_reading import STAMP_BYTES
from distgrad.storage import Storage

# Smaller ones are sent: that costs less than looking at a stamp twice.
MIN_BYTES = 256 * 1024


class SharedArenas:
    """Makes arenas that others can read, and keeps their stamps; owned by the broker's loop."""

    def __init__(self) -> None:
        # By the address of an arena's first element: where others find it.
        self._known: dict[int, list[Any]] = {}
        self._last = 0
        self._is_possible = True

    def empty(self, size: int, dtype: DTypeLike) -> NDArray[Any]:
        """Make an arena, in shared memory if it is large and there is some.

        Parameters
        ----------
        size : int
            Number of elements.
        dtype : dtype_like
            Their type.

        Returns
        -------
        ndarray of dtype, shape (size,)
            Uninitialised.
        """
        n_bytes = size * np.dtype(dtype).itemsize
        if n_bytes < MIN_BYTES or not self._is_possible:
            return lasting_empty(size, dtype)
        try:
            pages = SharedPages(STAMP_BYTES + n_bytes, is_read_only=True)
        except Unavailable:
            self._is_possible = False
            return lasting_empty(size, dtype)
        arena = pages.array[STAMP_BYTES:].view(dtype)
        place = arena.__array_interface__["data"][0]
        # Nothing here may keep the memory: it goes with its last view.
        weakref.finalize(pages.array, self._known.pop, place, None)
        self._known[place] = list(pages.address)
        return arena

    def begin(self, storage: Storage) -> None:
        """Note that a version is about to be written to.

        Parameters
        ----------
        storage : Storage
            Its buffers.
        """
        stamps = self._stamps(storage)
        for stamp in stamps:
            stamp[0] = 0
        if stamps:
            fence()

    def end(self, storage: Storage) -> None:
        """Note that a version is complete.

        Parameters
        ----------
        storage : Storage
            Its buffers.
        """
        stamps = self._stamps(storage)
        if stamps:
            fence()
            self._last += 1
        for stamp in stamps:
            stamp[0] = self._last

    def describe(self, storage: Storage) -> list[list[Any] | None] | None:
        """Tell where a version is found.

        Parameters
        ----------
        storage : Storage
            Its buffers.

        Returns
        -------
        list of (list or None), or None
            For each arena its address and its stamp, ``[pid, fd, name, size, stamp]``; None for one that has to be
            sent. None altogether if all have.
        """
        if not self._known:
            return None
        places = [self._find(arena) for arena in storage.arenas]
        if not any(places):
            return None
        return [
            None if place is None else [*place, int(_stamp_of(arena)[0])]
            for place, arena in zip(places, storage.arenas, strict=True)
        ]

    def share(self, arenas: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Give arenas whose memory can be shared.

        Parameters
        ----------
        arenas : sequence of ndarray, 1-D
            From elsewhere.

        Returns
        -------
        list of ndarray, 1-D
            Copies in shared memory of those that are large, and the others.
        """
        shared = []
        for arena in arenas:
            copy = self.empty(arena.size, arena.dtype) if arena.nbytes >= MIN_BYTES else arena
            if copy is not arena:
                copy[...] = arena
            shared.append(copy)
        return shared

    def _find(self, arena: NDArray[Any]) -> list[Any] | None:
        if arena.nbytes < MIN_BYTES:
            return None
        return self._known.get(arena.__array_interface__["data"][0])

    def _stamps(self, storage: Storage) -> list[NDArray[np.uint64]]:
        """Find the stamps of what updates write to; other arenas are the same in all versions."""
        if not self._known:
            return []
        trained = storage.arenas[: storage.layout.n_trainable_arenas]
        return [_stamp_of(arena) for arena in trained if self._find(arena) is not None]


def _stamp_of(arena: NDArray[Any]) -> NDArray[np.uint64]:
    """See the stamp that lies before an arena in the same memory."""
    pages = arena.base
    assert isinstance(pages, np.ndarray)  # `SharedPages.array`: NumPy makes views of the array that is at the bottom
    return pages[:8].view(np.uint64)
