"""A real broker in a process of its own, for tests that look at it from outside only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distgrad.admin import Admin
from distgrad_worker import Worker
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


@contextmanager
def cleared(address: str) -> Iterator[Admin]:
    """Connect to a broker that several tests share, and make it as if it were new, but for its counters."""
    with Admin(address, timeout=20) as admin:
        admin.clear_gradients()
        admin.set_model_parameters(None)
        admin.set_parameters("descent")
        admin.start()
        yield admin


def queue_up(admin: Admin, worker: Worker, *gradients: Any) -> None:
    """Push, and wait until the broker has all of it in its queue."""
    before = admin.status()["queued"]
    for gradient in gradients:
        worker.push(gradient)
    wait_until(lambda: bool(admin.status()["queued"] == before + len(gradients)))
