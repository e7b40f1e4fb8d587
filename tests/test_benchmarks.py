"""Run every benchmark at a size that means nothing, so that the scripts stay alive; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("zmq")

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_runs_and_reports_one_line_of_json(name: str) -> None:
    if name == "memory" and not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from /proc")
    if name == "torch_step":
        pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
    before = {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*.json")}

    ended = run("--tiny", name)

    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert results
    assert len(lines) == 2 * len(results) + 1, "the results, a heading, and a row for each"
    for result, row in zip(results, lines[-len(results) :], strict=True):
        assert result["value"] > 0
        assert {"question", "target", "low", "high", "met", "machine", "python", "versions", "commit"} <= set(result)
        assert result["question"] in row
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*.json")} == before


def test_a_benchmark_that_does_not_exist_is_refused_by_naming_those_that_do() -> None:
    ended = run("push_nothing")

    assert ended.returncode == 2
    assert all(name in ended.stderr for name in NAMES)


def test_every_result_that_is_kept_belongs_to_a_benchmark_and_tells_where_it_comes_from() -> None:
    for path in BENCHMARKS.glob("results/*.json"):
        assert path.stem in {*NAMES, "peers", "stragglers"}
        text = path.read_text()
        for result in [json.loads(text)] if path.stem == "stragglers" else map(json.loads, text.splitlines()):
            assert result["machine"]["cores"] >= 1
            assert result["versions"]["distgrad"]
            assert result["commit"]


@pytest.mark.slow
def test_the_comparison_of_policies_runs() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install '.[demo]'")
    command = [sys.executable, "-m", "benchmarks.stragglers", "--tiny"]

    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)

    assert ended.returncode == 0, ended.stderr
    questions = [line.split()[0] for line in ended.stdout.splitlines()]
    assert questions == ["stragglers"] * 2 + ["quality"] * 2
