"""Workers on the broker's host: the same results as over sockets, whoever is killed, and nothing left behind."""

from __future__ import annotations

import os
import re
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad.codec import slot_bytes
from distgrad.errors import GradientRefused, LayoutError, StateError
from distgrad.layout import Layout
from distgrad.shared_pages import host_name
from distgrad.shared_reading import STAMP_BYTES
from distgrad_broker import Broker
from distgrad_broker.buffers import most_buffers
from distgrad_worker import Worker
from distgrad_worker.slots import MIN_SLOTS, SHARED_BYTES
from support.broker_process import wait_until
from support.durable_broker import DurableBroker
from support.processes import Process
from support.random_kills import kill_in_turns

if host_name() is None:
    pytest.skip("memory is shared on Linux only", allow_module_level=True)

WORKERS = 3
FLOATS = 3 * SHARED_BYTES // 4  # slots; and with the rest of the nest, versions that are read where they are
LAYOUT = Layout.of({"w": np.zeros(FLOATS, np.float32), "v": np.zeros(FLOATS, np.float32)})

PUSHER = f"""
import sys
import numpy as np
from distgrad_worker import Worker

control, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Worker(control, worker_id=f"worker-{{seed}}", timeout=60) as worker:
    snapshot = worker.initialize({{"w": np.zeros({FLOATS}, np.float32), "v": np.zeros({FLOATS}, np.float32)}})
    first = 0 if worker.cursor is None else int(worker.cursor) + 1
    for step in range(first, count):
        values = np.random.default_rng([seed, step]).integers(-3, 4, {FLOATS}).astype(np.float32)
        slot = worker.slot()
        with slot as gradients:
            gradients["w"][:] = values
            gradients["v"][:] = -values
            slot.cursor = str(step)
        if step % 7 == 0:
            snapshot = worker.pull(out=snapshot)
            # One version, not a mixture: what is added to one array is taken from the other.
            assert (snapshot.parameters["w"] == -snapshot.parameters["v"]).all(), "a torn version"
    worker.flush(timeout=100)
    print("flushed", worker.settled, flush=True)
"""


def exact_sum(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    total = np.zeros(FLOATS, np.int64)
    for seed in range(WORKERS):
        for step in range(count):
            total += np.random.default_rng([seed, step]).integers(-3, 4, FLOATS)
    return total


def shared_names(pid: int) -> set[str]:
    """Name the pieces of shared memory that a process has mapped."""
    return set(re.findall(r"/memfd:(distgrad-[0-9a-f]+)", Path(f"/proc/{pid}/maps").read_text()))


def shared_sizes(pid: int) -> list[int]:
    """Tell how many bytes each piece of shared memory has that a process has mapped."""
    found = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*/memfd:distgrad-", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE
    )
    return [int(end, 16) - int(begin, 16) for begin, end in found]


def kill_at_random(tmp_path: Path, count: int, kills: int) -> None:
    before = set(os.listdir("/dev/shm"))
    with ExitStack() as stack:
        broker = stack.enter_context(DurableBroker(tmp_path / "data", "--workers-silent-after", "1"))

        def begin(place: int) -> Process:
            program = (sys.executable, "-c", PUSHER)
            return stack.enter_context(Process(broker.address, place, count, program=program))

        workers = [begin(place) for place in range(WORKERS)]
        broker.wait_for_version(1)
        kill_in_turns(broker, workers, begin, 2 * kills, seed=kills)
        for worker in workers:
            worker.wait_for_line(rf"^flushed {count}$", timeout=240)
            assert worker.wait() == 0, worker.output()
        with broker.admin() as admin:
            status, parameters = admin.status(), admin.get_model_parameters()
        assert status["version"] == status["applied"] == WORKERS * count
        assert status["refused"] == {}
        np.testing.assert_array_equal(parameters["w"], -exact_sum(count))
        np.testing.assert_array_equal(parameters["v"], exact_sum(count))
        # Its own versions, and no slot of the workers', the killed ones included.
        sizes = shared_sizes(broker.process.pid)
        assert sizes.count(STAMP_BYTES + slot_bytes(LAYOUT)) == len(sizes) <= most_buffers(LAYOUT.parameter_bytes)
    assert set(os.listdir("/dev/shm")) == before


