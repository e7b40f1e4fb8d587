"""What `Admin` has beyond the class: a broker that saves, restarts, drains slowly, is destroyed, or is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import parameter_files
from distgrad.admin import Admin
from distgrad.errors import BrokerRestarted, BrokerUnreachable, ConfigError, ControlError, Destroyed, NoParameters
from distgrad_worker import Worker
from support.broker_process import broker_process
from support.ports import free_port
from support.processes import Process, run
from support.scripted_broker import ScriptedBroker


def test_status_tells_at_least_what_is_promised() -> None:
    with broker_process() as (address, _), Admin(address, timeout=20) as admin:
        status = admin.status()

    assert {"version", "running", "queued", "refused", "incarnation", "workers"} <= set(status)


def test_workers_are_listed() -> None:
    with broker_process() as (address, _), Admin(address, timeout=20) as admin:
        assert admin.workers() == []

        with Worker(address, worker_id="one"):
            assert [worker["id"] for worker in admin.workers()] == ["one"]


def test_save_writes_the_file_that_the_broker_was_told(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with broker_process("--save", str(path)) as (address, _), Admin(address, timeout=20) as admin:
        with pytest.raises(NoParameters):
            admin.save()
        admin.set_model_parameters({"a": {"w": np.arange(3.0)}})

        assert admin.save() == str(path)

        np.testing.assert_array_equal(parameter_files.read(path)["a.w"], [0, 1, 2])


def test_save_that_cannot_write_says_why_and_the_broker_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with broker_process("--save", str(folder / "p.npz")) as (address, _), Admin(address, timeout=20) as admin:
        admin.set_model_parameters(np.zeros(1))
        folder.rmdir()

        with pytest.raises(ControlError, match=r"p\.npz") as caught:
            admin.save()
        folder.mkdir()

        assert caught.value.code == "failed"
        assert admin.save()


def test_a_broker_that_was_restarted_is_noticed_before_anything_is_changed() -> None:
    control = f"tcp://127.0.0.1:{free_port()}"
    with Admin(control, timeout=20) as admin:
        with broker_process(control=control):
            admin.set_model_parameters(np.zeros(1))
        with broker_process(control=control):
            with pytest.raises(BrokerRestarted):
                admin.set_model_parameters(np.ones(1))
            assert admin.get_model_parameters() is None
            admin.set_model_parameters(np.ones(1))
            np.testing.assert_array_equal(admin.get_model_parameters(), [1])


def test_stop_asks_again_until_the_queue_is_drained() -> None:
    replies: list[Any] = [{"changed": True, "drained": False}, {"changed": False, "drained": False}, {"drained": True}]
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


def test_a_broker_that_is_absent_is_named() -> None:
    with Admin("127.0.0.1:1", timeout=0.2) as admin, pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:1 "):
        admin.status()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "5", None, True])
def test_an_impossible_timeout_is_refused_before_anything_is_opened(timeout: Any) -> None:
    with pytest.raises(ConfigError, match="timeout must be more than 0 seconds, got"):
        Admin("127.0.0.1", timeout=timeout)


@pytest.mark.parametrize("address", [None, 5556])
def test_what_is_no_address_is_refused(address: Any) -> None:
    with pytest.raises(ConfigError, match="an address is a text"):
        Admin(address)


# destroy()


def test_destroy_ends_the_broker_and_every_later_call_raises() -> None:
    with broker_process() as (address, process), Admin(address, timeout=20) as admin, Admin(address) as other:
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
        assert process.wait() == 0


def test_behind_the_command_destroy_another_broker_can_have_the_ports_at_once() -> None:
    ports = [free_port(), free_port()]
    words = ["broker", "--control", f"127.0.0.1:{ports[0]}", "--gradients", f"127.0.0.1:{ports[1]}"]
    with Process(*words) as first:
        first.wait_for_line(r"control=(\S+)")
        done = run("admin", f"127.0.0.1:{ports[0]}", "destroy", "--yes")
        with Process(*words) as second:
            second.wait_for_line(r"^distgrad broker control=(\S+)")
        assert first.wait() == 0

    assert (done.returncode, done.stdout) == (0, "destroyed\n")
