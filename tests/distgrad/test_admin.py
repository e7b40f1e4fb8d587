"""The class's verbs through `Admin`, against a real broker process: one test or more for each row of the table.

The table is that of the in-process class in ``docs/architecture.md``; each test names its row by the original's verb.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import parameter_files
from distgrad.admin import Admin
from distgrad.errors import (
    BrokerRestarted,
    BrokerUnreachable,
    ConfigError,
    ControlError,
    Destroyed,
    GradientRefused,
    InvalidMode,
    LayoutError,
    NoParameters,
)
from distgrad_worker import Worker
from support.scripted_broker import ScriptedBroker

Point = namedtuple("Point", ["x", "y"])


class BrokerProcess:
    """``distgrad broker`` on free ports of loopback."""

    def __init__(self, *options: str, control: str = "tcp://127.0.0.1:0") -> None:
        command = [sys.executable, "-m", "distgrad", "broker", "--control", control, "--gradients", "tcp://127.0.0.1:0"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DISTGRAD_")}
        self.process = subprocess.Popen(
            [*command, "--log-level", "warning", *options], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "control=" in line:
                self.address = line.partition("control=")[2].split()[0]
                return
        raise AssertionError(f"the broker ended with {self.process.wait()} before it was ready")

    def __enter__(self) -> BrokerProcess:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


Run = Callable[..., Admin]


@pytest.fixture
def run() -> Iterator[Run]:
    """Start a broker with options, and connect to it."""
    opened: list[tuple[Admin, BrokerProcess]] = []

    def start(*options: str) -> Admin:
        broker = BrokerProcess(*options)
        admin = Admin(broker.address, timeout=20)
        opened.append((admin, broker))
        return admin

    yield start
    for admin, broker in opened:
        admin.close()
        with broker:
            pass


def wait_until(condition: Callable[[], bool]) -> None:
    """Ask until it is so; the suite's limit for one test ends a wait in vain."""
    while not condition():
        threading.Event().wait(0.005)


def queue_up(admin: Admin, worker: Worker, *gradients: Any) -> None:
    """Push, and wait until the broker has all of it in its queue."""
    before = admin.status()["queued"]
    for gradient in gradients:
        worker.push(gradient)
    wait_until(lambda: bool(admin.status()["queued"] == before + len(gradients)))


# new(gradientChangeMode)


def test_new_descent_is_the_default_and_a_gradient_is_the_step(run: Run) -> None:
    admin = run()
    admin.set_model_parameters(np.array([1.0, 2.0]))

    with Worker(admin.address) as worker:
        worker.push(np.array([0.25, 1.0]))
        worker.flush()

    assert admin.status()["mode"] == "descent"
    np.testing.assert_array_equal(admin.get_model_parameters(), [0.75, 1.0])


def test_new_ascent_adds(run: Run) -> None:
    admin = run("--mode", "ascent")
    admin.set_model_parameters(np.zeros(2))

    with Worker(admin.address) as worker:
        worker.push(np.ones(2))

    np.testing.assert_array_equal(admin.get_model_parameters(), [1, 1])


# setParameters(gradientChangeMode)


def test_set_parameters_turns_the_mode_while_running_from_the_next_gradient_on(run: Run) -> None:
    admin = run()
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        worker.push(np.ones(1))
        worker.flush()
        assert admin.set_parameters("ASCENT")["mode"] == "ascent"
        worker.push(np.full(1, 10.0))
        worker.flush()
        assert admin.set_parameters()["mode"] == "ascent", "None keeps the former one"
        worker.push(np.full(1, 100.0))

    np.testing.assert_array_equal(admin.get_model_parameters(), [109])


def test_set_parameters_counts_for_gradients_that_were_queued_before(run: Run) -> None:
    admin = run("--stopped")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1))
        admin.set_parameters("ascent")
        admin.start()
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [1])


def test_set_parameters_refuses_any_other_mode_at_once() -> None:
    with Admin("127.0.0.1:1") as admin, pytest.raises(InvalidMode, match="sideways") as caught:
        admin.set_parameters("sideways")

    assert isinstance(caught.value, ValueError)


