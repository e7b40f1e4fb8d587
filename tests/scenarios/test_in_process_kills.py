"""A program with `DistributedGradients(data=…)` is killed at random moments; each batch of its data counts once."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distgrad import SGD, Adam, DistributedGradients
from support.processes import clean_environment

# What a user would write: it goes on where the last process stopped, however that ended.
PROGRAM = """
import sys
import numpy as np
from distgrad import SGD, Adam, DistributedGradients

folder, rule, n_batches = sys.argv[1], sys.argv[2], int(sys.argv[3])
optimizer = {"none": None, "adam": Adam(lr=0.01), "momentum": SGD(lr=0.5, momentum=0.5)}[rule]
shared = DistributedGradients(optimizer=optimizer, data=folder, max_queue=16)
if shared.get_model_parameters() is None:
    shared.set_model_parameters({"w": np.zeros(100, np.float32), "n": np.arange(3)})
shared.start()
first = 0 if shared.cursor is None else int(shared.cursor) + 1
print("began", shared.settled, first, flush=True)
for batch in range(first, n_batches):
    shared.add_gradients({"w": np.full(100, (batch * 7) % 11 - 5.0)}, cursor=str(batch))
    if batch % 50 == 0:
        shared.flush()
        print("settled", shared.settled, shared.cursor, flush=True)
shared.flush()
print("done", shared.settled, shared.cursor, flush=True)
"""


def train(
    folder: Path, rule: str, n_batches: int, kill_after: float | None = None, *, at_start: bool = False
) -> list[tuple[str, str, str]]:
    """Run the program, to its end or until it is killed so long after it began, or at its start; return its lines."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), rule, str(n_batches)],
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    assert process.stdout is not None
    with process:
        told = [] if at_start else [process.stdout.readline()]
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        told += process.stdout
    if kill_after is None:
        assert process.returncode == 0
    whole = [line.split() for line in told if line.endswith("\n")]
    return [(kind, number, cursor) for kind, number, cursor in whole]


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("momentum", marks=pytest.mark.slow),
        "adam",
    ],
)
def test_each_batch_counts_once_through_a_dozen_kills(tmp_path: Path, rule: str) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    n_batches, n_kills = 60_000, {"none": 12, "momentum": 3, "adam": 3}[rule]
    settled = 0
    for _ in range(n_kills):
        at_start = chance.random() < 0.25  # while it opens the folder, and recovers
        kill_after = chance.uniform(0.3, 1.5) if at_start else chance.uniform(0.0, 0.3)
        told = train(tmp_path / "data", rule, n_batches, kill_after, at_start=at_start)
        for kind, number, cursor in told:
            assert int(number) >= settled, f"what was settled is lost (seed {seed})"
            if kind != "began":
                settled = int(number)
                assert int(cursor) == settled - 1, f"a batch was added twice, or never (seed {seed})"
    n_batches = settled + 100
    *_, last = train(tmp_path / "data", rule, n_batches)

    assert last == ("done", str(n_batches), str(n_batches - 1))
    rules = {"none": None, "adam": Adam(lr=0.01), "momentum": SGD(lr=0.5, momentum=0.5)}
    with (
        DistributedGradients(optimizer=rules[rule], data=tmp_path / "data") as killed,
        DistributedGradients(optimizer=rules[rule]) as unharmed,
    ):
        unharmed.set_model_parameters(np.zeros(100, np.float32))
        unharmed.start()
        total = 0
        for batch in range(n_batches):
            total += (batch * 7) % 11 - 5
            unharmed.add_gradients(np.full(100, (batch * 7) % 11 - 5.0))
        unharmed.flush()
        found = killed.get_model_parameters()
        assert (killed.version, killed.settled, killed.queued) == (n_batches, n_batches, 0)
        assert found["n"].tolist() == [0, 1, 2]
        assert found["w"].tobytes() == unharmed.get_model_parameters().tobytes(), f"seed {seed}"
        if rule == "none":
            assert set(found["w"].tolist()) == {-total}
