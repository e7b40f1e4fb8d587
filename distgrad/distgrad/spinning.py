"""Waiting awake, as long as waits are short and nobody else wants the processor.

To wake a thread that sleeps takes two processors, the kernel and in a virtual machine the host: about 50 µs, which a
round trip of a small gradient needs twice, and is half its time. So who has waited briefly several times looks again
and again before it goes to sleep, and between two looks it gives way to whoever else wants to run. If that took long,
other programs compute here; then it sleeps at once for a while, because who slept is let in earlier than who gave way.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TypeVar

# A wait that is shorter counts as short, and nobody stays awake for longer.
SPIN_S = 0.001
# As many short waits in a row make one expect another: who waits briefly and long by turns goes to sleep.
MIN_SHORT_WAITS = 3
# To look and give way takes three microseconds if nobody is there; if it took longer, somebody had the processor, or
# the interpreter, and may be about to want it again.
ALONE_S = 2e-5
# A worker or broker on the same processor lets go of it in less than this. Who computes does not: then there is a
# pause, in which waits sleep at once, of as many times what was lost. If the next loss comes soon after it the pause
# grows: one that was an accident costs little, and beside programs that compute a five-hundredth of the time is lost.
# (Who was stopped has lost more than anybody's turn, and not by giving way.)
OTHERS_S, MAX_LOST_S, SOON_S = 0.001, 0.02, 0.25
MIN_PAUSE, PAUSE_GROWTH, MAX_PAUSE = 8, 4, 512

Ready = TypeVar("Ready")


def _do_nothing() -> None:
    pass


# Windows has no such call, and no lanes.
_give_way: Callable[[], None] = getattr(os, "sched_yield", _do_nothing)


class Spinner:
    """Polls for one waiting thread.

    Parameters
    ----------
    clock, give_way : callable
        For tests: returns a time in seconds; lets others run.
    """

    __slots__ = ("_clock", "_give_way", "_n_short", "_pause", "_pauses_until")

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, give_way: Callable[[], None] = _give_way
    ) -> None:
        self._clock = clock
        self._give_way = give_way
        self._n_short = 0
        self._pauses_until, self._pause = -math.inf, MIN_PAUSE

    def poll(self, poll: Callable[[int], Ready], timeout_ms: int) -> Ready:
        """Poll, at first without sleeping if that is promising.

        Parameters
        ----------
        poll : callable
            Takes a time in milliseconds for which it may sleep; what it returns is true if something is ready.
        timeout_ms : int, milliseconds, >= 0
            How long to wait in all.

        Returns
        -------
        object
            What `poll` returned last.
        """
        if timeout_ms == 0:
            return poll(0)
        clock = self._clock
        began = now = clock()
        if self._n_short >= MIN_SHORT_WAITS and began >= self._pauses_until:
            while now - began < SPIN_S:
                ready = poll(0)
                if ready:
                    return ready
                self._give_way()
                before, now = now, clock()
                if now - before > ALONE_S:
                    if now - before > OTHERS_S:
                        self._sleep_at_once(now, now - before)
                    break
        ready = poll(max(0, timeout_ms - int(1000 * (now - began))))
        self._n_short = self._n_short + 1 if clock() - began < SPIN_S else 0
        return ready

    def _sleep_at_once(self, now: float, lost_s: float) -> None:
        is_soon = now - self._pauses_until < SOON_S
        self._pause = min(PAUSE_GROWTH * self._pause, MAX_PAUSE) if is_soon else MIN_PAUSE
        self._pauses_until = now + self._pause * min(lost_s, MAX_LOST_S)
