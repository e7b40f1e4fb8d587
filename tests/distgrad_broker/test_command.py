"""Tests of `distgrad_broker.command`; what a running process does is in the scenarios."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distgrad import descriptors, log
from distgrad.config import fields
from distgrad.errors import ConfigError
from distgrad_broker import command
from distgrad_broker.broker import Served
from distgrad_broker.config import BrokerConfig
from support.processes import Process


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the broker by one that is ready, is told to end once, and ends."""
    seen: dict[str, Any] = {"shut_down": 0}

    def shut_down() -> None:
        seen["shut_down"] += 1

    def serve(config: BrokerConfig, on_ready: Callable[[Served], None]) -> None:
        seen["config"] = config
        on_ready(Served("tcp://127.0.0.1:7", "tcp://127.0.0.1:8", "incarnation", shut_down))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)

    def install(level: str, as_json: bool) -> None:
        seen["log"] = (level, as_json)

    monkeypatch.setattr(command, "serve", serve)
    # It would change the limits of this process.
    monkeypatch.setattr(descriptors, "keep_spare", lambda: seen.setdefault("spare", "config" not in seen))
    monkeypatch.setattr(log, "install", install)
    return seen


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command.broker, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result.output


def test_it_prints_one_line_with_the_addresses_in_use(served: dict[str, Any]) -> None:
    assert run() == "distgrad broker control=tcp://127.0.0.1:7 gradients=tcp://127.0.0.1:8\n"


def test_both_signals_ask_it_to_end_and_the_former_handlers_come_back(served: dict[str, Any]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    run()

    assert served["shut_down"] == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_flags_win_over_variables_and_those_over_the_file(
    served: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('max_workers = 1\nthreads = 2\nqueue_bytes = "1MiB"\n')
    monkeypatch.setenv("DISTGRAD_THREADS", "3")
    monkeypatch.setenv("DISTGRAD_QUEUE_BYTES", "2MiB")

    run("--config", str(file), "--queue-bytes", "3MiB")

    config = served["config"]
    assert (config.max_workers, config.threads, config.queue_bytes) == (1, 3, 3 << 20)


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {}, ("info", False)),
        (("--log-level", "debug", "--log-json"), {}, ("debug", True)),
        ((), {"DISTGRAD_LOG_LEVEL": "warning", "DISTGRAD_LOG_JSON": "1"}, ("warning", True)),
        (("--log-level", "error"), {"DISTGRAD_LOG_LEVEL": "warning"}, ("error", False)),
    ],
)
def test_the_log_is_set_up_as_asked(
    served: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    expected: tuple[str, bool],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    run(*arguments)

    level, as_json = served["log"]
    assert (level.lower(), as_json) == expected


def test_check_config_prints_every_setting_and_starts_nothing(served: dict[str, Any]) -> None:
    lines = run("--check-config").splitlines()

    assert [line.split(" = ")[0] for line in lines] == [field.name for field in fields(BrokerConfig)]
    assert "config" not in served


def test_descriptors_are_kept_back_before_anybody_can_connect(served: dict[str, Any]) -> None:
    run("--check-config")
    assert "spare" not in served

    run()

    assert served["spare"]


def test_help_names_every_setting() -> None:
    text = run("--help")

    assert all(field.flag in text for field in fields(BrokerConfig))


def test_an_address_without_a_port_means_the_usual_one() -> None:
    # Loopback addresses that nobody else uses, so that the usual ports are free.
    with Process("broker", "--control", "127.83.7.1", "--gradients", "127.83.7.2") as broker:
        found = broker.wait_for_line(r"^distgrad broker control=(\S+) gradients=(\S+)")

        assert found.groups() == ("tcp://127.83.7.1:5556", "tcp://127.83.7.2:5555")


def test_a_variable_that_nothing_reads_is_refused_before_anything_begins(
    served: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTGRAD_LRR", "3")

    with pytest.raises(ConfigError, match="DISTGRAD_LRR") as caught:
        run()

    assert "DISTGRAD_LR?" in str(caught.value.hint)
    assert "config" not in served
