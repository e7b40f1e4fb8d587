"""Workers that compute on the broker's own memory: it stays as it is for a while, or they are told that it did not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from distgrad import Admin
from distgrad.client import ControlClient
from distgrad.errors import SnapshotRevoked
from distgrad.shared_pages import host_name
from distgrad_broker import Broker
from distgrad_broker.buffers import most_buffers
from distgrad_worker import Snapshot, Worker

if host_name() is None:
    pytest.skip("memory is shared on Linux only", allow_module_level=True)

SIZE = 1 << 17
MAX_HELD = most_buffers(4 * SIZE) - 1
GRADIENT = {"w": np.ones(SIZE, np.float32)}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as broker, Worker(broker.address) as worker:
        worker.initialize({"w": np.zeros(SIZE, np.float32)})
        yield broker


def values(snapshot: Snapshot) -> set[float]:
    array: Any = snapshot.parameters["w"]
    return set(array.tolist())


def step(worker: Worker, times: int = 1) -> None:
    for _ in range(times):
        worker.push(GRADIENT)
    worker.flush()


def test_a_lent_version_stays_as_it_is_while_others_push_and_cannot_be_written_to(broker: Broker) -> None:
    with Worker(broker.address) as worker, Worker(broker.address) as other:
        snapshot = worker.pull(copy=False)
        assert snapshot.is_lent
        array = snapshot.parameters["w"]
        step(other, 10)

        assert values(snapshot) == {0.0}
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        assert worker.push(GRADIENT) == 1
        worker.flush()
        assert values(worker.pull(copy=False)) == {-11.0}


def test_a_lease_ends_with_the_workers_next_gradient(broker: Broker) -> None:
    with Worker(broker.address) as worker, Worker(broker.address) as other, Admin(broker.address) as admin:
        worker.pull(copy=False)
        step(other)
        assert admin.status()["snapshots_held"] == 1

        step(worker)

        assert admin.status()["snapshots_held"] == 0


def test_who_would_be_one_reader_too_many_gets_a_copy_and_does_not_wait(broker: Broker) -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(broker.address)) for _ in range(MAX_HELD + 2)]
        pusher = stack.enter_context(Worker(broker.address))
        snapshots = []
        for worker in workers:
            snapshots.append(worker.pull(copy=False))
            step(pusher)
        step(pusher, 5)

        assert [snapshot.is_lent for snapshot in snapshots] == [True] * MAX_HELD + [False] * 2
        for version, snapshot in enumerate(snapshots):
            assert values(snapshot) == {-float(version)}


def test_a_gradient_of_a_version_that_was_taken_back_is_not_pushed(broker: Broker) -> None:
    with Worker(broker.address) as worker, Worker(broker.address) as other, Admin(broker.address) as admin:
        client = ControlClient(broker.address)
        lose_lease(worker, client, other)

        with pytest.raises(SnapshotRevoked, match="not pushed"):
            worker.push(GRADIENT)
        lose_lease(worker, client, other)
        with pytest.raises(SnapshotRevoked, match="not pushed"), worker.slot() as gradients:
            gradients["w"][:] = 1
        client.close()
        worker.pull()
        step(worker)
        assert admin.status()["applied"] == 2 * 5 + 1


def lose_lease(worker: Worker, client: ControlClient, other: Worker) -> None:
    worker.pull(copy=False)
    step(other)
    # Whoever asks in its name gets its lease, as if it had asked again and not heard of it.
    client.request("get", worker=worker.worker_id, host=host_name(), lease=True)
    step(other, 4)
