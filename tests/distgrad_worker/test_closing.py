"""The end of a worker: whatever else happens at the time, nothing that has a number is dropped without a word."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import zmq

from distgrad import Admin
from distgrad.errors import StateError
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.broker_process import wait_until
from support.gates import Gate, Running
from support.processes import Process

START = {"w": np.zeros(50_000, np.float32)}
ONES = {"w": np.ones(50_000, np.float32)}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker(parameters=START, queue_bytes=4 * 200_000) as running:
        yield running


@pytest.fixture
def admin(broker: Broker) -> Iterator[Admin]:
    with Admin(broker.address) as connected:
        yield connected


def test_a_slot_that_is_pushed_after_close_says_so(broker: Broker, admin: Admin) -> None:
    worker = Worker(broker.address)
    slot = worker.slot()
    slot.open()["w"][:] = 1
    worker.close()

    with pytest.raises(StateError, match="closed"):
        slot.push()

    assert slot.number is None
    assert admin.status()["version"] == 0


@pytest.mark.parametrize("shares", [False, True])
def test_a_push_that_close_overtakes_says_so(shares: bool, broker: Broker, admin: Admin) -> None:
    worker = Worker(broker.address, shares_memory=shares)
    gate = worker._pusher._queue = Gate(worker._pusher._queue)  # type: ignore[method-assign]
    pushing = Running(lambda: worker.push(ONES))
    gate.wait_for_arrival()
    worker.close()
    gate.open()

    with pytest.raises(StateError, match="closed"):
        pushing.result()
    assert admin.status()["version"] == 0


def test_a_push_that_waits_for_a_grant_ends_when_the_worker_is_closed(broker: Broker, admin: Admin) -> None:
    admin.stop()
    worker = Worker(broker.address, timeout=3600)
    numbers: list[int] = []

    def push() -> None:
        while True:
            numbers.append(worker.push(ONES))

    pushing = Running(push)
    wait_until(lambda: bool(worker._session.want or worker._session.awaited))
    closing = Running(worker.close)

    with pytest.raises(StateError, match="closed"):
        pushing.result()
    admin.start()
    closing.result()
    assert admin.status()["version"] == len(numbers) > 0


def test_a_flush_that_waits_ends_when_the_worker_is_closed(broker: Broker, admin: Admin) -> None:
    admin.stop()
    worker = Worker(broker.address, timeout=3600)
    worker.push(ONES)
    flushing = Running(worker.flush)
    wait_until(lambda: bool(worker._session.awaited))

    with pytest.raises(TimeoutError, match="1 gradient"):
        worker.close(timeout=0.1)

    with pytest.raises(StateError, match="closed"):
        flushing.result()


def test_several_threads_may_close_a_worker(broker: Broker, admin: Admin) -> None:
    worker = Worker(broker.address)
    worker.push(ONES)

    for closing in [Running(worker.close) for _ in range(8)]:
        closing.result()

    assert admin.status()["version"] == 1
    assert admin.workers() == []


def test_who_waits_for_another_thread_to_close_can_give_up(broker: Broker, admin: Admin) -> None:
    admin.stop()
    worker = Worker(broker.address)
    worker.push(ONES)
    closing = Running(worker.close)
    wait_until(lambda: worker._connection.is_closing)

    with pytest.raises(TimeoutError, match="another thread"):
        worker.close(timeout=0.01)

    admin.start()
    closing.result()


def test_a_worker_that_nobody_has_any_more_delivers_and_leaves(broker: Broker, admin: Admin) -> None:
    n_threads = threading.active_count()
    worker = Worker(broker.address)
    for _ in range(20):
        worker.push(ONES)

    del worker
    gc.collect()

    wait_until(lambda: admin.workers() == [])
    assert admin.status()["version"] == 20
    wait_until(lambda: threading.active_count() == n_threads)


def test_a_program_that_has_lost_its_worker_has_delivered_what_it_pushed(broker: Broker, admin: Admin) -> None:
    program = """
import sys
import numpy as np
from distgrad_worker import Worker

def train():
    worker = Worker(sys.argv[1])
    for _ in range(300):
        worker.push({"w": np.ones(50_000, np.float32)})

train()
"""
    with Process(broker.address, program=(sys.executable, "-c", program)) as process:
        assert process.wait() == 0, process.output()

    assert admin.status()["version"] == 300
    assert admin.workers() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_slot_cannot_be_pushed_by_a_child_of_fork(broker: Broker, admin: Admin) -> None:
    program = """
import os, sys
from distgrad.errors import Forked
from distgrad_worker import Worker

with Worker(sys.argv[1]) as worker:
    try:
        with worker.slot() as gradients:
            gradients["w"][:] = 1
            child = os.fork()
    except Forked as error:
        print("child:", error)
        os._exit(7)
    print("child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with Process(broker.address, program=(sys.executable, "-c", program)) as process:
        assert process.wait() == 0, process.output()

    assert "child ended with 7" in process.lines
    assert admin.status()["version"] == 1


def test_workers_that_share_a_context_leave_it_open_for_the_others_and_for_its_owner(
    broker: Broker, admin: Admin
) -> None:
    with zmq.Context() as context:
        before = threading.active_count(), len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
        workers = [Worker(broker.address, context=context) for _ in range(5)]
        if sys.platform == "linux":
            # Of each its lease's thread, and two of ZeroMQ's in all.
            assert len(os.listdir("/proc/self/task")) - before[1] <= 5 + 2
        for count, worker in enumerate(workers, start=1):
            worker.push(ONES)
            worker.close()
            assert not context.closed
            assert admin.status()["version"] == count
        assert threading.active_count() == before[0]
    assert (admin.get_model_parameters()["w"] == -5).all()
