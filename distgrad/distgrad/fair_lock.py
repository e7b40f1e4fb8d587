"""A lock that is had in the order of asking."""

from __future__ import annotations

from collections import deque
from threading import Lock
from types import TracebackType


class FairLock:
    """A lock that is handed to whoever has waited longest.

    `threading.Lock` is not fair: a thread that releases it and wants it again at once, as an updater
    with a full queue does, mostly gets it, and a reader may wait for seconds. Not reentrant. Used as
    a context manager only.
    """

    def __init__(self) -> None:
        self._state = Lock()
        self._held = False
        self._waiting: deque[Lock] = deque()

    def __enter__(self) -> None:
        with self._state:
            if not self._held:
                self._held = True
                return
            turn = Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()  # released by the one before
        except BaseException:  # Ctrl-C in a wait: leave the line, or pass on what was just handed over
            with self._state:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    raise
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._state:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
