"""Reading a broker's version buffers where they are, from another process of its host.

The broker tells where each arena of a version lies, and its stamp (`distgrad_broker.shared_versions` keeps those). What
was copied counts only if the stamp was the same before and after: a copy is one consistent version, or taken again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distgrad.errors import MalformedMessage
from distgrad.shared_pages import Unavailable, address_of, attach, fence, host_name

# Before each arena, a page of its own: the first 8 bytes are the stamp.
STAMP_BYTES = 4096
# Buffers that stay mapped: three versions of an arena for each dtype, and a few of a former layout; of small ones ten.
_MAX_MAPPED, _MAX_SMALL, _SMALL_BYTES = 16, 32, 64 << 20


class Lease:
    """Arenas in the broker's memory, which it leaves alone for a while.

    Parameters
    ----------
    arenas : list of ndarray, 1-D
        Read-only views; copies of the small ones.
    stamps : list of tuple
        Where each stamp lies, and what it must be.
    """

    __slots__ = ("_stamps", "arenas")

    def __init__(self, arenas: list[NDArray[Any]], stamps: list[tuple[NDArray[np.uint64], int]]) -> None:
        self.arenas = arenas
        self._stamps = stamps

    def is_good(self) -> bool:
        """Tell whether what was read so far was one version.

        Returns
        -------
        bool
            False if the broker has begun to write there.
        """
        fence()
        return all(stamp[0] == wanted for stamp, wanted in self._stamps)


class SharedReading:
    """What one client has mapped of its broker's memory.

    Attributes
    ----------
    host : str or None
        For `get`; None if nothing can be, or is to be, read this way.
    """

    def __init__(self) -> None:
        self.host = host_name()
        self._mapped: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._mapped_bytes = 0

    def copy(self, places: Any, small: Sequence[Any], arenas: Sequence[NDArray[Any]]) -> bool:
        """Copy a version.

        Parameters
        ----------
        places : object
            As it came over the wire: for each arena ``[pid, fd, name, size, stamp]``, or nil for one that was sent.
        small : sequence of buffers
            Those that were sent, in order.
        arenas : sequence of ndarray, 1-D
            Written to.

        Returns
        -------
        bool
            Whether it is whole. If not, `arenas` hold a mixture; ask again. If memory cannot be shared after all,
            `host` is None from then on.

        Raises
        ------
        MalformedMessage
            If what came does not fit the arenas.
        """
        lease = self.lease(places, small, [(arena.size, arena.dtype) for arena in arenas])
        if lease is None:
            return False
        for arena, source in zip(arenas, lease.arenas, strict=True):
            np.copyto(arena, source)
        return lease.is_good()

    def lease(self, places: Any, small: Sequence[Any], specs: Sequence[tuple[int, np.dtype[Any]]]) -> Lease | None:
        """See a version where it is.

        Parameters
        ----------
        places, small : object, sequence of buffers
            As for `copy`.
        specs : sequence of tuple
            Elements and dtype of each arena.

        Returns
        -------
        Lease or None
            None if it is not there any more, or cannot be read.

        Raises
        ------
        MalformedMessage
            If what came does not fit the arenas.
        """
        if type(places) is not list or len(places) != len(specs):
            raise MalformedMessage(f"a version of {len(specs)} arenas must have as many places")
        sent, arenas, stamps = iter(small), [], []
        for place, (size, dtype) in zip(places, specs, strict=True):
            n_bytes = size * dtype.itemsize
            if place is None:
                part = next(sent, b"")
                if len(part) != n_bytes:
                    raise MalformedMessage(f"an arena of {n_bytes} bytes came with {len(part)}")
                arenas.append(np.frombuffer(bytes(part), dtype))
                continue
            try:
                pages = self._map(place, n_bytes)
            except Unavailable:
                self.host = None
                return None
            arenas.append(pages[STAMP_BYTES:].view(dtype))
            stamps.append((pages[:8].view(np.uint64), place[4]))
        lease = Lease(arenas, stamps)
        return lease if lease.is_good() else None

    def _map(self, place: Any, n_bytes: int) -> NDArray[np.uint8]:
        if type(place) is not list or len(place) != 5 or type(place[4]) is not int:
            raise MalformedMessage("a place is [pid, fd, name, size, stamp]")
        address = address_of(place[:4])
        if address.size != STAMP_BYTES + n_bytes:
            raise MalformedMessage(f"an arena of {n_bytes} bytes lies in {address.size} bytes of shared memory")
        pages = self._mapped.get(address.name)
        if pages is None:
            pages = self._mapped[address.name] = attach(address, writes=False)
            self._mapped_bytes += pages.nbytes
            while len(self._mapped) > (_MAX_SMALL if self._mapped_bytes <= _SMALL_BYTES else _MAX_MAPPED):
                self._mapped_bytes -= self._mapped.popitem(last=False)[1].nbytes
        else:
            self._mapped.move_to_end(address.name)
        return pages
