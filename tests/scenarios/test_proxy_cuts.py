"""Eight workers behind connections that are cut again and again: every gradient counts exactly once."""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack

import numpy as np
import pytest

from distgrad import Admin
from support.processes import Process
from support.proxy import Budgets, CuttingProxy, budgets

WORKERS = 8
GRADIENTS = 1000
FLOATS = 10_000
# Each worker's gradients are 40 MB, so a connection for each of at most 1.6 MB means 25 cuts or more. A connection that
# is cut after fewer bytes than a worker sends at once may lose all of them with the reset, time and again.
GRADIENT_BUDGETS = {"some-arrive": (900_000, 1_600_000), "often-none-arrives": (150_000, 300_000)}
# One connection of four lets some heartbeats through, the others parameters (40 kB) as well.
CONTROL_BUDGETS = ((1_000, 3_000), (60_000, 200_000))

PUSHER = f"""
import sys
import numpy as np
from distgrad_worker import Worker

control, gradients, seed = sys.argv[1:]
chance = np.random.default_rng(int(seed))
with Worker(control, worker_id=f"worker-{{seed}}", gradients=gradients, timeout=60) as worker:
    worker.initialize({{"w": np.zeros({FLOATS}, np.float32)}})
    for step in range({GRADIENTS}):
        gradient = {{"w": chance.integers(-3, 4, {FLOATS}).astype(np.float32)}}
        if step % 300:
            worker.push(gradient)
        else:
            worker.push_pull(gradient)
    worker.flush(timeout=100)
    print("flushed", worker.settled)
"""


def control_budgets(seed: int) -> Budgets:
    # The first connections, for the lease and for the first pull, are soon cut. Then chance decides: taking turns could
    # fall into step with a client that connects twice for each try.
    chance = random.Random(seed)
    few, many = (budgets(seed, low, high) for low, high in CONTROL_BUDGETS)
    yield from (next(few), next(few))
    while True:
        yield next(chance.choice((few, many, many, many)))


def exact_sum() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    total = np.zeros(FLOATS, np.int64)
    for seed in range(WORKERS):
        chance = np.random.default_rng(seed)
        for _ in range(GRADIENTS):
            total += chance.integers(-3, 4, FLOATS)
    return total


@pytest.mark.timeout(300)
@pytest.mark.parametrize("budget", GRADIENT_BUDGETS.values(), ids=GRADIENT_BUDGETS)
def test_through_connections_that_are_cut_every_gradient_counts_exactly_once(budget: tuple[int, int]) -> None:
    # Before anything runs: the proxy is a thread of this process, and would be slow beside it.
    expected = exact_sum()
    with ExitStack() as stack:
        broker = stack.enter_context(
            Process("broker", "--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0")
        )
        line = broker.wait_for_line(r"control=(\S+) gradients=(\S+)")
        proxy = stack.enter_context(CuttingProxy())
        workers = []
        for seed in range(WORKERS):
            control = proxy.listen(line[1], f"control-{seed}", control_budgets(seed))
            gradients = proxy.listen(line[2], f"gradients-{seed}", budgets(100 + seed, *budget))
            program = (sys.executable, "-c", PUSHER)
            workers.append(stack.enter_context(Process(control, gradients, seed, program=program)))

        for worker in workers:
            worker.wait_for_line(rf"^flushed {GRADIENTS}$", timeout=240)
            assert worker.wait() == 0

        with Admin(line[1]) as admin:
            status = admin.status()
            parameters = admin.get_model_parameters()
        assert status["version"] == WORKERS * GRADIENTS
        np.testing.assert_array_equal(parameters["w"], -expected)
        assert status["refused"] == {}
        for seed in range(WORKERS):
            cuts = proxy.cuts[f"gradients-{seed}"]
            assert len(cuts) >= 20
            assert sum(cuts) >= 5, "in mid-message"
        assert sum(len(proxy.cuts[f"control-{seed}"]) for seed in range(WORKERS)) >= WORKERS
