"""What `Worker.slot` gives: memory to compute a gradient into, and its way to the broker."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from distgrad.errors import StateError
from distgrad.layout import Layout
from distgrad.snapshot import Snapshot
from distgrad.wire import State
from distgrad_worker.headers import checked_details
from distgrad_worker.pulling import Puller
from distgrad_worker.pushing import Pusher
from distgrad_worker.slots import Taken


class Slot:
    """Memory to compute a gradient into, which is pushed at the end of the with-block; made by `Worker.slot`.

    Its arrays hold whatever was there before: all of each has to be written. They must not be touched after the block:
    the gradient may not have been read yet, and what is written after it was checked reaches the parameters unchecked.

    Parameters
    ----------
    pusher : Pusher
        Of the worker.
    puller : Puller
        Likewise.

    Attributes
    ----------
    loss, examples, cursor, base_version : object
        As for `Worker.push`; may be set until the block ends.
    number : int or None
        The gradient's number, once it is pushed.
    """

    def __init__(self, pusher: Pusher, puller: Puller) -> None:
        self.loss: float | None = None
        self.examples = 1
        self.cursor: bytes | str | None = None
        self.base_version: Snapshot | State | int | None = None
        self.number: int | None = None
        self._pusher = pusher
        self._puller = puller
        self._taken: Taken | None = None
        self._layout: Layout | None = None

    def open(self) -> Any:
        """Take the memory; `push` or `drop` must follow. The with-block does both.

        Returns
        -------
        nest of ndarray
            An array for each trained leaf, None for the others.

        Raises
        ------
        StateError
            If it was opened before, or all slots are in use by callers.
        DistgradError
            As `Worker.push`.
        """
        if self._taken is not None or self.number is not None:
            raise StateError("a slot is used once; call worker.slot() again")
        layout = self._layout = self._pusher.layout()
        self._taken = self._pusher.take(layout)
        return self._taken.memory.nest(self._puller.like_of(layout))

    def push(self) -> int:
        """Push what was written; errors are those of `Worker.push`.

        Returns
        -------
        int
            The gradient's number.
        """
        return self._push(None)

    def push_pull(self, out: Snapshot | None = None, *, copy: bool = True) -> Snapshot:
        """Push what was written, and pull parameters that it is in; as `Worker.push_pull`.

        Parameters
        ----------
        out, copy : Snapshot, bool
            As for `Worker.pull`.

        Returns
        -------
        Snapshot
            A consistent version.
        """
        return self._puller.pull(None, None, out, copies=copy, own=True, push=self._push)

    def _push(self, asks: int | None) -> int:
        taken, layout = self._taken, self._layout
        if taken is None or layout is None:
            raise StateError("this slot is not open; call worker.slot() again")
        try:
            details = checked_details(self.loss, self.examples, self.cursor)
            base = self._puller.base_of(self.base_version)
        except BaseException:
            self.drop()
            raise
        self._taken = None
        self.number = self._pusher.push_slot(layout, taken, details, base, asks)
        return self.number

    def drop(self) -> None:
        """Give the memory back and push nothing."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.give_back()

    def __enter__(self) -> Any:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.push()
        else:
            self.drop()
