"""A pull that waits for what its worker has pushed, and both in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from distgrad import Admin
from distgrad.errors import GradientRefused, StateError
from distgrad.policies import Buffered
from distgrad.requests_sent import Pending
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.broker_process import wait_until
from support.gates import Running


@pytest.fixture(params=[10, 1 << 17], ids=["sent", "shared"])
def size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def broker(size: int) -> Iterator[Broker]:
    with Broker() as broker, Worker(broker.address) as worker:
        worker.initialize({"w": np.zeros(size, np.float32)})
        yield broker


@pytest.mark.parametrize("copy", [True, False])
def test_push_pull_brings_parameters_with_the_gradient_in_them(broker: Broker, size: int, copy: bool) -> None:
    with Worker(broker.address) as worker:
        snapshot = worker.pull()
        for step in range(1, 30):
            snapshot = worker.push_pull({"w": np.ones(size, np.float32)}, out=snapshot, copy=copy, loss=0.5)
            assert snapshot.version == step
            assert worker.settled == step, "the reply tells what became of the gradient; nobody has to ask"
            assert (snapshot.parameters["w"] == -step).all()


def test_others_gradients_do_not_answer_it(broker: Broker, size: int) -> None:
    """What is newer than a worker's last version may hold only somebody else's gradient; its own pull waits."""
    with Worker(broker.address) as worker, Worker(broker.address) as other, Admin(broker.address) as admin:
        admin.stop()
        other.push({"w": np.ones(size, np.float32)})
        worker.push({"w": np.full(size, 10, np.float32)})
        with pytest.raises(TimeoutError):
            worker.pull(own=True, timeout=0.2)
        assert worker.pull().version == 0

        admin.start()

        assert (worker.pull(own=True).parameters["w"] <= -10).all()


def test_a_refused_gradient_ends_the_waiting_and_is_told_next(broker: Broker, size: int) -> None:
    with Worker(broker.address) as worker:
        snapshot = worker.push_pull({"w": np.full(size, np.nan, np.float32)})

        assert snapshot.version == 0
        with pytest.raises(GradientRefused):
            worker.flush()


def test_a_loop_that_pulls_what_it_pushed_computes_into_the_same_memory_each_time(broker: Broker, size: int) -> None:
    """Others would be written to while the pulled gradient's own is still in the processor's cache."""
    with Worker(broker.address) as worker:
        worker.pull()
        places = set()
        for _ in range(20):
            with worker.slot() as gradients:
                gradients["w"][:] = 1.0
                places.add(gradients["w"].ctypes.data)
            worker.pull(own=True)

    assert len(places) == 1


@pytest.mark.parametrize("copy", [True, False])
def test_a_loop_of_push_pull_sends_one_message_each_time(broker: Broker, size: int, copy: bool) -> None:
    """The gradient's message asks for the parameters as well, once the broker knows what is wanted."""
    with Worker(broker.address) as worker:
        asked = Counter[str]()
        client = worker._connection.puller
        transmit = client._transmit

        def count(*requests: Pending) -> None:
            asked.update(request.op for request in requests)
            transmit(*requests)

        client._transmit = count  # type: ignore[method-assign]
        snapshot = worker.push_pull({"w": np.ones(size, np.float32)}, copy=copy)
        worker.push_pull({"w": np.ones(size, np.float32)}, copy=copy)
        asked.clear()
        for step in range(3, 10):
            snapshot = worker.push_pull({"w": np.ones(size, np.float32)}, copy=copy)
            assert (snapshot.parameters["w"] == -step).all()
        assert asked.keys() <= {"share"}

        with worker.slot() as gradients:
            gradients["w"][:] = 1.0
        slot = worker.slot()
        slot.open()["w"][:] = 1.0
        snapshot = slot.push_pull(copy=copy)
        assert asked.keys() <= {"share"}
        assert (snapshot.parameters["w"] == -11).all()


def test_other_pulls_between_change_nothing(broker: Broker, size: int) -> None:
    gradient = {"w": np.ones(size, np.float32)}
    with Worker(broker.address) as worker:
        snapshot = worker.push_pull(gradient)
        for step in range(1, 8):
            assert snapshot.version == 2 * step - 1
            lent = worker.pull(snapshot.version - 1, copy=False)
            assert not worker.push_pull(gradient).is_lent
            assert lent.is_lent == (size > 1000)
            snapshot = worker.push_pull(gradient, copy=step % 2 == 0)
            with pytest.raises(TimeoutError):
                worker.pull(newer_than=snapshot, timeout=0.01)


def test_a_slot_that_is_not_open_pulls_nothing(broker: Broker) -> None:
    with Worker(broker.address) as worker:
        worker.pull()
        with pytest.raises(StateError):
            worker.slot().push_pull()
        assert worker.pull().version == 0


def test_one_message_after_others_that_waited_for_more_of_their_kind(broker: Broker, size: int) -> None:
    gradient = {"w": np.ones(size, np.float32)}
    with Worker(broker.address) as worker:
        worker.push_pull(gradient)
        for _ in range(20):
            worker.push(gradient)
        snapshot = worker.push_pull(gradient)

        assert (snapshot.parameters["w"] == -22).all()


def test_it_goes_on_when_the_parameters_are_replaced_by_others(broker: Broker, size: int) -> None:
    with Worker(broker.address) as worker, Admin(broker.address) as admin:
        for _ in range(3):
            worker.push_pull({"w": np.ones(size, np.float32)})
        admin.set_model_parameters({"v": np.zeros(7, np.float32)})
        worker.pull()
        for _ in range(3):
            snapshot = worker.push_pull({"v": np.ones(7, np.float32)})

        assert (snapshot.parameters["v"] == -3).all()


def test_a_lent_gradient_that_is_held_does_not_keep_its_worker_waiting_nor_its_arrays() -> None:
    """Regression: `push_pull` without a copy waited until its gradient was settled, for which it had to go on."""
    size = 1 << 17
    gradient = np.empty(size, np.float32)
    with Broker(policy=Buffered(2, grace=3600)) as broker, Worker(broker.address, shares_memory=False) as worker:
        snapshot = worker.initialize({"w": np.zeros(size, np.float32)})
        for step in range(1, 7):
            gradient.fill(step)
            snapshot = worker.push_pull({"w": gradient}, out=snapshot, copy=False)
            gradient.fill(np.nan)
            assert snapshot.version == step // 2

        assert (snapshot.parameters["w"] == -(1.5 + 3.5 + 5.5)).all()


def test_what_a_former_broker_has_answered_says_nothing_about_the_present_one(size: int) -> None:
    """What is lent may still be on its way to that one, and is waited for."""
    with Broker(policy=Buffered(2, grace=3600)) as broker, Worker(broker.address, shares_memory=False) as worker:
        worker.initialize({"w": np.zeros(size, np.float32)})
        number = worker.push({"w": np.ones(size, np.float32)}, copy=False)
        reclaimed = Running(lambda: worker._pusher.reclaim(number, "another"))
        wait_until(lambda: number in worker._session.awaited)
        assert worker.settled < number
        with Worker(broker.address) as other:
            other.push({"w": np.ones(size, np.float32)})
            reclaimed.result()
        assert worker.settled == number
