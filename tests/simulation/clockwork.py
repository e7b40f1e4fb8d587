"""Time, chance and the order of events: everything that happens in a simulated world, one thing after the other."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from random import Random
from typing import Any


class Violation(AssertionError):
    """Something happened that must never happen."""


class Alarm:
    """Calls when its time has come: the earliest that was asked for since it called last.

    Times in the queue of events cannot be taken back, so one that is still to come is used again for a later one: where
    every turn of a process sets an alarm that hardly ever calls, the queue would be full of them otherwise.

    Parameters
    ----------
    clockwork : Clockwork
        Whose time it goes by.
    call : callable
        Called without arguments.
    """

    __slots__ = ("_at", "_call", "_clockwork", "_planned")

    def __init__(self, clockwork: Clockwork, call: Callable[[], None]) -> None:
        self._clockwork = clockwork
        self._call = call
        self._at = math.inf
        # Times at which it has an event in the queue, the next one last.
        self._planned: list[float] = []

    def is_before(self, at: float) -> bool:
        """Tell whether it will call by a time anyway."""
        return self._at <= at

    def set(self, at: float) -> None:
        """Call at a time, unless it calls before."""
        if at < self._at:
            self._at = at
            planned = self._planned
            if not planned or at < planned[-1]:
                self._plan(at)

    def _look(self) -> None:
        planned, at = self._planned, self._at
        planned.pop()
        if at <= self._clockwork.now:
            self._at = math.inf
            self._call()
        elif at < math.inf and (not planned or at < planned[-1]):
            self._plan(at)

    def _plan(self, at: float) -> None:
        self._planned.append(at)
        self._clockwork.at_time(at, self._look)


class Clockwork:
    """A queue of events, by time; those of the same time happen in the order in which they were planned.

    Attributes
    ----------
    now : float
        True time, in seconds. What a process takes for the time may be ahead of it.
    random : Random
        The only source of chance.
    happened : int
        How many events there were.
    trace : list of str or None
        A line for each thing that happened, if they are wanted.
    """

    def __init__(self, seed: int, *, traces: bool) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.happened = 0
        self.trace: list[str] | None = [] if traces else None
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._planned = 0

    def at(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Plan an event for some seconds from now."""
        self._planned += 1
        heapq.heappush(self._events, (self.now + delay_s, self._planned, call, arguments))

    def at_time(self, time: float, call: Callable[[], None]) -> None:
        """Plan an event for a time."""
        self._planned += 1
        heapq.heappush(self._events, (time, self._planned, call, ()))

    def steps(self, count: int) -> None:
        """Let the next events happen."""
        events, pop = self._events, heapq.heappop
        for _ in range(count):
            self.now, _, call, arguments = pop(events)
            call(*arguments)
        self.happened += count

    def note(self, who: str, what: str) -> None:
        """Write a line of the trace; callers build `what` only if there is one."""
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f} {who:<10} {what}")
