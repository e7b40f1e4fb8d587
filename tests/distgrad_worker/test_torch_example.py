"""The examples of the PyTorch adapter: what they differ in is what the documentation shows, and they learn."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.broker_process import broker_process

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def code_of(name: str) -> list[str]:
    """Return an example's lines without its docstring."""
    return (EXAMPLES / name).read_text().split('"""\n', 1)[1].splitlines()


def difference() -> str:
    lines = difflib.unified_diff(code_of("torch_digits_single.py"), code_of("torch_digits.py"), lineterm="", n=0)
    return "\n".join(line for line in lines if line != "+" and not line.startswith(("---", "+++", "@@")))


def test_the_documentation_shows_what_makes_a_script_distributed() -> None:
    (shown,) = re.findall(r"^```diff\n(.*?)\n```$", (ROOT / "docs" / "torch.md").read_text(), re.MULTILINE | re.DOTALL)

    assert shown == difference()
    assert len([line for line in shown.splitlines() if line.startswith("+")]) <= 12


@pytest.mark.slow
@pytest.mark.timeout(600)  # on busy cores importing PyTorch alone takes a minute
def test_two_processes_learn_as_one_does() -> None:
    pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install '.[demo]'")
    found = [last_accuracy([sys.executable, "torch_digits_single.py"])]

    with broker_process("--policy", "sync", "--optimizer", "adam", "--lr", "0.003") as (address, _):
        worker = [sys.executable, "-m", "distgrad", "worker", address, "torch_digits:train", "--processes", "2"]
        found.append(last_accuracy(worker))

    assert min(found) > 95


def last_accuracy(command: list[str]) -> float:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # several processes that spin on each other's cores take minutes
    ended = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=250, check=False, env=env)
    assert ended.returncode == 0, ended.stderr
    return float(re.findall(r"epoch 10: .*accuracy ([\d.]+)%", ended.stdout + ended.stderr)[-1])