def test_set_parameters_changes_the_rules_numbers(run: Run) -> None:
    admin = run("--optimizer", "sgd", "--lr", "1")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        worker.push(np.ones(1))
        worker.flush()
        assert admin.set_parameters(lr=0.5)["lr"] == 0.5
        worker.push(np.ones(1))

    np.testing.assert_array_equal(admin.get_model_parameters(), [-1.5])


@pytest.mark.parametrize("numbers", [{"lr": -1.0}, {"beta1": 0.5}, {"nonsense": 1.0}])
def test_set_parameters_refuses_numbers_that_the_rule_has_not_and_keeps_the_others(
    run: Run, numbers: dict[str, float]
) -> None:
    admin = run("--optimizer", "sgd", "--lr", "1")

    with pytest.raises(ConfigError):
        admin.set_parameters("ascent", **numbers)

    in_force = admin.set_parameters()
    assert in_force["mode"] == "descent"
    assert in_force["lr"] == 1.0


# addGradients(Gradients)


def test_add_gradients_applies_each_once_and_in_order(run: Run) -> None:
    """With momentum the order shows in the result."""
    admin = run("--optimizer", "sgd", "--lr", "1", "--momentum", "0.5")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        for gradient in (1.0, 2.0, 4.0):
            worker.push(np.array([gradient]))

    np.testing.assert_array_equal(admin.get_model_parameters(), [-(1 + 2.5 + 5.25)])
    assert admin.status()["version"] == 3


def test_add_gradients_is_allowed_while_stopped_and_applied_after_start(run: Run) -> None:
    admin = run("--stopped")
    admin.set_model_parameters(np.zeros(2))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(2), np.ones(2))
        np.testing.assert_array_equal(admin.get_model_parameters(), [0, 0])
        admin.start()
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [-2, -2])


def test_add_gradients_casts_to_the_parameters_dtype(run: Run) -> None:
    admin = run()
    admin.set_model_parameters(np.zeros(2, np.float32))

    with Worker(admin.address) as worker:
        worker.push(np.ones(2))

    assert admin.get_model_parameters().dtype == np.float32


def test_add_gradients_refuses_a_bad_one_whole_and_goes_on(run: Run) -> None:
    admin = run()
    admin.set_model_parameters({"a": np.zeros(2), "b": np.zeros(2)})

    with Worker(admin.address) as worker:
        worker.push({"a": np.ones(2), "b": np.array([1.0, np.nan])})
        with pytest.raises(GradientRefused) as caught:
            worker.flush()
        worker.push({"a": np.ones(2), "b": np.ones(2)})

    assert (caught.value.reason, caught.value.leaf) == ("not_finite", "b")
    assert admin.status()["refused"] == {"not_finite": 1}
    np.testing.assert_array_equal(admin.get_model_parameters()["a"], [-1, -1])


# setModelParameters(p, doNotDeepCopy)


def test_set_model_parameters_copies(run: Run) -> None:
    admin = run()
    mine = np.zeros(3)

    admin.set_model_parameters(mine)
    mine[:] = 7

    np.testing.assert_array_equal(admin.get_model_parameters(), [0, 0, 0])


def test_set_model_parameters_while_running_resets_the_rules_state_and_keeps_the_version(run: Run) -> None:
    admin = run("--optimizer", "sgd", "--lr", "1", "--momentum", "0.5")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        worker.push(np.ones(1))
        worker.flush()
        admin.set_model_parameters(np.zeros(1))
        worker.push(np.ones(1))
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [-1]), "no momentum was left"
    assert admin.status()["version"] == 2


def test_set_model_parameters_to_none_takes_them_away_and_gradients_wait(run: Run) -> None:
    admin = run("--stopped")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1))
        admin.set_model_parameters(None)
        admin.start()
        assert admin.get_model_parameters() is None
        assert admin.status()["queued"] == 1
        admin.set_model_parameters(np.zeros(1))
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [-1])


