"""The fair lock: who has waited longest is next, and Ctrl-C does no harm."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from distgrad.fair_lock import FairLock
from support.gates import Running
from support.interrupts import interrupt_often


class Watched(FairLock):  # type: ignore[misc]
    """A fair lock that tells when somebody asks for it."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_last":
            self.asked.release()


class Interrupted(FairLock):  # type: ignore[misc]
    """A fair lock whose wait is interrupted, before or after it has come to an end."""

    def __init__(self, *, has_it: bool) -> None:
        super().__init__()
        self.has_it: bool | None = has_it

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        has_it, self.has_it = self.has_it, None
        if has_it is not False:
            super().acquire(blocking, timeout)
        if has_it is not None:
            raise KeyboardInterrupt
        return True


def is_free(lock: FairLock) -> bool:
    def take() -> bool:
        with lock:
            return True

    return bool(Running(take).result())


def test_it_is_had_in_the_order_of_asking_even_if_the_holder_wants_it_again() -> None:
    lock, order = Watched(), []

    def take(name: str) -> None:
        with lock:
            order.append(name)

    with lock:
        while lock.asked.acquire(blocking=False):
            pass  # what it began with, and this thread's own
        waiting = []
        for name in "abc":
            waiting.append(Running(lambda name=name: take(name)))  # type: ignore[misc]
            assert lock.asked.acquire(timeout=20)
    take("again")
    for thread in waiting:
        thread.result()

    assert order == ["a", "b", "c", "again"]


def test_an_error_inside_releases_it() -> None:
    lock = FairLock()

    with pytest.raises(KeyError), lock:
        raise KeyError

    assert is_free(lock)


@pytest.mark.parametrize("has_it", [False, True])
def test_a_wait_that_is_interrupted_leaves_a_lock_that_others_can_have(has_it: bool) -> None:
    lock = Interrupted(has_it=has_it)

    with pytest.raises(KeyboardInterrupt), lock:
        pytest.fail("it was had")

    assert is_free(lock)


def test_whenever_it_is_interrupted_others_can_have_it() -> None:
    lock, is_over = FairLock(), threading.Event()

    def contend() -> None:
        while not is_over.is_set():
            with lock:
                pass

    def use() -> None:
        with lock:
            pass

    other = Running(contend)
    try:
        interrupt_often(use, times=300, after=lambda: is_free(lock))
    finally:
        is_over.set()
        other.result()
