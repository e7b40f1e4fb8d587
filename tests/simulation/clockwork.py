"""Time, chance and the order of events: everything that happens in a simulated world, one thing after the other."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any


class Violation(AssertionError):
    """Something happened that must never happen."""


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
        """Plan an event."""
        self._planned += 1
        heapq.heappush(self._events, (self.now + delay_s, self._planned, call, arguments))

    def step(self) -> None:
        """Let the next event happen."""
        time, _, call, arguments = heapq.heappop(self._events)
        self.now = time
        self.happened += 1
        call(*arguments)

    def note(self, who: str, what: str) -> None:
        """Write a line of the trace; callers build `what` only if there is one."""
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f} {who:<10} {what}")
