"""Versions of the parameters: an update writes the next one beside the current one, readers hold what they read.

The pool keeps the current version, one spare, and at most `MAX_HELD` older versions that somebody still reads in
ranges (PROTOCOL 14). When one more would be needed, the hold that is least worth keeping is revoked: a reader that
went quiet first, else the one that has read least, so that whoever is furthest on always finishes. An update
therefore never waits for a reader, and memory never depends on how many readers there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrad.codec import decode, encode
from distgrad.errors import GradientRefused
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.storage import Storage
from distgrad.wire import RANGE_PARTS, Gradient

MAX_HELD = 2
# A reader that asks for nothing for this long is the first to lose its hold.
QUIET_S = 2.0


class Hold:
    """Somebody's claim on one version: a reader's between two ranges, or the file thread's."""

    __slots__ = ("generation", "last_used", "parts", "parts_read", "storage", "token", "version")

    def __init__(self, token: str, generation: int, layout: Layout, storage: Storage, version: int, now: float) -> None:
        self.token = token
        self.generation = generation
        self.storage = storage
        self.version = version
        self.parts = encode(layout, storage.arenas, trained_only=False)
        self.parts_read = 0
        self.last_used = now


class Versions:
    """The holder, its version buffers, and the holds on them.

    Parameters
    ----------
    holder : ParameterHolder
        Owned by the caller's thread, as is this object.
    """

    def __init__(self, holder: ParameterHolder) -> None:
        self.holder = holder
        self._spare: Storage | None = None
        self._holds: dict[str, Hold] = {}
        self._tokens_issued = 0
        # How often the parameters were replaced.
        self._generation = 0
        self._pinned: set[str] = set()
        self.revoked = 0

    @property
    def layout(self) -> Layout | None:
        """The layout of the parameters, or None while there are none."""
        return self.holder.layout

    @property
    def version(self) -> int:
        """Updates applied so far."""
        return self.holder.version

    @property
    def held(self) -> int:
        """How many older versions are kept for readers."""
        return len(self._held_storages())

    def apply(self, gradient: Gradient) -> None:
        """Apply one gradient and swap the new version in.

        Parameters
        ----------
        gradient : Gradient
            Of the current layout's fingerprint.

        Raises
        ------
        GradientRefused
            With nothing changed.
        """
        holder = self.holder
        layout = holder.layout
        if layout is None or gradient.fingerprint != layout.fingerprint:
            raise GradientRefused("layout", "the gradient is of another layout than the parameters; pull and go on")
        arrays = decode(layout, gradient.encoding, gradient.parts, gradient.size)
        spare = self._spare
        if spare is None:
            spare = self._find_spare()
        self._spare = spare
        former = holder.apply(arrays, spare=spare)
        # Only now: a refused gradient leaves the spare where it was.
        self._spare = None
        if former is not None and not (self._holds and self._is_read(former)):
            self._spare = former

    def set(self, layout: Layout, arenas: Sequence[np.ndarray[Any, Any]]) -> None:
        """Replace the parameters; every reader has to start again.

        Parameters
        ----------
        layout : Layout
            Of the new parameters.
        arenas : sequence of ndarray, 1-D
            All arenas; owned by this object from now on.
        """
        self._drop_readers()
        self.holder.set_arenas(layout, list(arenas))

    def clear(self) -> None:
        """Take the parameters away."""
        self._drop_readers()
        self.holder.clear()

    def open(self, now: float) -> tuple[str | None, Sequence[bytes | memoryview], int]:
        """Begin to read the current version.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        token : str or None
            For `read`; None if all parts are here.
        parts : sequence of bytes or memoryview
            The first parts; valid until the next update.
        n_parts : int
            How many there are in all.
        """
        layout, storage = self._current()
        n_parts = len(layout.parts())
        if n_parts <= RANGE_PARTS:
            return None, encode(layout, storage.arenas, trained_only=False), n_parts
        hold = self._hold(layout, storage, now)
        hold.parts_read = RANGE_PARTS
        return hold.token, hold.parts[:RANGE_PARTS], n_parts

    def read(self, token: str, first: int, now: float) -> tuple[Sequence[bytes | memoryview], int] | None:
        """Read on in a held version.

        Parameters
        ----------
        token : str
            From `open`.
        first : int
            Index of the first part wanted.
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        tuple of (parts, n_parts) or None
            Valid until the next update; None if the hold is gone.
        """
        hold = self._holds.get(token)
        if hold is None or token in self._pinned:
            return None
        hold.last_used = now
        hold.parts_read = max(hold.parts_read, first + RANGE_PARTS)
        return hold.parts[first : first + RANGE_PARTS], len(hold.parts)

    def pin(self, now: float) -> tuple[str, Layout, list[Any], int]:
        """Hold the current version so that it is not revoked, for the file thread.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        token : str
            To `release`.
        layout : Layout
            Of the parameters.
        arenas : list of ndarray
            They do not change until the release.
        version : int
            Their version.
        """
        layout, storage = self._current()
        hold = self._hold(layout, storage, now)
        self._pinned.add(hold.token)
        return hold.token, layout, list(storage.arenas), hold.version

    def release(self, token: str) -> None:
        """Give a hold back; an unknown one is no error.

        Parameters
        ----------
        token : str
            From `open` or `pin`.
        """
        self._pinned.discard(token)
        hold = self._holds.pop(token, None)
        if hold is None or self._is_read(hold.storage) or hold.storage is self.holder.storage:
            return
        # A buffer of parameters that were replaced shares their integers, even if the layout is the same.
        if self._spare is None and hold.generation == self._generation:
            self._spare = hold.storage

    def expire(self, now: float) -> None:
        """Drop the holds of readers that went quiet.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.
        """
        for token in [t for t, h in self._holds.items() if t not in self._pinned and now - h.last_used > 15 * QUIET_S]:
            self.release(token)

    def _current(self) -> tuple[Layout, Storage]:
        layout, storage = self.holder.layout, self.holder.storage
        # The core asks only while there are parameters.
        assert layout is not None
        assert storage is not None
        return layout, storage

    def _hold(self, layout: Layout, storage: Storage, now: float) -> Hold:
        self._tokens_issued += 1
        hold = Hold(f"s{self._tokens_issued}", self._generation, layout, storage, self.holder.version, now)
        self._holds[hold.token] = hold
        return hold

    def _is_read(self, storage: Storage) -> bool:
        """Tell whether a reader still needs this version; forget the readers that have read all of it.

        A reader whose last range was lost on its way then starts again, which is rare and costs only that reader.
        """
        readers = [hold for hold in self._holds.values() if hold.storage is storage]
        for hold in readers:
            if hold.parts_read >= len(hold.parts) and hold.token not in self._pinned:
                del self._holds[hold.token]
        return any(hold.token in self._holds for hold in readers)

    def _held_storages(self) -> dict[int, Storage]:
        current = self.holder.storage
        return {id(h.storage): h.storage for h in self._holds.values() if h.storage is not current}

    def _find_spare(self) -> Storage:
        held = self._held_storages()
        # The file thread's version is never taken from it; it is given back soon, and there is at most one.
        revocable = [s for s in held.values() if not any(self._holds[t].storage is s for t in self._pinned)]
        if len(revocable) < MAX_HELD:
            return self.holder.new_spare()

        newest = max(hold.last_used for hold in self._holds.values())

        def worth(storage: Storage) -> tuple[bool, int]:
            # Who has read everything is kept only in case its last range was lost on its way.
            readers = [h for h in self._holds.values() if h.storage is storage and h.parts_read < len(h.parts)]
            is_active = any(newest - hold.last_used <= QUIET_S for hold in readers)
            return is_active, max((hold.parts_read for hold in readers), default=0)

        victim = min(revocable, key=worth)
        for token in [token for token, hold in self._holds.items() if hold.storage is victim]:
            hold = self._holds.pop(token)
            self.revoked += hold.parts_read < len(hold.parts)
        return victim

    def _drop_readers(self) -> None:
        self._spare = None
        self._generation += 1
        for token in [token for token in self._holds if token not in self._pinned]:
            del self._holds[token]
