"""Places where a test holds another thread, and lets it go."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

WAIT_S = 20.0
"""How long anything may take that should happen at once, on the slowest machine."""


class Gate:
    """Stands in front of a function: who calls it waits until the gate is opened.

    Parameters
    ----------
    function : callable
        What runs behind the gate.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._arrived = threading.Semaphore(0)
        self._tickets = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Wait, then call the function."""
        self._arrived.release()
        if not self._open.is_set() and not self._tickets.acquire(timeout=WAIT_S):
            raise TimeoutError("nobody opened the gate")
        return self._function(*args, **kwargs)

    def wait_for_arrival(self) -> None:
        """Wait until one more caller stands at the gate."""
        if not self._arrived.acquire(timeout=WAIT_S):
            raise TimeoutError("nobody came to the gate")

    def let_one_pass(self) -> None:
        """Open the gate for one caller."""
        self._tickets.release()

    def open(self) -> None:
        """Open the gate for good."""
        self._open.set()
        self._tickets.release()


class Running(threading.Thread):
    """A function on a thread of its own, whose result or error is asked for.

    Parameters
    ----------
    function : callable
        What to run; it starts at once.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Call the function."""
        try:
            self._result = self._function()
        except BaseException as error:  # handed to whoever asks
            self._error = error

    def result(self) -> Any:
        """Wait for the end, and return or raise what the function did."""
        self.join(WAIT_S)
        if self.is_alive():
            raise TimeoutError("it still runs")
        if self._error is not None:
            raise self._error
        return self._result


def interrupt(call: Callable[[], Any], has_begun: Callable[[], bool] = lambda: True) -> None:
    """Press Ctrl-C in a call, on the main thread, that a gate keeps from ending.

    Parameters
    ----------
    call : callable
        What is interrupted.
    has_begun : callable
        Whether it is where it is to be interrupted.
    """
    main, called, pressed = threading.main_thread().ident, threading.Event(), threading.Event()
    assert main is not None

    def on_signal(*_: object) -> None:
        if not pressed.is_set():
            pressed.set()
            raise KeyboardInterrupt

    def press() -> None:
        called.wait()
        while not has_begun():
            pass
        # A signal that comes just before the main thread sleeps in a lock does not wake it: the next one does.
        while not pressed.wait(0.01):
            signal.pthread_kill(main, signal.SIGINT)

    def call_it() -> None:
        called.set()
        call()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        pressing = Running(press)
        with pytest.raises(KeyboardInterrupt):
            call_it()
        pressing.result()
    finally:
        signal.signal(signal.SIGINT, before)
