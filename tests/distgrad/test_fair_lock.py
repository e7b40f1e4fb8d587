"""The fair lock: who has waited longest is next."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import pytest

from distgrad.fair_lock import FairLock
from support.gates import Running


class Line(deque[Any]):
    """A waiting line that tells when somebody joins it."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = threading.Semaphore(0)

    def append(self, item: Any) -> None:
        super().append(item)
        self.joined.release()


def test_it_is_had_in_the_order_of_asking_even_if_the_holder_wants_it_again() -> None:
    lock, line, order = FairLock(), Line(), []
    lock._waiting = line

    def take(name: str) -> None:
        with lock:
            order.append(name)

    with lock:
        waiting = []
        for name in "abc":
            waiting.append(Running(lambda name=name: take(name)))  # type: ignore[misc]
            assert line.joined.acquire(timeout=20)
    take("again")
    for thread in waiting:
        thread.result()

    assert order == ["a", "b", "c", "again"]


def test_an_error_inside_releases_it() -> None:
    lock = FairLock()

    with pytest.raises(KeyError), lock:
        raise KeyError

    with lock:
        pass


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_wait_that_is_interrupted_leaves_the_line_or_passes_its_turn_on(
    handed_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a wait must leave a lock that others can have."""

    class Interrupted:
        def __init__(self) -> None:
            self.calls = 0

        def acquire(self) -> None:
            self.calls += 1
            if self.calls == 2:
                if handed_over:
                    lock.__exit__(None, None, None)
                raise KeyboardInterrupt

        def release(self) -> None:
            pass

    lock = FairLock()
    lock.__enter__()
    monkeypatch.setattr("distgrad.fair_lock.Lock", Interrupted)
    with pytest.raises(KeyboardInterrupt), lock:
        pytest.fail("it was had")
    monkeypatch.undo()
    if not handed_over:
        lock.__exit__(None, None, None)

    with lock:
        assert not lock._waiting
