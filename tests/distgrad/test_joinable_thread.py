"""A thread can be joined, given up on, and joined again, whatever ended the wait."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from distgrad.joinable_thread import JoinableThread
from support.gates import WAIT_S, Gate, interrupt


def test_a_join_that_was_interrupted_can_be_repeated() -> None:
    gate = Gate(lambda: None)
    thread = JoinableThread(gate, "distgrad-test")
    thread.start()

    interrupt(thread.join)

    assert thread.is_alive()
    thread.join(0.0)
    assert thread.is_alive()
    gate.open()
    thread.join()
    assert not thread.is_alive()


def test_a_thread_that_fails_has_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    thread = JoinableThread(lambda: [][0], "distgrad-test")
    thread.start()

    thread.join()

    assert not thread.is_alive()


def test_a_join_that_makes_no_sense_is_refused_as_ever() -> None:
    refused: list[str] = []

    def join_oneself() -> None:
        try:
            thread.join()
        except RuntimeError as error:
            refused.append(str(error))

    thread = JoinableThread(join_oneself, "distgrad-test")
    with pytest.raises(RuntimeError, match="before it is started"):
        thread.join()
    thread.start()
    thread.join()

    assert refused == ["cannot join current thread"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_child_of_fork_it_has_ended() -> None:
    gate = Gate(lambda: None)
    thread = JoinableThread(gate, "distgrad-test")
    thread.start()

    child = os.fork()
    if child == 0:
        signal.alarm(int(WAIT_S))
        try:
            thread.join()
        finally:
            os._exit(thread.is_alive())

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open()
    thread.join()
