"""Tests of `distgrad_worker.patience`, alone and around a real connection."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from distgrad import Admin
from distgrad.errors import BrokerUnreachable
from distgrad.owned_sockets import Link
from distgrad_broker import Broker
from distgrad_worker import Worker, connection, patience
from distgrad_worker.patience import Patience
from support.broker_process import wait_until
from support.ports import free_port


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "TELL_S", 0.05)
    monkeypatch.setattr(connection, "LOOK_S", 0.02)


def test_each_thing_is_told_once_and_only_when_it_has_lasted(caplog: pytest.LogCaptureFixture) -> None:
    told = Patience("tcp://broker:5555", 30.0)
    for silent_s in (0.1, 2.9):
        told.note_silence(silent_s, Link.ABSENT)
        told.note_rest(silent_s, is_running=False)
    told.note_rest(9.0, is_running=True)
    assert caplog.messages == []

    for _ in range(3):
        told.note_silence(3.0, Link.ABSENT)
        told.note_rest(3.0, is_running=False)

    silence, rest = caplog.messages
    assert silence.startswith("no answer from the broker yet address=tcp://broker:5555")
    assert "nobody listens there" in silence
    assert "30" in silence
    assert "distgrad admin start" in rest


@pytest.mark.usefixtures("_soon")
def test_a_worker_that_waits_for_a_broker_tells_so(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BrokerUnreachable, match="nobody listens there"):
        Worker(f"127.0.0.1:{free_port()}", timeout=1.0)

    (line,) = caplog.messages
    assert "no answer from the broker yet" in line


@pytest.mark.usefixtures("_soon")
def test_a_flush_at_a_broker_that_applies_nothing_tells_so(caplog: pytest.LogCaptureFixture) -> None:
    with (
        Broker(parameters=np.zeros(3, np.float32)) as broker,
        Worker(broker.address) as worker,
        Admin(broker.address) as admin,
    ):
        admin.stop()
        worker.push(np.ones(3, np.float32))
        flushing = threading.Thread(target=worker.flush)
        flushing.start()
        wait_until(lambda: any("updater is stopped" in message for message in caplog.messages))
        admin.start()
        flushing.join()

    assert sum("updater is stopped" in message for message in caplog.messages) == 1