@pytest.mark.timeout(300)
def test_a_few_kills_leave_no_memory_behind_and_no_byte_wrong(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 60, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_of_each_leave_no_memory_behind_and_no_byte_wrong(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 1_500, 50)


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_results_are_the_same_bits_as_over_sockets(optimizer: str | None) -> None:
    rng = np.random.default_rng(5)
    start: Any = {"w": rng.normal(size=(300, 400)).astype(np.float32), "b": [rng.normal(size=7), np.arange(3)]}
    gradients: Any = [
        {"w": rng.normal(size=(300, 400)).astype(np.float32), "b": [rng.normal(size=7), None]} for _ in range(20)
    ]
    results = []
    for shares in (True, False):
        with Broker(optimizer=optimizer) as broker, Worker(broker.address, shares_memory=shares) as worker:
            snapshot = worker.initialize(start)
            for number, gradient in enumerate(gradients):
                if number % 2:
                    worker.push(gradient)
                else:
                    with worker.slot() as nest:
                        assert nest["b"][1] is None
                        nest["w"][:] = gradient["w"]
                        nest["b"][0][:] = gradient["b"][0]
                snapshot = worker.pull(out=snapshot)
            worker.flush()
            parameters = worker.pull(out=snapshot).parameters
            results.append([parameters["w"].tobytes(), parameters["b"][0].tobytes(), parameters["b"][1].tobytes()])
    assert results[0] == results[1]


def test_memory_is_shared_where_it_can_be_and_a_slot_is_used_again_only_when_it_is_settled() -> None:
    with Broker() as broker, Worker(broker.address) as worker:
        worker.initialize({"w": np.zeros(SHARED_BYTES, np.float32)})
        for step in range(40):
            with worker.slot() as gradients:
                gradients["w"][:] = step
        worker.flush()

        assert len(shared_names(os.getpid())) >= 3
        np.testing.assert_array_equal(worker.pull().parameters["w"], -sum(range(40)))


def test_the_first_gradient_of_a_worker_that_has_not_heard_of_the_parameters_lies_in_a_slot_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Broker() as broker, Worker(broker.address) as worker:
        worker.initialize({"w": np.zeros(SHARED_BYTES, np.float32)})
        monkeypatch.setattr(worker._connection.session, "layout", None)  # the heartbeat that tells is under way

        with worker.slot() as gradients:
            gradients["w"][:] = 1
            assert worker._connection.session.shared == {0}
        worker.flush()

        # The next heartbeat is answered by a broker that knows of it.
        wait_until(lambda: not worker._connection.session.told)
        assert worker._connection.session.shared == {0}


def test_layouts_that_change_again_and_again_leave_no_memory_behind(tmp_path: Path) -> None:
    with DurableBroker(tmp_path / "data") as broker, broker.admin() as admin:
        admin.set_model_parameters({"w": np.zeros(SHARED_BYTES, np.float32)})
        with Worker(broker.address) as worker:
            for layout in range(1, 10):
                admin.set_model_parameters({"w": np.zeros(SHARED_BYTES + layout, np.float32)})
                while admin.status()["version"] < layout:
                    with suppress(GradientRefused, LayoutError):  # of the former layout, the news is under way
                        with worker.slot() as gradients:
                            gradients["w"][:] = 1
                        worker.flush()

            # Versions, three at most, and one slot: each gradient was settled before the next.
            assert len(shared_names(broker.process.pid)) <= 4


def test_an_exception_in_the_block_pushes_nothing_and_the_slot_is_free_again() -> None:
    with Broker() as broker, Worker(broker.address) as worker:
        worker.initialize({"w": np.zeros(SHARED_BYTES, np.float32)})
        for _ in range(30):
            with pytest.raises(ZeroDivisionError), worker.slot() as gradients:
                gradients["w"][:] = 1 / 0
        slot = worker.slot()
        with slot as gradients:
            gradients["w"][:] = 1
            slot.loss, slot.examples = 0.5, 32
        worker.flush()

        assert slot.number == worker.settled == 1
        assert (worker.pull().parameters["w"] == -1).all()


def test_a_slot_that_the_broker_could_not_be_told_of_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or a broker that is away, in the middle of `share` gives the slot back, however often."""
    with Broker() as broker, Worker(broker.address) as worker:
        worker.initialize({"w": np.zeros(8 << 20, np.float32)})
        with monkeypatch.context() as patch:

            def interrupted(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr("distgrad_worker.pushing.Pusher._share", interrupted)
            for _ in range(MIN_SLOTS + 1):
                with pytest.raises(KeyboardInterrupt):
                    worker.slot().open()

        slot = worker.slot()
        slot.open()["w"][:] = 1
        assert slot.push() == 1
        with pytest.raises(StateError, match="not open"):
            slot.push()
        worker.flush()


def test_slots_within_slots_are_refused_before_they_wait_for_ever() -> None:
    with Broker() as broker, Worker(broker.address) as worker, ExitStack() as stack:
        worker.initialize({"w": np.zeros(8 << 20, np.float32)})
        for _ in range(MIN_SLOTS):
            stack.enter_context(worker.slot())

        with pytest.raises(StateError, match="with-block"):
            stack.enter_context(worker.slot())
        worker.flush()


def test_where_the_queue_has_no_room_for_one_of_each_workers_share_one_slot_and_go_on() -> None:
    floats, count = 8 << 20, 12
    with ExitStack() as stack:
        broker = stack.enter_context(Broker(queue_bytes=floats * 4 * 3 // 2))
        workers = [stack.enter_context(Worker(broker.address)) for _ in range(3)]
        for worker in workers:
            worker.initialize({"w": np.zeros(floats, np.float32)})

        def push(worker: Worker) -> None:
            for _ in range(count):
                with worker.slot() as gradients:
                    gradients["w"][:] = 1
            with worker.slot() as gradients, worker.slot() as others:  # the second one is sent
                gradients["w"][:] = others["w"][:] = 1
            worker.flush()

        threads = [threading.Thread(target=push, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert (workers[0].pull().parameters["w"] == -3 * (count + 2)).all()
        assert [len(worker._connection.session.shared) for worker in workers] == [1, 1, 1]


def test_ctrl_c_before_a_gradient_has_its_number_gives_the_only_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    floats = 1 << 20
    gradient = {"w": np.ones(floats, np.float32)}
    with Broker(queue_bytes=floats * 4 * 3 // 2) as broker, Worker(broker.address) as worker, Worker(broker.address):
        worker.initialize({"w": np.zeros(floats, np.float32)})
        for _ in range(3):
            worker.push(gradient)
        assert len(worker._connection.session.shared) == 1

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(worker._connection.session, "push", interrupted)
            with pytest.raises(KeyboardInterrupt):
                worker.push(gradient)

        assert worker.push(gradient) == 4
        worker.flush(timeout=30)


def test_small_gradients_and_workers_elsewhere_use_slots_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distgrad_worker.pushing.host_name", lambda: "another host")
    with Broker() as broker:
        for floats in (10, SHARED_BYTES):
            with Worker(broker.address) as worker:
                snapshot = worker.initialize({"w": np.zeros(floats, np.float32)})
                before = snapshot.version
                for _ in range(25):
                    with worker.slot() as gradients:
                        gradients["w"][:] = 1
                worker.flush()
                assert worker.pull().version == before + 25


def test_a_refused_gradient_in_a_slot_is_told_and_the_next_goes_on() -> None:
    with Broker() as broker, Worker(broker.address) as worker:
        worker.initialize({"w": np.zeros(SHARED_BYTES, np.float32)})
        with worker.slot() as gradients:
            gradients["w"][:] = np.nan
        with pytest.raises(GradientRefused, match="nan"):
            worker.flush()
        with worker.slot() as gradients:
            gradients["w"][:] = 1
        worker.flush()

        assert (worker.pull().parameters["w"] == -1).all()
