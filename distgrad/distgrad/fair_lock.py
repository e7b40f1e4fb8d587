"""A lock that is had in the order of asking, and that Ctrl-C does not leave taken."""

from __future__ import annotations

from _thread import RLock
from threading import Lock
from typing import Literal


class FairLock(RLock):  # type: ignore[misc]  # only the stubs call it final
    """A lock that is had by whoever has waited longest.

    `threading.Lock` is not fair: a thread that releases it and wants it again at once, as an updater with a full queue
    does, mostly gets it, and a reader may wait for seconds. Here only one thread waits for the lock itself, and each
    other one for the one before it. Used as a context manager only, and not twice by one thread.

    Python code can be interrupted before its first step. So what must not be left out is done by with-statements over
    locks written in C, and leaving this one is the base class's affair.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state = Lock()
        # Of the thread that asked last: taken until it has the lock, or has given up.
        self._last = Lock()

    def __enter__(self) -> Literal[True]:  # type: ignore[override]
        turn = Lock()
        try:
            with turn:
                with self._state:
                    before, self._last = self._last, turn
                with before:
                    pass
                self.acquire()
        except BaseException:  # Ctrl-C
            if self._is_owned():  # type: ignore[attr-defined]  # what conditions ask as well
                self.release()
            raise
        return True
