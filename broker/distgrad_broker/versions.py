"""Versions of the parameters: an update writes the next one beside the current one, readers hold what they read.

There are a few versions at most in memory, three of large parameters (`buffers`). An update never waits for a reader.
Where all others are being read it is made in place: nobody reads the current one then, because

- one version less than there may be is read at a time; who would begin on one more has to wait (`Versions.open`
  gives None), and then begins together with all others who waited, on the version that is then current;
- whoever makes others wait for too long loses its hold (`Versions.relieve`): a reader that went quiet first, else the
  one that has read least, so that whoever is furthest on always finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distgrad.arrays import lasting_empty
from distgrad.codec import LENT_BYTES, decode, encode
from distgrad.errors import GradientRefused
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.storage import Storage
from distgrad.wire import MAX_FRAME_BYTES, PART_BYTES, RANGE_PARTS, Gradient
from distgrad_broker.buffers import N_BUFFERS, Buffers
from distgrad_broker.holds import MAX_READERS, QUIET_S, SERVED_PARTS, Hold, Range, least_worth_keeping
from distgrad_broker.shared_versions import MIN_BYTES, SharedArenas


class Versions:
    """The holder, its version buffers, and the holds on them.

    Parameters
    ----------
    holder : ParameterHolder
        Owned by the caller's thread.
    shared : SharedArenas, optional
        Lets processes of this host read versions where they are.
    """

    def __init__(self, holder: ParameterHolder, shared: SharedArenas | None = None) -> None:
        self.holder = holder
        self._shared = shared
        # Makes an arena of a size and a dtype.
        self.empty = lasting_empty if shared is None else shared.empty
        if shared is not None and holder.storage is not None and holder.storage.adopted is None:
            holder.storage.arenas[:] = shared.share(holder.storage.arenas)
            shared.end(holder.storage)
        self._buffers = Buffers(holder, self.empty)
        # The version that a bad sum would have changed.
        self._bad_sum_at: int | None = None
        self._tokens_issued = 0
        # How often the parameters were replaced.
        self._generation = 0
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
        return sum(storage is not self.holder.storage for storage in self._buffers.occupied().values())

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
        arrays = self._read(gradient)
        self._apply(lambda spare: self.holder.apply(arrays, spare=spare))

    def apply_run(self, gradients: Sequence[Gradient]) -> int:
        """Apply gradients one after the other, as long as they are good and small and nobody reads any version.

        Parameters
        ----------
        gradients : sequence of Gradient
            In order.

        Returns
        -------
        int
            How many were applied. The next one, if any, is for `apply`.
        """
        holder, layout = self.holder, self.holder.layout
        if layout is None or not self._buffers.are_idle or self._is_shared(layout):
            return 0
        spare: Storage | None = self._buffers.spares.pop(0)
        n_applied = 0
        for gradient in gradients:
            if gradient.fingerprint != layout.fingerprint:
                break
            try:
                spare = holder.apply(decode(layout, gradient.encoding, gradient.parts, gradient.size), spare=spare)
            except GradientRefused:
                break
            n_applied += 1
        assert spare is not None  # the former version of each was the spare of the next
        self._buffers.spares.append(spare)
        return n_applied

    @property
    def checks_each(self) -> bool:
        """Whether `check` looks for all that is bad, and not only for what a sum would not tell: one was bad."""
        return self._bad_sum_at == self.holder.version

    def check(self, gradient: Gradient) -> None:
        """Find out whether a gradient could be part of a sum.

        Parameters
        ----------
        gradient : Gradient
            As for `apply`.

        Raises
        ------
        GradientRefused
            If not.
        """
        self.holder.check(self._read(gradient), before_sum=not self.checks_each)

    def apply_sum(self, gradients: Sequence[Gradient], weights: Sequence[float]) -> None:
        """Apply the weighted sum of some gradients as one update, and swap the new version in.

        Parameters
        ----------
        gradients : sequence of Gradient
            In the order in which they are summed.
        weights : sequence of float
            One for each.

        Raises
        ------
        GradientRefused
            With nothing changed; until the next version `checks_each`.
        """
        arrays = [self._read(gradient) for gradient in gradients]
        try:
            self._apply(lambda spare: self.holder.apply_sum(arrays, weights, spare=spare))
        except GradientRefused:
            self._bad_sum_at = self.holder.version
            raise

    def _read(self, gradient: Gradient) -> list[np.ndarray[Any, Any]]:
        layout = self.holder.layout
        if layout is None or gradient.fingerprint != layout.fingerprint:
            raise GradientRefused("layout", "the gradient is of another layout than the parameters; pull and go on")
        return decode(layout, gradient.encoding, gradient.parts, gradient.size)

    def _apply(self, apply: Callable[[Storage | None], Storage | None]) -> None:
        spare = self._buffers.take_spare()
        target = self.holder.storage if spare is None else spare
        if self._shared is not None and target is not None:
            self._shared.begin(target)
        try:
            former = apply(spare)
        except GradientRefused:
            if spare is not None:
                self._buffers.spares.insert(0, spare)
            raise
        finally:
            if self._shared is not None and target is not None:
                self._shared.end(target)
        if former is not None:
            self._buffers.retire(former)

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
        if self._shared is not None and self.holder.storage is not None:
            self._shared.end(self.holder.storage)

    def share(self) -> tuple[list[list[Any] | None], list[Any]] | None:
        """Tell processes of this host where the current version is; see `lease` and `expect_copy`.

        Returns
        -------
        tuple or None
            As from `SharedArenas.describe`, and the small arenas, which are sent whole; None if nothing is shared.
        """
        _, storage = self._current()
        places = None if self._shared is None else self._shared.describe(storage)
        if places is None:
            return None
        while (
            self._buffers.spares
            and 1 + len(self._buffers.spares) + (self._buffers.returning is not None) + self.held < N_BUFFERS
        ):
            # A third buffer gives readers the time of one more update.
            self._buffers.spares.insert(0, self.holder.new_spare(self.empty))
        small = [arena.tobytes() for arena, place in zip(storage.arenas, places, strict=True) if place is None]
        return places, small

    def expect_copy(self) -> None:
        """Note that somebody of this host copies the current version from where it is, and holds nothing."""
        self._buffers.copied.add(id(self._current()[1]))

    def lease(self, now: float) -> Hold | None:
        """Hold the current version for somebody who reads it where it is.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        Hold or None
            To `release`; `last_used` is the caller's. None if too many versions are being read already.
        """
        layout, storage = self._current()
        return self._hold(layout, storage, now) if self._buffers.may_be_read(storage) else None

    def clear(self) -> None:
        """Take the parameters away."""
        self._drop_readers()
        self.holder.clear()

    def open(self, now: float) -> Range | None:
        """Begin to read the current version.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        Range or None
            The first parts. None if too many versions are being read: ask again after `read`, `release` or `relieve`.
        """
        layout, storage = self._current()
        parts = None
        if layout.parameter_bytes <= RANGE_PARTS * PART_BYTES:
            # In as large parts as may be: a reader can take an arena that is in one piece as it is.
            parts = encode(layout, storage.arenas, trained_only=False, part_bytes=MAX_FRAME_BYTES)
        n_parts = len(layout.parts()) if parts is None else len(parts)
        if parts is not None and n_parts <= RANGE_PARTS:
            lent = None
            if layout.parameter_bytes >= LENT_BYTES and self._buffers.may_be_read(storage):
                lent = self._buffers.loans.lend(storage, parts)
            return Range(None, parts if lent is None else lent, n_parts, lent is not None)
        if not self._buffers.may_be_read(storage):
            return None
        return self._serve(self._hold(layout, storage, now), 0)

    def read(self, token: str, first: int, now: float) -> Range | None:
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
        Range or None
            None if the hold is gone.
        """
        hold = self._buffers.holds.get(token)
        if hold is None or token in self._buffers.pinned:
            return None
        hold.last_used = now
        return self._serve(hold, first)

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
        self._buffers.pinned.add(hold.token)
        return hold.token, layout, list(storage.arenas), hold.version

    def release(self, token: str) -> None:
        """Give a hold back; an unknown one is no error.

        Parameters
        ----------
        token : str
            From `open` or `pin`.
        """
        self._buffers.pinned.discard(token)
        hold = self._buffers.holds.pop(token, None)
        if hold is None or hold.storage is self.holder.storage:
            return
        # A buffer of parameters that were replaced shares their integers, even if the layout is the same.
        if hold.generation == self._generation:
            self._buffers.retire(hold.storage)

    def relieve(self) -> None:
        """Revoke the hold that is least worth keeping, because others have waited for it for too long."""
        readers = [hold for token, hold in self._buffers.holds.items() if token not in self._buffers.pinned]
        if not readers:
            return
        victim = least_worth_keeping(readers)
        for hold in readers:
            if hold.storage is victim:
                self.revoked += 1
                self.release(hold.token)

    def expire(self, now: float) -> None:
        """Drop the holds of readers that went quiet.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.
        """
        for token in [
            t
            for t, h in self._buffers.holds.items()
            if t not in self._buffers.pinned and now - h.last_used > 15 * QUIET_S
        ]:
            self.release(token)

    def _current(self) -> tuple[Layout, Storage]:
        layout, storage = self.holder.layout, self.holder.storage
        # The core asks only while there are parameters.
        assert layout is not None
        assert storage is not None
        return layout, storage

    def _hold(self, layout: Layout, storage: Storage, now: float) -> Hold:
        readers = [token for token in self._buffers.holds if token not in self._buffers.pinned]
        if len(readers) >= MAX_READERS:
            quietest = min(readers, key=lambda token: self._buffers.holds[token].last_used)
            self.revoked += 1
            self.release(quietest)
        self._tokens_issued += 1
        hold = Hold(f"s{self._tokens_issued}", self._generation, layout, storage, self.holder.version, now)
        self._buffers.holds[hold.token] = hold
        return hold

    def _serve(self, hold: Hold, first: int) -> Range:
        parts = hold.parts[first : first + SERVED_PARTS]
        lent = self._buffers.loans.lend(hold.storage, parts)
        hold.parts_read = max(hold.parts_read, first + len(parts))
        return Range(hold.token, parts if lent is None else lent, len(hold.parts), lent is not None)

    def _is_shared(self, layout: Layout) -> bool:
        """Tell whether versions have stamps to be kept, for those who read them where they are."""
        return self._shared is not None and layout.gradient_bytes >= MIN_BYTES

    def _drop_readers(self) -> None:
        self._buffers.spares, self._buffers.returning = [], None
        self._buffers.copied.clear()
        self._generation += 1
        for token in [token for token in self._buffers.holds if token not in self._buffers.pinned]:
            del self._buffers.holds[token]
