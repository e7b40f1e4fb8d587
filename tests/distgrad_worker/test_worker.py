"""Tests of `distgrad_worker.worker`, against a broker in this process."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import Admin
from distgrad.errors import ConfigError, GradientRefused, LayoutError, StateError
from distgrad.wire import State
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.key_folders import make_key_folder

START = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float64)}
ONES = {"w": np.ones((2, 3)), "b": np.ones(2)}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker(parameters=START) as running:
        yield running


@pytest.fixture
def worker(broker: Broker) -> Iterator[Worker]:
    with Worker(broker.address, worker_id="w", timeout=20) as connected:
        yield connected


@pytest.fixture
def admin(broker: Broker) -> Iterator[Admin]:
    with Admin(broker.address) as connected:
        yield connected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"worker_id": ""}, "1 to 128"),
        ({"worker_id": 3}, "got 3"),
        ({"worker_id": "x" * 129}, "1 to 128"),
        ({"worker_id": "a\nb"}, "printable"),
        ({"window_bytes": 0}, "window_bytes"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"gradients": "udp://x"}, "tcp"),
        ({"gradients": "host:port"}, "port"),
    ],
)
def test_impossible_arguments_are_refused_at_once(broker: Broker, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Worker(broker.address, **arguments)


def test_an_address_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="address"):
        Worker("not an address")


def test_made_up_ids_differ_and_are_forgotten_after_close(broker: Broker, admin: Admin) -> None:
    with Worker(broker.address) as first, Worker(broker.address) as second:
        assert first.worker_id != second.worker_id
        assert len(admin.workers()) == 2
    assert admin.workers() == []


def test_numbers_rise_from_one_and_settled_follows(worker: Worker) -> None:
    assert worker.settled == 0

    assert [worker.push(ONES) for _ in range(3)] == [1, 2, 3]
    worker.flush()

    assert worker.settled == 3
    assert worker.pull().version == 3


def test_a_pull_gives_arrays_of_the_callers_own(worker: Worker) -> None:
    first = worker.pull()
    first.parameters["w"][:] = 9

    assert worker.pull().parameters["w"].max() == 0


def test_out_is_reused(worker: Worker) -> None:
    first = worker.pull()
    array = first.parameters["w"]
    worker.push(ONES)
    worker.flush()

    second = worker.pull(out=first)

    assert second.version == 1
    assert np.shares_memory(second.parameters["w"], array)
    assert array.tolist() == [[-1] * 3] * 2


def test_out_of_another_layout_is_not_written_to(worker: Worker, admin: Admin) -> None:
    first = worker.pull()
    admin.set_model_parameters({"v": np.ones(7, np.float32)})

    second = worker.pull(out=first)

    assert list(second.parameters) == ["v"]
    assert first.parameters["w"].max() == 0


def test_newer_than_waits_for_an_update(broker: Broker, worker: Worker, admin: Admin) -> None:
    before = worker.pull()
    found: list[int] = []
    puller = threading.Thread(target=lambda: found.append(worker.pull(newer_than=before).version))
    puller.start()
    while not admin.status()["waiting_pulls"]:
        pass

    worker.push(ONES)
    puller.join()

    assert found == [1]


@pytest.mark.parametrize("how", ["snapshot", "state", "number"])
def test_nothing_newer_is_a_timeout_error(worker: Worker, how: str) -> None:
    snapshot = worker.pull()
    newer_than: Any = {"snapshot": snapshot, "state": snapshot.state, "number": snapshot.version}[how]

    with pytest.raises(TimeoutError, match="nothing newer"):
        worker.pull(newer_than=newer_than, timeout=0.01)


def test_parameters_that_were_replaced_count_as_newer(worker: Worker, admin: Admin) -> None:
    before = worker.pull()
    admin.set_model_parameters(START)

    after = worker.pull(newer_than=before, timeout=10)

    assert after.version == before.version
    assert after.state.generation == before.state.generation + 1


def test_initialize_gives_namedtuples_back(broker: Broker) -> None:
    pair = namedtuple("pair", ["first", "second"])
    with Broker() as empty, Worker(empty.address) as worker:
        snapshot = worker.initialize(pair(np.zeros(2), np.ones(3)))

        assert isinstance(snapshot.parameters, pair)
        worker.push(pair(np.ones(2), np.ones(3)))
        worker.flush()
        assert isinstance(worker.pull(out=snapshot).parameters, pair)


@pytest.mark.parametrize("address", ["*:5556", "127.0.0.1:0"])
def test_an_address_that_nobody_can_connect_to_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match="cannot connect"):
        Worker(address)


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        ({"w": np.ones((2, 3))}, "b"),
        ({**ONES, "more": np.ones(1)}, "more"),
        ({**ONES, "w": np.ones((3, 2))}, "w"),
        ({**ONES, "w": np.ones((2, 3), complex)}, "w"),
        ({**ONES, "w": np.full((2, 3), "x")}, "w"),
        ({}, "w"),
        (np.ones(8), "w|nest|path"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_at_the_call_and_takes_no_number(
    worker: Worker, gradient: Any, words: str
) -> None:
    with pytest.raises(LayoutError, match=words):
        worker.push(gradient)

    assert worker.push(ONES) == 1


def test_a_gradient_is_copied_before_push_returns(broker: Broker, worker: Worker, admin: Admin) -> None:
    admin.stop()
    gradient: dict[str, Any] = {"w": np.ones((2, 3), np.float32), "b": np.ones(2)}
    for value in (1, 2, 3):
        gradient["w"][:] = gradient["b"][:] = value
        worker.push(gradient)
    gradient["w"][:] = gradient["b"][:] = np.nan
    admin.start()
    worker.flush()

    assert worker.pull().parameters["w"].tolist() == [[-6] * 3] * 2


def test_what_was_pulled_can_be_pushed_to_though_the_lease_has_not_heard_of_it(worker: Worker, admin: Admin) -> None:
    worker.pull()
    admin.set_model_parameters({"w": np.zeros(7, np.float32)})

    pulled = worker.pull()
    worker.push({"w": np.ones_like(pulled.parameters["w"])})
    worker.flush()

    assert worker.pull().parameters["w"].tolist() == [-1] * 7


@pytest.mark.parametrize("cursor", ["epoch 3, batch 5", b"\x00\xff", "", b""])
def test_the_cursor_is_told_to_who_comes_back_under_the_id(broker: Broker, cursor: bytes | str) -> None:
    with Worker(broker.address, worker_id="one") as worker:
        assert worker.cursor is None
        worker.push(ONES, cursor=cursor)
        worker.push(ONES)
    with Worker(broker.address, worker_id="one") as again:
        assert again.cursor == cursor
        assert type(again.cursor) is type(cursor)
        assert again.push(ONES) == 3


def test_what_a_gradient_was_computed_on_is_told(broker: Broker, worker: Worker, admin: Admin) -> None:
    snapshot = worker.pull()
    for base in (None, snapshot, snapshot.state, 0):
        worker.push(ONES, base_version=base)
    worker.flush()

    (told,) = admin.workers()
    assert told["staleness_max"] == 3
    assert told["staleness_mean"] == 1.5


def test_a_bare_number_as_base_needs_no_pull_before(worker: Worker) -> None:
    worker.push(ONES, base_version=0)
    worker.flush()


def test_examples_and_loss_are_shown(worker: Worker, admin: Admin) -> None:
    worker.push(ONES, examples=32, loss=np.float32(0.5))  # type: ignore[arg-type]  # NumPy's are taken, too
    worker.push(ONES, examples=0)
    worker.flush()

    (told,) = admin.workers()
    assert (told["examples"], told["loss"]) == (32, 0.5)


def test_status_is_what_an_admin_is_told(worker: Worker, admin: Admin) -> None:
    worker.push(ONES)
    worker.flush()

    status = worker.status()

    assert (status["version"], status["optimizer"], status["policy"]["policy"]) == (1, None, "async")
    assert status.keys() == admin.status().keys()


def test_status_is_told_to_a_key_that_may_only_work(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    with Broker(parameters=START, keys=keys.folder) as closed, Worker(closed.address, keys=keys.worker) as worker:
        assert worker.status()["version"] == 0


def test_flush_gives_up_after_its_timeout_and_can_be_called_again(worker: Worker, admin: Admin) -> None:
    admin.stop()
    worker.push(ONES)
    with pytest.raises(TimeoutError, match=r"1 gradient"):
        worker.flush(timeout=0.05)
    admin.start()
    worker.flush()

    assert worker.settled == 1


def test_flush_without_anything_to_flush_returns(worker: Worker) -> None:
    worker.flush(timeout=0)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gradient_counts_the_same_whether_it_was_copied_or_lent(copy: bool, dtype: type) -> None:
    gradients: list[Any] = [np.arange(3 * number, 3 * number + 3).astype(dtype) for number in range(5)]
    with Broker(parameters=np.zeros(3, np.float32)) as running, Worker(running.address) as worker:
        for gradient in gradients:
            worker.push(gradient, copy=copy)
        worker.flush()

        np.testing.assert_array_equal(worker.pull().parameters, -np.sum(gradients, axis=0))


def test_what_was_copied_may_change_at_once(worker: Worker, admin: Admin) -> None:
    gradient = np.ones(2, np.float32)
    admin.stop()
    worker.push({**ONES, "b": gradient})
    gradient[:] = 1000.0
    admin.start()
    worker.flush()

    np.testing.assert_array_equal(worker.pull().parameters["b"], -np.ones(2))


def test_a_gradient_larger_than_the_queue_after_the_model_grew_is_refused_by_the_set(admin: Admin) -> None:
    with (
        Broker(parameters={"w": np.zeros(300, np.float32)}, queue_bytes=2000) as small,
        Worker(small.address) as worker,
        Admin(small.address) as boss,
    ):
        with pytest.raises(Exception, match="queue-bytes"):
            boss.set_model_parameters({"w": np.zeros(501, np.float32)})
        worker.push({"w": np.ones(300)})
        worker.flush()


def test_a_window_smaller_than_a_gradient_takes_one_at_a_time(broker: Broker) -> None:
    with Worker(broker.address, window_bytes=1) as worker:
        for _ in range(20):
            worker.push(ONES)
        worker.flush()
        assert worker.pull().version == 20


def test_several_refusals_are_raised_one_after_the_other(worker: Worker) -> None:
    bad = {"w": np.full((2, 3), np.nan), "b": np.ones(2)}
    numbers = []
    for _ in range(3):
        try:
            worker.push(bad)
        except GradientRefused as refused:
            numbers.append(refused.number)
    for _ in range(4):
        try:
            worker.flush()
        except GradientRefused as refused:
            numbers.append(refused.number)

    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers
    assert worker.settled == len(numbers)


def test_close_is_idempotent_and_ends_every_call(broker: Broker) -> None:
    worker = Worker(broker.address)
    worker.push(ONES)
    worker.close()
    worker.close()

    assert worker.settled == 1
    for call in (worker.pull, worker.flush, worker.status, lambda: worker.push(ONES), lambda: worker.initialize(START)):
        with pytest.raises(StateError, match="closed"):
            call()


def test_close_raises_a_refusal_and_closes_all_the_same(broker: Broker, admin: Admin) -> None:
    worker = Worker(broker.address)
    worker.push({"w": np.full((2, 3), np.inf), "b": np.ones(2)})

    with pytest.raises(GradientRefused, match="w"):
        worker.close()

    worker.close()
    assert admin.workers() == []


def test_an_exception_in_the_with_block_is_not_replaced_by_one_of_close(broker: Broker) -> None:
    def fail_inside() -> None:
        with Worker(broker.address) as worker:
            worker.push({"w": np.full((2, 3), np.inf), "b": np.ones(2)})
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        fail_inside()

    assert any("closing the worker failed as well" in note for note in caught.value.__notes__)


def test_a_state_of_another_incarnation_is_answered_at_once(worker: Worker) -> None:
    assert worker.pull(newer_than=State("another", 0, 10**9)).version == 0


def test_a_worker_that_nobody_uses_any_more_can_be_collected(broker: Broker) -> None:
    worker = Worker(broker.address)
    reference = weakref.ref(worker)
    worker.close()
    del worker
    gc.collect()

    assert reference() is None


def test_a_burst_arrives_whole_though_nobody_asks_for_its_end(worker: Worker, admin: Admin) -> None:
    for _ in range(20):
        worker.push(ONES)

    while admin.status()["version"] < 20:
        pass
