"""Eight workers behind connections that are cut again and again: every gradient counts exactly once."""

from __future__ import annotations

import itertools
import random
import sys
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from distgrad import Admin, client
from distgrad_broker import Broker
from distgrad_worker import Worker
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

# A step's gradient is 2.4 MB: what is lent beside what is copied. Its arrays are written again as soon as it is in the
# parameters, so that whatever is still sent of them afterwards, and taken, would show.
LENT_STEPS = 40
LENT_BUDGET = (3_000_000, 8_000_000)
LENDER = f"""
import sys
import numpy as np
from distgrad_worker import Worker

control, gradients, seed = sys.argv[1:]
chance = np.random.default_rng(int(seed))
arrays = {{"a": np.zeros(300_000, np.float32), "b": np.zeros(7, np.float32), "c": np.zeros((400, 700), np.float32)}}
with Worker(control, gradients=gradients, timeout=60, shares_memory=False) as worker:
    snapshot = worker.initialize(arrays)
    for step in range({LENT_STEPS}):
        for array in arrays.values():
            array[...] = chance.integers(-3, 4, array.shape)
        snapshot = worker.push_pull(arrays, out=snapshot, copy=False)
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


def begin(stack: ExitStack) -> tuple[CuttingProxy, str, str]:
    """Start a broker and a proxy; where the broker listens comes with it."""
    program = ("broker", "--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0")
    line = stack.enter_context(Process(*program)).wait_for_line(r"control=(\S+) gradients=(\S+)")
    return stack.enter_context(CuttingProxy()), line[1], line[2]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("budget", GRADIENT_BUDGETS.values(), ids=GRADIENT_BUDGETS)
def test_through_connections_that_are_cut_every_gradient_counts_exactly_once(budget: tuple[int, int]) -> None:
    # Before anything runs: the proxy is a thread of this process, and would be slow beside it.
    expected = exact_sum()
    with ExitStack() as stack:
        proxy, at_control, at_gradients = begin(stack)
        workers = []
        for seed in range(WORKERS):
            control = proxy.listen(at_control, f"control-{seed}", control_budgets(seed))
            gradients = proxy.listen(at_gradients, f"gradients-{seed}", budgets(100 + seed, *budget))
            program = (sys.executable, "-c", PUSHER)
            workers.append(stack.enter_context(Process(control, gradients, seed, program=program)))

        for worker in workers:
            worker.wait_for_line(rf"^flushed {GRADIENTS}$", timeout=240)
            assert worker.wait() == 0

        with Admin(at_control) as admin:
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


@pytest.mark.timeout(200)
def test_what_is_lent_may_be_written_again_once_it_is_in_the_parameters_however_often_connections_are_cut() -> None:
    expected: dict[str, np.ndarray[Any, Any]] = {"a": np.zeros(300_000), "b": np.zeros(7), "c": np.zeros((400, 700))}
    for seed in range(2):
        chance = np.random.default_rng(seed)
        for _ in range(LENT_STEPS):
            for total in expected.values():
                total += chance.integers(-3, 4, total.shape)
    with ExitStack() as stack:
        proxy, at_control, at_gradients = begin(stack)
        workers = []
        for seed in range(2):
            gradients = proxy.listen(at_gradients, f"gradients-{seed}", budgets(seed, *LENT_BUDGET))
            program = (sys.executable, "-c", LENDER)
            workers.append(stack.enter_context(Process(at_control, gradients, seed, program=program)))
        for worker in workers:
            worker.wait_for_line(rf"^flushed {LENT_STEPS}$", timeout=150)
            assert worker.wait() == 0

        with Admin(at_control) as admin:
            parameters = admin.get_model_parameters()
        for name, total in expected.items():
            np.testing.assert_array_equal(parameters[name], -total)
        assert min(len(proxy.cuts[f"gradients-{seed}"]) for seed in range(2)) >= 10


@pytest.mark.timeout(60)
def test_a_gradient_that_is_sent_again_asks_for_the_parameters_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the pull that waited for it asked by itself, half a second after the connection had broken."""
    monkeypatch.setattr(client, "FIRST_RETRY_S", 1000.0)
    gradient = np.ones(FLOATS, np.float32)
    with Broker() as broker, CuttingProxy() as proxy:
        # The second gradient's connection is cut within it, as are all that come later.
        gradients = proxy.listen(broker.gradients, "gradients", itertools.repeat(60_000))
        with Worker(broker.address, gradients=gradients, shares_memory=False) as worker:
            snapshot = worker.initialize(np.zeros(FLOATS, np.float32))
            for step in range(1, 10):
                snapshot = worker.push_pull(gradient, out=snapshot)
                assert snapshot.version == step
        assert len(proxy.cuts["gradients"]) >= 5
