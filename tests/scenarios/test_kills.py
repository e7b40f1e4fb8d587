"""Brokers and workers under ``kill -9``, with a data folder: every gradient counts exactly once, to the bit."""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.durable_broker import DurableBroker
from support.processes import Process
from support.random_kills import kill_in_turns

WORKERS = 8
FLOATS = 1_000

# A worker that is killed goes on, under its id, behind the cursor of the last gradient that the broker has.
PUSHER = f"""
import sys
import numpy as np
from distgrad_worker import Worker

control, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Worker(control, worker_id=f"worker-{{seed}}", timeout=60) as worker:
    worker.initialize({{"w": np.zeros({FLOATS}, np.float32)}})
    first = 0 if worker.cursor is None else int(worker.cursor) + 1
    for step in range(first, count):
        chance = np.random.default_rng([seed, step])
        worker.push({{"w": chance.integers(-3, 4, {FLOATS}).astype(np.float32)}}, cursor=str(step))
        if step % 50 == 0:
            worker.pull()
    worker.flush(timeout=100)
    print("flushed", worker.settled, flush=True)
"""

# One worker of a fixed set; each step's batch is the same whatever happens.
TRAINER = """
import sys
import numpy as np
from distgrad_worker import Worker

sys.path.insert(0, sys.argv[4])
import digits

control, place, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
(x, y), _ = digits.load_data()
with Worker(control, worker_id=f"worker-{place}", timeout=60) as worker:
    worker.initialize(digits.new_parameters())
    for step in range(steps):
        rows = np.random.default_rng([place, step]).choice(len(x), 16, replace=False)
        loss, gradient = digits.gradient(worker.pull().parameters, x[rows], y[rows])
        worker.push(gradient, loss=loss)
    worker.flush(timeout=100)
"""


def exact_sum(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    total = np.zeros(FLOATS, np.int64)
    for seed in range(WORKERS):
        for step in range(count):
            total += np.random.default_rng([seed, step]).integers(-3, 4, FLOATS)
    return total


def kill_at_random(tmp_path: Path, count: int, kills: int, seed: int, *options: str) -> None:
    """Run all workers to their end while brokers and workers are killed, and check the sum."""
    with ExitStack() as stack:
        broker = stack.enter_context(DurableBroker(tmp_path / "data", *options))

        def begin(place: int) -> Process:
            program = (sys.executable, "-c", PUSHER)
            return stack.enter_context(Process(broker.address, place, count, program=program))

        workers = [begin(place) for place in range(WORKERS)]
        broker.wait_for_version(1)
        kill_in_turns(broker, workers, begin, 2 * kills, seed)
        for worker in workers:
            worker.wait_for_line(rf"^flushed {count}$", timeout=240)
            assert worker.wait() == 0
        with broker.admin() as admin:
            status, parameters = admin.status(), admin.get_model_parameters()
        assert status["version"] == status["applied"] == WORKERS * count
        assert status["refused"] == {}
        np.testing.assert_array_equal(parameters["w"], -exact_sum(count))
        broker.stop()
        broker.start()  # and all of that is in the folder
        with broker.admin() as admin:
            np.testing.assert_array_equal(admin.get_model_parameters()["w"], parameters["w"])


@pytest.mark.timeout(300)
def test_a_few_kills_of_broker_and_workers_lose_and_double_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 150, 3, 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_few_kills_with_checkpoints_alone_lose_and_double_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 100, 2, 2, "--durability", "checkpoint")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "options", [(), ("--checkpoint-updates", "500", "--segment-bytes", "1MiB"), ("--durability", "checkpoint")]
)
def test_thirty_kills_of_each_lose_and_double_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    kill_at_random(tmp_path, 2_500, 30, 3, *options)


def train(folder: Path, steps: int, kills: int) -> dict[str, bytes]:
    """Train the digits with a fixed set of four, and give the parameters' bytes."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install '.[demo]'")
    examples = Path(__file__).resolve().parents[2] / "examples"
    chance = random.Random(kills)
    with ExitStack() as stack:
        options = ("--policy", "sync", "--workers", "4", "--optimizer", "adam", "--lr", "0.001")
        broker = stack.enter_context(DurableBroker(folder, *options, "--checkpoint-updates", "20"))
        program = (sys.executable, "-c", TRAINER)
        workers = [
            stack.enter_context(Process(broker.address, place, steps, examples, program=program)) for place in range(4)
        ]
        for kill in range(kills):
            # Spread over the run, so that each of them hits it.
            broker.wait_for_version(steps * (kill + 1) // (kills + 2) + chance.randrange(3))
            broker.kill()
            broker.start()
        for worker in workers:
            assert worker.wait(240) == 0, worker.output()
        with broker.admin() as admin:
            status, parameters = admin.status(), admin.get_model_parameters()
    assert status["version"] == steps
    assert status["superseded"] == 0
    return {name: array.tobytes() for name, array in parameters.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fixed_set_trains_to_the_same_bytes_with_ten_kills_of_its_broker_as_without(tmp_path: Path) -> None:
    assert train(tmp_path / "killed", 200, 10) == train(tmp_path / "calm", 200, 0)
