"""The bounded queue between callers and the updater, and when the updater takes from it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from threading import Condition, RLock
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import nests
from .arrays import as_array, carried_dtype
from .errors import AlreadyRunning, LayoutError, QueueFull, StateError
from .layout import Layout
from .nests import Nest


class QueuedGradient(NamedTuple):
    """A gradient that waits: packed for a layout, as a nest if there were no parameters yet, or from the journal."""

    number: int
    layout: Layout | None
    content: Any
    cursor: bytes | str | None = None


class Recorder(Protocol):
    """Who keeps what happens to gradients. Called with the queue's lock held."""

    @property
    def behind(self) -> int:
        """Gradients that are not kept yet."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why nothing can be kept at the moment."""
        ...

    def added(self, gradient: QueuedGradient) -> None:
        """Keep a gradient that was added.

        Parameters
        ----------
        gradient : QueuedGradient
            Its arrays do not change any more.
        """
        ...

    def cleared(self, gradients: Iterable[QueuedGradient]) -> None:
        """Keep that gradients were dropped.

        Parameters
        ----------
        gradients : iterable of QueuedGradient
            Which.
        """
        ...


class GradientQueue:
    """A FIFO of gradients with one taker, which can be asked to stop.

    Parameters
    ----------
    bound : int
        Gradients that may wait.
    check : callable
        Raises if callers should give up: it is called around every wait.
    step : int
        Gradients that are taken at a time; fewer when somebody waits for them.

    Attributes
    ----------
    running : bool
        Whether there is a taker.
    recorder : Recorder or None
        Who keeps what happens. Gradients that it has not kept yet count as waiting, as they are still in memory.
    """

    def __init__(self, bound: int, check: Callable[[], None], step: int = 1) -> None:
        self.running = False
        self.recorder: Recorder | None = None
        self._bound = bound
        self._check = check
        self._step = step
        self._joining = 0  # callers that wait for all to be taken
        # Taken as itself, not as the condition: Ctrl-C in a condition's methods, which are Python, leaves it taken.
        self._lock = RLock()
        self._changed = Condition(self._lock)  # announces everything here
        self._waiting: deque[QueuedGradient] = deque()
        self._taken: list[QueuedGradient] = []
        self._added = 0
        self._stop_after: int | None = None  # while stopping, the last gradient to be taken

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def decided(self) -> int:
        """Highest number up to which all gradients were applied, refused or cleared."""
        with self._lock:
            oldest = (self._taken or self._waiting or (None,))[0]
            return self._added if oldest is None else oldest.number - 1

    def restore(self, gradients: Iterable[QueuedGradient], added: int) -> None:
        """Begin where another queue ended.

        Parameters
        ----------
        gradients : iterable of QueuedGradient
            What waits, in order; may be more than the bound.
        added : int
            Number of the last gradient.
        """
        with self._lock:
            self._waiting.extend(gradients)
            self._added = added

    def put(
        self,
        layout: Layout | None,
        content: Any,
        *,
        block: bool,
        timeout: float | None,
        cursor: bytes | str | None = None,
    ) -> int:
        """Add a gradient at the end.

        Parameters
        ----------
        layout : Layout or None
            What the content is packed for; ``None`` if it is a nest.
        content : object
            The gradient.
        block : bool
            Wait for room while there is a taker.
        timeout : float or None
            Seconds to wait at most.
        cursor : bytes, str or None
            Where its giver stands.

        Returns
        -------
        int
            Its number, from 1.

        Raises
        ------
        QueueFull
            If there is no room in time, or at once if nobody makes room.
        """
        deadline = _deadline(timeout)
        with self._lock:
            while True:  # Python 3.13 leaves the lock taken if Ctrl-C meets the end of a loop with a condition
                if (full := self._what_fills_it()) is None:
                    break
                # The disk goes on by itself, also while nothing is applied.
                goes_on = self.running or len(self._waiting) < self._bound
                if not block or not goes_on:
                    hint = None if goes_on else "the updater does not run: call start()"
                    raise QueueFull(f"{full}, which is the bound", hint=hint)
                self._check()
                if not self._changed.wait(_left(deadline)):
                    raise QueueFull(f"{full} still, after {timeout} s")
                self._check()
            gradient = QueuedGradient(self._added + 1, layout, content, cursor)
            if self.recorder is not None:
                self.recorder.added(gradient)
            self._added += 1
            self._waiting.append(gradient)
            self._changed.notify_all()
            return self._added

    def take(self, ready: Callable[[], bool]) -> list[QueuedGradient]:
        """Wait for the gradients of the next update and take them. Only the taker calls this.

        Parameters
        ----------
        ready : callable
            Whether a gradient could be applied now.

        Returns
        -------
        list of QueuedGradient
            The first of the queue; empty if the taker should end.
        """
        with self._lock:
            self._taken = []
            self._changed.notify_all()
            while True:
                available = bool(self._waiting) and ready()
                last = self._stop_after
                if last is not None and not (available and self._waiting[0].number <= last):
                    return []
                if available and (len(self._waiting) >= self._step or self._joining or last is not None):
                    count = min(self._step, len(self._waiting))
                    self._taken = [self._waiting.popleft() for _ in range(count)]
                    self._changed.notify_all()
                    return self._taken
                self._changed.wait()

    def put_back(self, gradients: list[QueuedGradient]) -> None:
        """Return gradients that could not be applied yet to the head. Only the taker calls this.

        Parameters
        ----------
        gradients : list of QueuedGradient
            What `take` gave last.
        """
        with self._lock:
            self._waiting.extendleft(reversed(gradients))

    def clear(self) -> int:
        """Drop what waits.

        Returns
        -------
        int
            How many gradients that were.
        """
        with self._lock:
            if self.recorder is not None:
                self.recorder.cleared(self._waiting)
            dropped = len(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return dropped

    def join(self, timeout: float | None) -> None:
        """Wait until nothing that was added before this call waits or is being applied.

        Parameters
        ----------
        timeout : float or None
            Seconds to wait at most.

        Raises
        ------
        TimeoutError
            If that takes longer.
        StateError
            If there is no taker.
        """
        deadline = _deadline(timeout)
        with self._lock:
            last = self._added
            self._joining += 1
            self._changed.notify_all()
            try:
                while True:
                    oldest = (self._taken or self._waiting or (None,))[0]
                    if oldest is None or oldest.number > last:
                        return
                    if not self.running:
                        raise StateError(
                            f"{len(self._waiting)} gradients wait and the updater does not run", hint="call start()"
                        )
                    if not self._changed.wait(_left(deadline)):
                        raise TimeoutError(f"{len(self._waiting)} gradients still wait after {timeout} s")
                    self._check()
            finally:
                self._joining -= 1

    def open(self) -> None:
        """Announce a taker.

        Raises
        ------
        AlreadyRunning
            If there is one.
        """
        with self._lock:
            if self.running:
                raise AlreadyRunning("the updater runs already")
            self.running, self._stop_after = True, None

    def stop(self, *, drain: bool) -> None:
        """Ask the taker to end.

        Parameters
        ----------
        drain : bool
            Let it first take what waits now. A later call without this hurries it.
        """
        with self._lock:
            if self._stop_after is None or not drain:
                self._stop_after = self._added if drain else 0
            self._changed.notify_all()

    def ended(self) -> None:
        """Announce that there is no taker any more."""
        with self._lock:
            self.running, self._taken = False, []
            self._changed.notify_all()

    def wake(self) -> None:
        """Make everybody who waits look again."""
        with self._lock:
            self._changed.notify_all()

    def _what_fills_it(self) -> str | None:
        if len(self._waiting) >= self._bound:
            return f"{self._bound} gradients wait"
        if self.recorder is not None and self.recorder.behind >= self._bound:
            trouble = self.recorder.trouble
            return f"{self._bound} gradients are not on the disk" + (f" ({trouble})" if trouble else "")
        return None


def copied(gradients: Nest) -> Nest:
    """Copy a gradient that no layout is known for, and refuse what no layout would take.

    Parameters
    ----------
    gradients : nest of array_like
        As a caller gave it.

    Returns
    -------
    nest of ndarray
        The copy.

    Raises
    ------
    LayoutError
        If an array has a dtype that no parameter can have.
    """
    structure, names, leaves = nests.dissect(gradients)
    copies: list[NDArray[Any] | None] = []
    for name, leaf in zip(names, leaves, strict=True):
        array = None if leaf is None else as_array(leaf, name)
        if array is not None and carried_dtype(array.dtype) is None:
            raise LayoutError(f"gradient of {name!r} has dtype {array.dtype}", leaf=name)
        copies.append(None if array is None else np.array(array))
    return nests.build(structure, copies, gradients)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)
