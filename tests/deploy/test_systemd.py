"""The systemd unit: what systemd says of it, and that a broker works under its restrictions."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from distgrad.admin import Admin
from distgrad_worker import Worker
from support import processes
from support.processes import DISTGRAD, Process
from support.sandbox import ROOM, sandboxed, system_calls

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "distgrad-broker.service"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments, str(UNIT)], capture_output=True, text=True, timeout=60, check=False
    )


@needs_systemd
def test_the_unit_passes_systemd_analyze_verify() -> None:
    ended = analyze("verify", "--man=no")

    assert (ended.returncode, ended.stderr) == (0, "")


@needs_systemd
def test_systemd_takes_the_unit_for_well_protected() -> None:
    """From 0, sealed, to 10, open; much of what is left is the network, which a broker is for."""
    ended = analyze("security", "--offline=yes")

    [exposure] = re.findall(r"Overall exposure level for \S+: ([\d.]+)", ended.stdout)
    assert float(exposure) <= 2.0, ended.stdout


def test_the_unit_starts_a_command_that_exists() -> None:
    (start,) = re.findall(r"^ExecStart=/usr/bin/env distgrad (.*)$", UNIT.read_text(), re.MULTILINE)

    assert start == "broker --config /etc/distgrad/broker.toml"
    assert processes.run("broker", "--help").returncode == 0


def test_what_the_unit_must_not_do_to_numba() -> None:
    """Kernels are compiled into memory that is written, then executed."""
    assert "\nMemoryDenyWriteExecute=yes" not in UNIT.read_text()


def test_a_broker_with_compiled_kernels_works_under_the_units_restrictions() -> None:
    """Its user, its file systems, no capabilities, no new privileges, its system calls."""
    pytest.importorskip("numba", reason="needs the extra fast")
    command = ("--control", "127.0.0.1:0", "--gradients", "127.0.0.1:0", "--data", ROOM / "data", "--optimizer", "adam")
    environment = {"NUMBA_CACHE_DIR": str(ROOM / "cache"), "TMPDIR": str(ROOM / "tmp"), "HOME": "/nowhere"}

    with Process(
        "broker",
        *command,
        "--save",
        ROOM / "data" / "p.npz",
        program=(*sandboxed(unit=UNIT), *DISTGRAD),
        env=environment,
    ) as broker:
        address = broker.wait_for_line(r"control=(\S+)")[1]
        with Worker(address) as worker, Admin(address, timeout=20) as admin:
            # Large enough for several threads.
            worker.initialize({"w": np.zeros(2_000_000, np.float32)})
            for _ in range(3):
                worker.push({"w": np.ones(2_000_000, np.float32)})
            worker.flush()
            status = admin.status()
            admin.save()
        broker.terminate()
        assert broker.wait() == 0

    assert (status["version"], status["disk"]["trouble"]) == (3, None)
    assert any("executor=numba" in line for line in broker.lines), broker.output()
    assert not any("without a cache" in line or "Traceback" in line for line in broker.lines), broker.output()


def test_the_sandbox_of_these_tests_refuses_what_the_unit_refuses() -> None:
    prefix = sandboxed(unit=UNIT)
    assert "chown" not in system_calls(UNIT)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)

    assert "Operation not permitted" in run("chown", "0", "/mnt/data").stderr
    assert "Read-only file system" in run("touch", "/var/tmp/no").stderr
    assert run("cat", "/proc/self/status").stdout.count("CapBnd:\t0000000000000000") == 1
    assert run("touch", "/mnt/data/yes").returncode == 0
