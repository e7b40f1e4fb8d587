"""Ctrl-C at random moments of a loop, as somebody in a notebook presses it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from random import Random


def interrupt_often(step: Callable[[], object], *, times: int, seed: int = 1, after: Callable[[], object]) -> None:
    """Run something over and over, and interrupt it: after each time, look what is left.

    Parameters
    ----------
    step : callable
        What is repeated; on the main thread.
    times : int
        How often it is interrupted.
    seed : int
        Decides the moments, as far as the machine lets it.
    after : callable
        Asked after each interrupt; raises if something is broken.
    """
    random, came = Random(seed), False

    def interrupt(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(times):
            came = False
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0003, 0.004))
                # It may come late, on a busy machine. Where a destructor was interrupted, Python only says so.
                while True:  # Python 3.13 looks for no handler at the end of a loop with a condition
                    step()
                    if came:
                        break
            except KeyboardInterrupt:
                pass
            # Not while the exception is there: its traceback keeps what was on its way alive.
            after()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
