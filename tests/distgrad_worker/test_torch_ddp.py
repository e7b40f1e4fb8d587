"""Two workers under ``sync --workers 2`` have the losses of DDP at the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.broker_process import broker_process

pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")

SUPPORT = Path(__file__).resolve().parents[1] / "support"
STEPS = 100
RULES = {"sgd": ["--lr", "0.005", "--momentum", "0.9"], "adam": ["--lr", "0.0005"]}


def losses_of(kind: str, rule: str, place: str) -> Any:
    """Run both ranks, each a process; return the losses of their halves of each batch, shape (steps, 2)."""
    command = [sys.executable, str(SUPPORT / "torch_rank.py"), kind, rule, place, str(STEPS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(SUPPORT.parent)}
    ranks = [
        subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ended = [rank.communicate(timeout=250) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors for _, errors in ended)
    return np.array([json.loads(out.splitlines()[-1]) for out, _ in ended]).T


@pytest.mark.slow
@pytest.mark.timeout(600)  # four processes that import PyTorch; on busy cores that takes minutes
@pytest.mark.parametrize("rule", RULES)
def test_two_workers_have_the_losses_of_ddp(tmp_path: Path, rule: str) -> None:
    options = ["--policy", "sync", "--workers", "2", "--optimizer", rule, *RULES[rule]]
    with broker_process(*options) as (address, _):
        ours = losses_of("distgrad", rule, address)

    expected = losses_of("ddp", rule, str(tmp_path / "store"))

    assert ours.shape == (STEPS, 2)
    assert ours[-1].mean() < 0.9 * ours[0].mean()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
