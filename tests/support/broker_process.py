"""A real broker in a process of its own, for tests that look at it from outside only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from support.processes import Process


@contextmanager
def broker_process(*options: str, control: str = "tcp://127.0.0.1:0") -> Iterator[tuple[str, Process]]:
    """Run ``distgrad broker`` on free ports of loopback; give its control address and the process."""
    addresses = ("--control", control, "--gradients", "tcp://127.0.0.1:0")
    with Process("broker", *addresses, "--log-level", "warning", *options) as process:
        yield process.wait_for_line(r"control=(\S+)")[1], process
        process.terminate()
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    """Ask until it is so; the suite's limit for one test ends a wait in vain."""
    while not condition():
        threading.Event().wait(0.005)