def test_set_model_parameters_of_another_layout_refuses_what_is_queued(run: Run) -> None:
    admin = run("--stopped")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1))
        admin.set_model_parameters(np.zeros(2))
        admin.start()
        with pytest.raises(GradientRefused) as caught:
            worker.flush()

    assert caught.value.reason == "layout"
    np.testing.assert_array_equal(admin.get_model_parameters(), [0, 0])
    assert admin.status()["version"] == 0


def test_set_model_parameters_that_cannot_be_laid_out_asks_the_broker_nothing() -> None:
    with Admin("127.0.0.1:1") as admin, pytest.raises(LayoutError):
        admin.set_model_parameters({"a": np.array(["text"])})


# getModelParameters(doNotDeepCopy)


def test_get_model_parameters_is_none_while_there_are_none(run: Run) -> None:
    assert run().get_model_parameters() is None


def test_get_model_parameters_gives_the_nest_that_was_set(run: Run) -> None:
    admin = run()
    nest = {
        "list": [np.zeros((2, 3), np.float16), np.arange(4, dtype=np.int32)],
        "tuple": (np.ones(()), np.array([True, False])),
        3: {"deep": np.full((1, 1, 1), 2.5, np.float32)},
        "empty": np.zeros((0, 2)),
    }
    admin.set_model_parameters(nest)

    found = admin.get_model_parameters()

    assert list(found) == list(nest)
    assert isinstance(found["list"], list)
    assert isinstance(found["tuple"], tuple)
    assert found["list"][0].dtype == np.float16
    np.testing.assert_array_equal(found["list"][1], [0, 1, 2, 3])
    np.testing.assert_array_equal(found["tuple"][1], [True, False])
    np.testing.assert_array_equal(found[3]["deep"], [[[2.5]]])
    assert found["empty"].shape == (0, 2)


def test_get_model_parameters_gives_a_namedtuple_as_a_dict_unless_it_is_told_the_class(run: Run) -> None:
    admin = run()
    nest = {"p": Point(np.zeros(1), np.ones(1))}
    admin.set_model_parameters(nest)

    assert list(admin.get_model_parameters()["p"]) == ["x", "y"]
    assert isinstance(admin.get_model_parameters(like=nest)["p"], Point)


def test_get_model_parameters_is_a_copy(run: Run) -> None:
    admin = run()
    admin.set_model_parameters(np.zeros(2))

    admin.get_model_parameters()[:] = 5

    np.testing.assert_array_equal(admin.get_model_parameters(), [0, 0])


def test_get_model_parameters_is_one_version_of_many_parts_while_updates_go_on(run: Run) -> None:
    """20 MB need a second range, and so a version that is held while newer ones are made."""
    admin = run()
    admin.set_model_parameters({"a": np.zeros(2_500_000, np.float32), "b": np.zeros(1_250_000)})
    is_over = threading.Event()

    def push() -> None:
        with Worker(admin.address) as worker:
            while not is_over.is_set():
                worker.push({"a": np.ones(2_500_000, np.float32), "b": np.ones(1_250_000)})

    pusher = threading.Thread(target=push)
    pusher.start()
    try:
        wait_until(lambda: bool(admin.status()["version"] >= 2))
        for _ in range(3):
            fetched = admin.fetch()
            assert fetched is not None
            assert [set(np.unique(arena)) for arena in fetched.arenas] == [{-fetched.state.version}] * 2
    finally:
        is_over.set()
        pusher.join()


# start(), stop()


def test_start_and_stop_say_whether_they_changed_anything(run: Run) -> None:
    admin = run()
    admin.set_model_parameters(np.zeros(1))

    assert [admin.start(), admin.stop(), admin.stop(), admin.start()] == [False, True, False, True]


def test_stop_drains_and_start_works_again(run: Run) -> None:
    admin = run("--stopped")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, *[np.ones(1)] * 20)
        admin.start()
        admin.stop()
        assert admin.status()["queued"] == 0
        assert admin.status()["running"] is False
        queue_up(admin, worker, np.ones(1))
        np.testing.assert_array_equal(admin.get_model_parameters(), [-20])
        admin.start()
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [-21])


