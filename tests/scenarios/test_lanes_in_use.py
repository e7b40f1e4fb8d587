"""Gradients that ask take a lane on the broker's host: the same results, whatever becomes of it."""

from __future__ import annotations

import random
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import Admin, lanes
from distgrad import client as client_module
from distgrad.client import ControlClient
from distgrad.lanes import Lane
from distgrad.requests_sent import Pending
from distgrad.wire import Gradient, pack
from distgrad_broker import Broker, local_lanes
from distgrad_broker.events import MessageRejected
from distgrad_broker.local_lanes import LocalLanes
from distgrad_worker import Worker
from distgrad_worker.headers import Header
from distgrad_worker.session import OPEN
from support.broker_process import wait_until
from support.durable_broker import DurableBroker
from support.key_folders import make_key_folder
from support.processes import Process
from support.random_kills import kill_in_turns

if sys.platform != "linux":
    pytest.skip("lanes are on Linux only", allow_module_level=True)

SIZES = pytest.mark.parametrize("size", [10, 10_000, 1 << 17], ids=["in the header", "behind it", "in a slot"])


class Sent:
    """How many messages the two sides have sent by lanes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        send = Lane.send

        def count(lane: Lane, frames: Sequence[Any]) -> bool:
            is_sent = send(lane, frames)
            self.count += is_sent
            return is_sent

        monkeypatch.setattr(Lane, "send", count)


@SIZES
def test_both_ways_of_a_loop_go_by_the_lane(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    sent = Sent(monkeypatch)
    gradient = np.ones(size, np.float32)
    with Broker(parameters=np.zeros(size, np.float32)) as broker, Worker(broker.address) as worker:
        for _ in range(3):  # the first `get`, and the slot, are asked for
            worker.push_pull(gradient)
        before = sent.count
        for step in range(4, 20):
            assert (worker.push_pull(gradient).parameters == -step).all()

        # The broker may not have counted its last one yet.
        assert sent.count - before >= 2 * 16 - 1


def test_keys_are_no_hindrance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = Sent(monkeypatch)
    keys = make_key_folder(tmp_path)
    with (
        Broker(parameters=np.zeros(9, np.float32), keys=keys.folder) as broker,
        Worker(broker.address, keys=keys.worker) as worker,
        Admin(broker.address, keys=keys.admin) as admin,
    ):
        for step in range(1, 9):
            assert worker.push_pull(np.ones(9, np.float32)).version == step
        assert admin.status()["dropped"] == {}

    assert sent.count > 8


def test_a_worker_that_shares_no_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(monkeypatch)
    with (
        Broker(parameters=np.zeros(9, np.float32)) as broker,
        Worker(broker.address, shares_memory=False) as worker,
    ):
        for step in range(1, 9):
            assert worker.push_pull(np.ones(9, np.float32)).version == step

    assert sent.count == 0


@SIZES
def test_a_lane_that_takes_nothing_changes_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    chance = random.Random(size)
    send = Lane.send
    monkeypatch.setattr(Lane, "send", lambda lane, frames: chance.random() < 0.5 and send(lane, frames))
    with Broker(parameters=np.zeros(size, np.float32)) as broker, Worker(broker.address) as worker:
        for step in range(1, 60):
            assert (worker.push_pull(np.ones(size, np.float32)).parameters == -step).all()
            if step % 9 == 0:
                monkeypatch.undo()


@SIZES
def test_what_is_lost_with_a_lane_is_sent_again(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    take, lost = LocalLanes._take, iter((3, 5, 6))
    next_lost, count = next(lost), 0

    def lose(lanes: LocalLanes, end: Any, frames: Sequence[memoryview]) -> Sequence[Gradient] | MessageRejected:
        nonlocal next_lost, count
        count += bool(end.session)
        if count == next_lost:
            count, next_lost = 0, next(lost, -1)
            end.lane.end()
            return ()
        return take(lanes, end, frames)

    monkeypatch.setattr(LocalLanes, "_take", lose)
    with Broker(parameters=np.zeros(size, np.float32)) as broker, Worker(broker.address, timeout=20) as worker:
        for step in range(1, 30):
            assert (worker.push_pull(np.ones(size, np.float32)).parameters == -step).all()
    assert next_lost != 3


def test_a_lane_that_is_gone_is_found_when_something_is_to_be_sent() -> None:
    with Broker(parameters=np.zeros(9, np.float32)) as broker, Worker(broker.address) as worker:
        for step in range(1, 20):
            assert worker.push_pull(np.ones(9, np.float32)).version == step
            lane = worker._connection.driver.sender.lane
            if step % 6 == 0 and lane is not None:
                lane._peer.shutdown(socket.SHUT_WR)


def test_a_new_lane_is_not_taken_for_the_one_before_it() -> None:
    with Broker(parameters=np.zeros(9, np.float32)) as broker, Worker(broker.address) as worker:
        connection = worker._connection
        sender, session = connection.driver.sender, connection.session
        for step in range(1, 10):
            assert worker.push_pull(np.ones(9, np.float32)).version == step
            latter = lanes.connect(session.lane)
            assert latter is not None
            assert latter.send([pack({"v": 1, "worker": session.worker_id, "session": session.name})])
            with connection.lock:
                former, sender.lane = sender.lane, latter
                assert former is not None
                former.end()
            # As whoever waits at the former one finds out.
            connection.driver.lane_ended(former)
            assert sender.lane is latter


def test_a_gradient_that_waits_for_a_new_attempt_is_answered_where_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the PUSH connection was lost: the former lane has ended when the gradient leaves at last."""
    monkeypatch.setattr(client_module, "FIRST_RETRY_S", 3600.0)
    with Broker(parameters=np.zeros(9, np.float32)) as broker, Worker(broker.address, timeout=5) as worker:
        connection = worker._connection
        for step in range(1, 20):
            if step % 2:
                with connection.lock:
                    connection.session._begin_attempt()
                    connection.driver.wake()
            assert worker.push_pull(np.ones(9, np.float32)).version == step


