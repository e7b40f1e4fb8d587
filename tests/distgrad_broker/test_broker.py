"""Tests of `distgrad_broker.broker`."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import SGD, Adam, Admin
from distgrad.errors import CheckpointError, ConfigError, KeyFileError, StateError
from distgrad.parameter_files import as_nest, read, write
from distgrad_broker import Broker
from distgrad_broker.config import BrokerConfig
from distgrad_broker.loop import Loop
from distgrad_worker import Worker

ZEROS = {"w": np.zeros(3, np.float32)}
ONES = {"w": np.ones(3, np.float32)}


def test_it_tells_its_real_addresses_and_takes_free_ports() -> None:
    with Broker() as first, Broker() as second:
        addresses = {first.address, first.gradients, second.address, second.gradients}

    assert len(addresses) == 4
    assert all(address.startswith("tcp://127.0.0.1:") and not address.endswith(":0") for address in addresses)


def test_it_installs_no_signal_handlers_and_runs_on_its_own_thread() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Broker():
        assert {number: signal.getsignal(number) for number in before} == before
        assert "distgrad-broker" in [thread.name for thread in threading.enumerate()]
    assert "distgrad-broker" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("arguments", "in_force"),
    [
        ({}, None),
        ({"optimizer": SGD(lr=0.5, momentum=0.9)}, ("sgd", 0.5)),
        ({"optimizer": Adam(lr=0.25)}, ("adam", 0.25)),
        ({"optimizer": "sgd", "lr": 0.125}, ("sgd", 0.125)),
    ],
)
def test_a_rule_is_given_as_a_value_or_by_name(arguments: dict[str, Any], in_force: tuple[str, float] | None) -> None:
    with Broker(**arguments) as broker, Admin(broker.address) as admin:
        told = admin.status()["optimizer"]

    assert (told and (told["name"], told["lr"])) == in_force


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"colour": "red"}, "unknown setting colour; there are control, |unknown setting colour"),
        ({"optimizer": SGD(lr=0.1), "lr": 0.2}, "give the rule's numbers to the rule"),
        ({"optimizer": "newton"}, "newton"),
        ({"lr": 0.1}, "--optimizer"),
        ({"mode": "sideways"}, "sideways"),
        ({"config": "tcp://127.0.0.1:5555"}, "config must be a BrokerConfig, got 'tcp"),
    ],
)
def test_impossible_settings_are_refused_before_anything_starts(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Broker(**arguments)


def test_keyword_arguments_override_the_configuration() -> None:
    config = BrokerConfig(control="tcp://127.0.0.1:0", gradients="tcp://127.0.0.1:0", max_workers=5)

    broker = Broker(config, max_workers=6)

    assert broker.config.max_workers == 6
    assert broker.config.control == "tcp://127.0.0.1:0"


def test_it_is_started_once_and_has_no_address_before() -> None:
    broker = Broker()
    with pytest.raises(StateError, match="not started"):
        _ = broker.address
    broker.close()

    broker.start()
    with pytest.raises(StateError, match="once"):
        broker.start()
    broker.close()
    broker.close()


def test_what_keeps_it_from_starting_is_raised_by_start_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with Broker() as first:
        for arguments, error in (
            ({"control": first.address}, ConfigError),
            ({"gradients": first.gradients}, ConfigError),
            ({"load": tmp_path / "none.npz"}, CheckpointError),
            ({"keys": tmp_path / "none"}, KeyFileError),
            ({"save": tmp_path / "w.txt"}, ConfigError),
            ({"parameters": {"w": np.zeros(1000)}, "queue_bytes": 4000}, ConfigError),
        ):
            with pytest.raises(error):
                Broker(**arguments).start()


def test_parameters_are_loaded_and_what_is_queued_is_applied_and_saved_at_the_end(tmp_path: Path) -> None:
    start, end = tmp_path / "start.safetensors", tmp_path / "end.npz"
    write(start, ONES)
    with Broker(load=start, save=end, mode="ascent") as broker, Worker(broker.address) as worker:
        assert worker.pull().parameters["w"].tolist() == [1, 1, 1]
        worker.push(ONES)
        worker.flush()

    assert as_nest(read(end))["w"].tolist() == [2, 2, 2]


def test_a_save_at_the_end_that_fails_is_raised_by_close(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    broker = Broker(save=folder / "w.npz", parameters=ZEROS)
    broker.start()
    folder.rmdir()

    with pytest.raises(CheckpointError, match="cannot save"):
        broker.close()
    broker.close()


def test_nothing_is_saved_where_there_are_no_parameters(tmp_path: Path) -> None:
    with Broker(save=tmp_path / "w.npz"):
        pass

    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_loop_is_raised_by_close(monkeypatch: pytest.MonkeyPatch) -> None:
    is_started = threading.Event()

    def broken(_self: Loop) -> None:
        assert is_started.wait(30.0)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Loop, "run", broken)
    broker = Broker()
    broker.start()
    is_started.set()

    with pytest.raises(ZeroDivisionError):
        broker.close()


def test_listening_for_others_without_keys_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Broker(control="tcp://*:0", insecure=True):
        assert "no keys" in caplog.text


def test_listening_on_loopback_without_keys_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Broker():
        assert caplog.text == ""


def test_it_ends_when_it_is_destroyed_and_close_then_returns() -> None:
    broker = Broker()
    broker.start()
    with Admin(broker.address) as admin:
        admin.destroy()
    broker.close()
