"""`distgrad top`, `dashboard` and `metrics` as they are typed: links, keys, missing extras, and how they end."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from distgrad_broker import Broker
from support.key_folders import make_key_folder
from support.processes import Process, clean_environment, run

START = {"w": np.zeros(2, np.float32)}
# `distgrad …` where a module is not installed.
WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None
from distgrad.command import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "module"), [("top", "textual"), ("dashboard", "starlette"), ("dashboard", "uvicorn")]
)
def test_a_missing_extra_is_named_in_one_line(command: str, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, module, command, "127.0.0.1:1"],
        capture_output=True, text=True, timeout=100, env=clean_environment(), check=False,
    )  # fmt: skip

    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"hint: in the clone of distgrad: pip install '.[{command}]'"
    assert f"needs the module '{module}'" in done.stderr


def test_metrics_needs_no_extra() -> None:
    with Broker(parameters=START) as broker:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, "textual", "metrics", broker.address, "--once"],
            capture_output=True, text=True, timeout=100, env=clean_environment(), check=False,
        )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "distgrad_up 1" in done.stdout.splitlines()


@pytest.mark.parametrize("command", ["top", "dashboard"])
def test_a_broker_that_is_not_there_is_told_before_anything_is_shown(command: str) -> None:
    pytest.importorskip("textual", reason="needs the extra `top`")
    pytest.importorskip("uvicorn", reason="needs the extra `dashboard`")
    done = run(command, "127.0.0.1:1")

    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.startswith("error: no answer from tcp://127.0.0.1:1")


def test_the_exporter_serves_until_ctrl_c() -> None:
    with (
        Broker(parameters=START) as broker,
        Process("metrics", broker.address, "--listen", "127.0.0.1:0") as exporter,
    ):
        url = exporter.wait_for_line(r"distgrad metrics (http://\S+)")[1]
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"distgrad_up 1\n" in answer.read()

        exporter.interrupt()
        assert exporter.wait() == 0


def test_the_dashboard_prints_two_links_and_ends_with_ctrl_c() -> None:
    pytest.importorskip("uvicorn", reason="needs the extra `dashboard`")
    with (
        Broker(parameters=START) as broker,
        Process("dashboard", broker.address, "--listen", "127.0.0.1:0") as dashboard,
    ):
        watch = dashboard.wait_for_line(r"dashboard watch=(http://127\.0\.0\.1:\d+/#token=\S{20,})")[1]
        control = dashboard.wait_for_line(r"dashboard control=(http://127\.0\.0\.1:\d+/#token=\S{20,})")[1]
        assert watch != control
        with urllib.request.urlopen(watch, timeout=30) as answer:
            assert answer.status == 200

        dashboard.interrupt()
        assert dashboard.wait() == 0


def test_with_a_key_that_only_reads_there_is_no_link_that_controls(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra `dashboard`")
    keys = make_key_folder(tmp_path)
    with (
        Broker(parameters=START, keys=keys.folder) as broker,
        Process("dashboard", broker.address, "--listen", "127.0.0.1:0", "--keys", keys.read) as dashboard,
    ):
        watch = dashboard.wait_for_line(r"dashboard watch=(\S+)")[1]
        with urllib.request.urlopen(watch, timeout=30) as answer:  # so it has said all that it says
            assert answer.status == 200
        dashboard.interrupt()
        assert dashboard.wait() == 0

    assert "control=" not in dashboard.output()


def test_top_needs_a_terminal() -> None:
    pytest.importorskip("textual", reason="needs the extra `top`")
    with Broker(parameters=START) as broker:
        done = run("top", broker.address)

    assert done.returncode == 2
    assert done.stderr.startswith("error: `distgrad top` needs a terminal")
    assert "status --json" in done.stderr


def test_the_dashboard_is_for_this_machine_unless_told_otherwise() -> None:
    pytest.importorskip("uvicorn", reason="needs the extra `dashboard`")
    done = run("dashboard", "127.0.0.1:1", "--listen", "0.0.0.0:0")

    assert done.returncode == 2
    assert "can be reached by others" in done.stderr
    assert "ssh -L" in done.stderr


def test_a_key_that_reads_looks_on_and_one_of_a_worker_is_refused(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    with Broker(parameters=START, keys=keys.folder) as broker:
        looks_on = run("metrics", broker.address, "--keys", str(keys.read), "--once")
        works = run("metrics", broker.address, "--keys", str(keys.worker), "--once")

    assert looks_on.returncode == 0, looks_on.stderr
    assert "distgrad_up 1" in looks_on.stdout.splitlines()
    assert works.returncode == 1
    assert "needs a key with role" in works.stderr