def test_a_broker_without_a_place_for_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each gradient would begin a new attempt, for the lane that the one before it has opened in vain."""
    monkeypatch.setattr(local_lanes, "MAX_LANES", 0)
    with Broker(parameters=np.zeros(9, np.float32)) as broker, Worker(broker.address) as worker:
        for step in range(1, 20):
            assert worker.push_pull(np.ones(9, np.float32)).version == step
            wait_until(lambda: worker._connection.session.phase == OPEN)
        assert worker._connection.session.attempt <= 2


def test_a_reply_that_nothing_has_asked_for_is_soon_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    transmit = ControlClient._transmit

    def note(client: ControlClient, *requests: Pending) -> None:
        asked.extend(request.op for request in requests)
        transmit(client, *requests)

    with Broker(parameters=np.zeros(9, np.float32)) as broker, Worker(broker.address) as worker:
        for _ in range(2):
            worker.push_pull(np.ones(9, np.float32))
        monkeypatch.setattr(Header, "frames", _without_asks(Header.frames))
        monkeypatch.setattr(ControlClient, "_transmit", note)
        socket_before = worker._connection.puller._socket
        assert worker.push_pull(np.ones(9, np.float32)).version == 3
        assert asked == ["get"]
        assert worker._connection.puller._socket is socket_before


def _without_asks(frames: Any) -> Any:
    return lambda header, number, details, parts, _asks=None: frames(header, number, details, parts)


def test_pushes_beside_it_come_in_order() -> None:
    """A gradient that goes through ZeroMQ behind one that took the lane is not taken for one after a gap."""
    with Broker(parameters=np.zeros(9, np.float32)) as broker, Worker(broker.address) as worker:

        def push() -> None:
            for _ in range(2_000):
                worker.push(np.ones(9, np.float32))

        beside = threading.Thread(target=push)
        beside.start()
        asked = 0
        while beside.is_alive():
            worker.push_pull(np.ones(9, np.float32))
            asked += 1
        beside.join()
        worker.flush()
        with Admin(broker.address) as admin:
            status = admin.status()
        assert status["version"] == asked + 2_000
        assert status["dropped"] == {}


PUSHER = """
import sys
import numpy as np
from distgrad_worker import Worker

control, seed, count, size = sys.argv[1], *map(int, sys.argv[2:])
with Worker(control, worker_id=f"worker-{seed}", timeout=60) as worker:
    worker.initialize(np.zeros(size, np.float32))
    first = 0 if worker.cursor is None else int(worker.cursor) + 1
    for step in range(first, count):
        value = (7 * step + seed) % 5 - 2
        snapshot = worker.push_pull(np.full(size, value, np.float32), cursor=str(step))
        # One version, not a mixture.
        assert (snapshot.parameters == snapshot.parameters[0]).all(), "a torn version"
    worker.flush(timeout=100)
    print("flushed", worker.settled, flush=True)
"""


def kill_at_random(folder: Path, size: int, count: int, kills: int) -> None:
    with ExitStack() as stack:
        broker = stack.enter_context(DurableBroker(folder / "data", "--workers-silent-after", "1"))

        def begin(seed: int) -> Process:
            return stack.enter_context(
                Process(broker.address, seed, count, size, program=(sys.executable, "-c", PUSHER))
            )

        workers = [begin(seed) for seed in range(2)]
        broker.wait_for_version(1)
        kill_in_turns(broker, workers, begin, kills, seed=kills)
        for worker in workers:
            worker.wait_for_line(rf"^flushed {count}$", timeout=240)
            assert worker.wait() == 0, worker.output()
        with broker.admin() as admin:
            status, parameters = admin.status(), admin.get_model_parameters()
        total = sum((7 * step + seed) % 5 - 2 for seed in range(2) for step in range(count))
        assert status["version"] == status["applied"] == 2 * count
        assert (parameters == -total).all()


@SIZES
@pytest.mark.timeout(300)
def test_a_few_kills_lose_nothing_and_double_nothing(tmp_path: Path, size: int) -> None:
    kill_at_random(tmp_path, size, 300, 4)


@pytest.mark.slow
@SIZES
@pytest.mark.timeout(1800)
def test_sixty_kills_lose_nothing_and_double_nothing(tmp_path: Path, size: int) -> None:
    kill_at_random(tmp_path, size, 6_000, 60)
