"""The buffers that versions of the parameters lie in: who reads which, and which one may be written to next.

There are at most `most_buffers`, however many readers there are and however slow (PROTOCOL 14): the current version,
and more, each a spare or a former version that somebody still reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import DTypeLike, NDArray

from distgrad.holder import ParameterHolder
from distgrad.storage import Storage
from distgrad_broker.holds import Hold
from distgrad_broker.loans import Loans

# Of large parameters. Of small ones each of a few workers may compute on a version of its own.
N_BUFFERS = 3
SMALL_BYTES, N_SMALL_BUFFERS = 64 << 20, 10


def most_buffers(parameter_bytes: int) -> int:
    """Tell how many versions may be in memory.

    Parameters
    ----------
    parameter_bytes : int
        Of one.

    Returns
    -------
    int
        3, or up to 10 if they take no more than 64 MiB. One less may be read at a time.
    """
    return max(N_BUFFERS, min(N_SMALL_BUFFERS, SMALL_BYTES // max(1, parameter_bytes)))


class Buffers:
    """The buffers of one broker's parameters.

    Parameters
    ----------
    holder : ParameterHolder
        Has the current version.
    empty : callable
        Makes an arena of a size and a dtype.

    Attributes
    ----------
    spares : list of Storage
        Buffers that nobody holds, the one that was used longest ago first. They are kept: one given back to malloc
        would be cut up for small messages, and the next one would need new memory.
    holds : dict of str to Hold
        Whoever reads in ranges, by token.
    pinned : set of str
        The tokens of holds that are never revoked.
    loans : Loans
        What ZeroMQ sends from.
    copied : set of int
        The ``id`` of each that somebody of this host may still copy from, who holds nothing: the time that this takes
        is not known.
    returning : Storage or None
        A former version that nobody holds, but that ZeroMQ still sends from.
    """

    def __init__(self, holder: ParameterHolder, empty: Callable[[int, DTypeLike], NDArray[Any]]) -> None:
        self._holder = holder
        self._empty = empty
        self.spares: list[Storage] = []
        self.holds: dict[str, Hold] = {}
        self.pinned: set[str] = set()
        self.loans = Loans()
        self.copied: set[int] = set()
        self.returning: Storage | None = None

    @property
    def are_idle(self) -> bool:
        """Whether the current version and a spare may be written to in turn: nobody reads any version."""
        return bool(self.spares) and not self.holds and not self.loans.is_out()

    def retire(self, storage: Storage) -> None:
        """Find a use for a version that is not the current one any more.

        Parameters
        ----------
        storage : Storage
            The version.
        """
        if self.holds and self._is_read(storage):
            return  # release comes back to it
        if not self.loans.covers(storage):
            self.spares.append(storage)
            return
        # One version is lent at a time, so what was lent before is back.
        if self.returning is not None:
            self.spares.append(self.returning)
        self.returning = storage

    def _is_read(self, storage: Storage) -> bool:
        """Tell whether a reader still needs this version; forget the readers that have read all of it.

        A reader whose last range was lost on its way then starts again, which is rare and costs only that reader.
        """
        readers = [hold for hold in self.holds.values() if hold.storage is storage]
        for hold in readers:
            if hold.parts_read >= len(hold.parts) and hold.token not in self.pinned:
                del self.holds[hold.token]
        return any(hold.token in self.holds for hold in readers)

    def may_be_read(self, storage: Storage) -> bool:
        """Tell whether one more reader may begin on a version.

        Parameters
        ----------
        storage : Storage
            The version.

        Returns
        -------
        bool
            False if it would be one too many that is read.
        """
        occupied = self.occupied()
        return id(storage) in occupied or len(occupied) < self._most() - 1

    def occupied(self) -> dict[int, Storage]:
        """Find the versions that must not be written to: somebody reads them, or ZeroMQ does.

        Returns
        -------
        dict of int to Storage
            By their ``id``.
        """
        current = self._holder.storage
        occupied = {}
        for key, storage in {id(hold.storage): hold.storage for hold in self.holds.values()}.items():
            if self._is_read(storage):
                occupied[key] = storage
            elif storage is not current:
                self.retire(storage)
        for lent in (current, self.returning):
            if lent is not None and self.loans.covers(lent):
                occupied[id(lent)] = lent
        return occupied

    def take_spare(self) -> Storage | None:
        """Take a buffer for the next version.

        Returns
        -------
        Storage or None
            None lets it be made in place.
        """
        if not self.spares:
            occupied = self.occupied()
            if self.returning is not None and id(self.returning) not in occupied:
                self.spares.append(self.returning)
                self.returning = None
            if not self.spares:
                is_current_read = id(self._holder.storage) in occupied
                buffers = len(occupied) + (not is_current_read)
                # Only the file thread's hold, which nobody refuses, can make the current version one too many.
                return self._holder.new_spare(self._empty) if buffers < self._most() or is_current_read else None
        # The one used last is in the processor's cache; but whoever copies needs time, of which the one used longest
        # ago has had the most.
        spare = self.spares.pop(0 if self.copied.intersection(map(id, self.spares)) else -1)
        self.copied.discard(id(spare))
        return spare

    def _most(self) -> int:
        layout = self._holder.layout
        return N_BUFFERS if layout is None else most_buffers(layout.parameter_bytes)