def test_stop_without_draining_leaves_the_queue(run: Run) -> None:
    admin = run("--stopped")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1))
        assert admin.stop(drain=False) is False
        assert admin.status()["queued"] == 1
        admin.start()


def test_stop_asks_again_until_the_queue_is_drained() -> None:
    replies = [{"changed": True, "drained": False}, {"changed": False, "drained": False}, {"drained": True}]
    with (
        ScriptedBroker(lambda it: it.answer(**(replies.pop(0) if it.op == "stop" else {}))) as broker,
        Admin(broker.address) as admin,
    ):
        assert admin.stop() is True

    assert broker.ops == ["status", "stop", "stop", "stop"]
    assert len({header["id"] for header in broker.headers}) == 4


def test_stop_gives_up_draining_after_its_timeout() -> None:
    with (
        ScriptedBroker(lambda request: request.answer(changed=True, drained=False)) as broker,
        Admin(broker.address) as admin,
        pytest.raises(TimeoutError, match="not empty"),
    ):
        admin.stop(timeout=0.01)


# clearGradients()


def test_clear_gradients_empties_the_queue_and_counts(run: Run) -> None:
    admin = run("--stopped")
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1), np.ones(1), np.ones(1))
        assert admin.clear_gradients() == 3
        assert admin.clear_gradients() == 0
        admin.start()
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [0])
    assert admin.status()["cleared"] == 3


# destroy()


def test_destroy_ends_the_broker_and_every_later_call_raises() -> None:
    with BrokerProcess() as broker, Admin(broker.address, timeout=20) as admin, Admin(broker.address) as other:
        admin.set_model_parameters(np.zeros(1))
        admin.destroy()

        with pytest.raises(Destroyed):
            other.get_model_parameters()
        calls: list[Callable[[], object]] = [
            admin.start, admin.stop, admin.clear_gradients, admin.get_model_parameters, admin.set_parameters,
            lambda: admin.set_model_parameters(None), admin.status, admin.workers, admin.save, admin.destroy,
            admin.fetch_layout,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(Destroyed):
                call()
        assert broker.process.wait(20) == 0


# What a broker has beyond the class


def test_status_tells_at_least_what_is_promised(run: Run) -> None:
    status = run().status()

    assert {"version", "running", "queued", "refused", "incarnation", "workers"} <= set(status)


def test_workers_are_listed(run: Run) -> None:
    admin = run()
    assert admin.workers() == []

    with Worker(admin.address, worker_id="one"):
        assert [worker["worker"] for worker in admin.workers()] == ["one"]


def test_save_writes_the_file_that_the_broker_was_told(run: Run, tmp_path: Path) -> None:
    admin = run("--save", str(tmp_path / "p.safetensors"))
    with pytest.raises(NoParameters):
        admin.save()
    admin.set_model_parameters({"a": {"w": np.arange(3.0)}})

    assert admin.save() == str(tmp_path / "p.safetensors")

    np.testing.assert_array_equal(parameter_files.read(tmp_path / "p.safetensors")["a.w"], [0, 1, 2])


def test_save_that_cannot_write_says_why_and_the_broker_goes_on(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    admin = run("--save", str(folder / "p.npz"))
    admin.set_model_parameters(np.zeros(1))
    folder.rmdir()

    with pytest.raises(ControlError, match=r"p\.npz") as caught:
        admin.save()
    folder.mkdir()

    assert caught.value.code == "failed"
    assert admin.save()


def test_a_broker_that_was_restarted_is_noticed_before_anything_is_changed() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        control = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with Admin(control, timeout=20) as admin:
        with BrokerProcess(control=control):
            admin.set_model_parameters(np.zeros(1))
        with BrokerProcess(control=control):
            with pytest.raises(BrokerRestarted):
                admin.set_model_parameters(np.ones(1))
            assert admin.get_model_parameters() is None
            admin.set_model_parameters(np.ones(1))
            np.testing.assert_array_equal(admin.get_model_parameters(), [1])


def test_a_broker_that_is_absent_is_named() -> None:
    with Admin("127.0.0.1:1", timeout=0.2) as admin, pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:1 "):
        admin.status()
