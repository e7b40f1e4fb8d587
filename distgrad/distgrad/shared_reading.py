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
# Buffers that stay mapped: three versions of an arena for each dtype, and a few of a former layout.
_MAX_MAPPED = 16


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
        if type(places) is not list or len(places) != len(arenas):
            raise MalformedMessage(f"a version of {len(arenas)} arenas must have as many places")
        sent = iter(small)
        for place, arena in zip(places, arenas, strict=True):
            if place is None:
                part = next(sent, b"")
                if len(part) != arena.nbytes:
                    raise MalformedMessage(f"an arena of {arena.nbytes} bytes came with {len(part)}")
                arena.view(np.uint8)[:] = np.frombuffer(part, np.uint8)
                continue
            try:
                pages = self._map(place, arena.nbytes)
            except Unavailable:
                self.host = None
                return False
            stamp = pages[:8].view(np.uint64)
            if stamp[0] != place[4]:
                return False
            fence()
            np.copyto(arena, pages[STAMP_BYTES:].view(arena.dtype))
            fence()
            if stamp[0] != place[4]:
                return False
        return True

    def _map(self, place: Any, n_bytes: int) -> NDArray[np.uint8]:
        if type(place) is not list or len(place) != 5 or type(place[4]) is not int:
            raise MalformedMessage("a place is [pid, fd, name, size, stamp]")
        address = address_of(place[:4])
        if address.size != STAMP_BYTES + n_bytes:
            raise MalformedMessage(f"an arena of {n_bytes} bytes lies in {address.size} bytes of shared memory")
        pages = self._mapped.get(address.name)
        if pages is None:
            pages = self._mapped[address.name] = attach(address, writes=False)
            if len(self._mapped) > _MAX_MAPPED:
                self._mapped.popitem(last=False)
        else:
            self._mapped.move_to_end(address.name)
        return pages
