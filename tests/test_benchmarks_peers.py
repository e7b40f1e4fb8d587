"""The benchmark against peers stays alive at sizes that mean nothing, and its check finds what it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("zmq")

from benchmarks.peers import processes, report
from benchmarks.peers.registry import CONTENDERS
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import DTYPE, LR, Cell, Gradients

ROOT = Path(__file__).resolve().parent.parent
OF_ONE_LIBRARY = [
    ["distgrad-slot", "distgrad-host", "distgrad", "distgrad-ahead"],
    ["pipe", "zmq-pickle", "zmq-raw"],
    ["floor-shm", "floor-shm-copy", "floor-zmq", "floor-socket", "floor-copy", "floor-kernel", "floor-reqrep"],
    ["mpi4py"],
    ["rpc", "rpc-tcp"],
    ["gloo"],
    ["ray"],
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=115, check=False)


# Running it


def test_every_contender_is_run_by_these_tests_or_says_why_it_cannot() -> None:
    named = [name for names in OF_ONE_LIBRARY for name in names]

    for name in set(CONTENDERS) - set(named):
        assert CONTENDERS[name].missing() is not None


@pytest.mark.slow
@pytest.mark.parametrize("names", OF_ONE_LIBRARY, ids=lambda names: names[0])
@pytest.mark.parametrize("works", ["W1", "W2,W3", "W4"])
def test_contenders_do_the_work_and_report_a_line_of_json_for_each(names: list[str], works: str) -> None:
    missing = {name: reason for name in names if (reason := CONTENDERS[name].missing())}
    if missing:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in missing.items()))

    ended = run("--tiny", "--sizes", "2000", "--workers", "2", "--work", works, "--only", ",".join(names))

    if "would listen on every interface" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    done = {(result["name"], result["work"]) for result in results}
    assert done == {(name, work) for name in names for work in CONTENDERS[name].works if work in works}
    for result in results:
        assert result["failure"] is None
        assert result["rate"] > 0
        assert {"low", "high", "lag", "machine", "python", "versions", "commit", "load_before"} <= set(result)


@pytest.mark.slow
def test_gradients_that_are_pushed_in_parts_arrive_whole() -> None:
    """From 1 MiB on there are several parts, and no part ends where the gradient does."""
    ended = run("--tiny", "--sizes", "300000", "--workers", "1", "--work", "W1", "--only", "distgrad,floor-zmq")

    assert ended.returncode == 0, ended.stderr


def test_a_contender_or_work_that_does_not_exist_is_refused_by_naming_those_that_do() -> None:
    for option in ("--only", "--work"):
        ended = run(option, "nothing")

        assert ended.returncode == 2
        assert "there are distgrad" in ended.stderr or "there are W1" in ended.stderr


# What is checked


def parameters_after(cell: Cell, counts: list[int]) -> np.ndarray[Any, Any]:
    """Let workers send so many gradients each, in turns, as a server would get them."""
    update, gradient = Update(cell), zeros(cell.size)
    workers = [Gradients(cell, rank) for rank in range(cell.workers)]
    for number in range(max(counts)):
        for worker, count in zip(workers, counts, strict=True):
            if number < count:
                worker.write(gradient)
                update.apply(gradient)
    return update.parameters


def lose_the_last(parameters: np.ndarray[Any, Any], gradient: np.ndarray[Any, Any]) -> None:
    parameters += gradient


def apply_twice(parameters: np.ndarray[Any, Any], gradient: np.ndarray[Any, Any]) -> None:
    parameters -= gradient


def tear(parameters: np.ndarray[Any, Any], gradient: np.ndarray[Any, Any]) -> None:
    parameters[5000:] += gradient[5000:]


def misplace(parameters: np.ndarray[Any, Any], gradient: np.ndarray[Any, Any]) -> None:
    parameters[4000:5000] = np.roll(parameters[4000:5000], 1)


@pytest.mark.parametrize("work", ["W1", "W2", "W3"])
@pytest.mark.parametrize("fault", [lose_the_last, apply_twice, tear, misplace])
def test_the_check_finds(work: str, fault: Callable[[Any, Any], None]) -> None:
    cell = Cell(work, 10_000, 2)
    parameters = parameters_after(cell, [7, 6])
    assert cell.problem(parameters, [7, 6]) is None
    gradient = zeros(cell.size)
    Gradients(cell, 1).write(gradient)

    fault(parameters, gradient * (LR if work == "W2" else 1))

    assert cell.problem(parameters, [7, 6]) is not None


def test_the_check_finds_a_gradient_that_was_changed_while_it_was_sent() -> None:
    cell = Cell("W1", 10_000, 1)
    parameters = parameters_after(cell, [3])
    second, third = zeros(cell.size), zeros(cell.size)
    worker = Gradients(cell, 0)
    for gradient in (second, second, third):
        worker.write(gradient)

    parameters += second - third

    assert cell.problem(parameters, [3]) is not None


def test_adam_is_known_to_a_step_after_many_updates() -> None:
    cell = Cell("W2", 1_000, 2)
    parameters = parameters_after(cell, [4_000, 4_000])

    assert cell.problem(parameters, [4_000, 4_000]) is None
    assert cell.problem(parameters, [4_000, 3_999]) is not None


def test_a_worker_knows_how_many_of_its_gradients_are_missing() -> None:
    cell = Cell("W1", 1_000, 1)
    worker, gradient = Gradients(cell, 0), np.empty(1_000, DTYPE)
    for _ in range(5):
        worker.write(gradient)

    assert worker.lag(parameters_after(cell, [3])) == 2


# What is made of it


def result(name: str, kind: str, rate: float, **more: object) -> dict[str, Any]:
    known = {"work": "W1", "size": 10_000, "workers": 1, "failure": None}
    return {"name": name, "label": name.title(), "kind": kind, "rate": rate, "low": rate * 0.9, "high": rate * 1.1} | (
        known | more
    )


def test_a_table_marks_the_best_that_is_no_floor_and_has_ratios_to_ours() -> None:
    table = report.tables([result("a", "ours", 200.0), result("b", "peer", 50.0), result("c", "floor", 400.0)])

    assert "| A | **200 ±10%** |" in table
    assert "| B | 50.0 ±10% |" in table
    assert "| B | 4.00 |" in table
    assert "| C | 0.50 |" in table


def test_pictures_and_tables_are_made_of_a_file_that_was_kept(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = [result(name, kind, 1e6 / size, size=size) for size in (10_000, 10**6) for name, kind in [("a", "ours")]]
    report.keep(sizes, tmp_path / "kept.json")

    ended = run("--report", str(tmp_path / "kept.json"), "--images", str(tmp_path))

    assert ended.returncode == 0, ended.stderr
    assert "| 1 M, 1 | 10 k, 1 |" in ended.stdout
    assert (tmp_path / "peers-w1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processor time is read from /proc")
def test_processor_time_counts_what_a_process_has_started() -> None:
    inner = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()

        used = processes.cpu_s([process.pid])

        process.communicate("\n")
    assert used >= 0.3
