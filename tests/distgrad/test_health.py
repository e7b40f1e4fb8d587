"""``distgrad admin ADDRESS health``: one line and an exit code, as probes of containers and services want it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from distgrad.admin import Admin
from distgrad.health import obstacles
from support.broker_process import broker_process
from support.key_folders import make_key_folder
from support.processes import run


def test_a_broker_that_answers_is_healthy_and_ready(tmp_path: Path) -> None:
    with broker_process("--data", str(tmp_path / "run")) as (address, _):
        healthy = run("admin", address, "health")
        ready = run("admin", address, "health", "--ready")

    assert (healthy.returncode, healthy.stdout) == (0, "healthy: version 0, 0 workers\n")
    assert (ready.returncode, ready.stdout) == (0, "ready: version 0, 0 workers\n")


def test_a_broker_that_was_stopped_is_healthy_but_not_ready() -> None:
    with broker_process() as (address, _), Admin(address, timeout=20) as admin:
        admin.stop()

        assert run("admin", address, "health").returncode == 0
        ready = run("admin", address, "health", "--ready")

    assert ready.returncode == 1
    assert ready.stdout.startswith("not ready: it was stopped; ")


def test_silence_is_not_healthy_and_takes_one_line() -> None:
    told = run("admin", "127.0.0.1:1", "--timeout", "0.2", "health")

    assert told.returncode == 1
    assert told.stdout.startswith("not healthy: no answer from tcp://127.0.0.1:1 ")
    assert (told.stdout.count("\n"), told.stderr) == (1, "")


def test_a_frozen_broker_is_not_healthy() -> None:
    with broker_process() as (address, process):
        os.kill(process.pid, signal.SIGSTOP)
        told = run("admin", address, "--timeout", "0.5", "health")
        os.kill(process.pid, signal.SIGCONT)

    assert told.returncode == 1
    assert told.stdout.startswith("not healthy: ")


@pytest.mark.parametrize("role", ["admin", "read"])
def test_a_key_that_may_read_is_enough(tmp_path: Path, role: str) -> None:
    keys = make_key_folder(tmp_path)
    with broker_process("--keys", str(keys.folder)) as (address, _):
        told = run("admin", address, "--keys", getattr(keys, role), "health", "--ready")

    assert (told.returncode, told.stderr) == (0, "")


def test_a_broken_disk_is_an_obstacle() -> None:
    status = {"running": True, "disk": {"trouble": "No space left on device"}}

    assert obstacles(status) == ["nothing is settled, because of the disk: No space left on device"]
    assert obstacles({"running": True, "disk": None}) == []
