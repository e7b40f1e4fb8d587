"""Workers that are killed, come late or come back, under each policy: nobody waits for the dead beyond their lease."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from distgrad import Admin
from distgrad_worker import Worker
from support.broker_process import broker_process, wait_until
from support.processes import Process

LEASE_S = "1s"
ENOUGH = 30  # gradients of each survivor after the kill

PROGRAM = """
import sys
import numpy as np
from distgrad_worker import Worker

worker = Worker(sys.argv[1], worker_id=sys.argv[2])
ones = {"w": np.ones(100, np.float32)}
while True:
    worker.pull()
    worker.push(ones)
"""

POLICIES = {
    "sync": ("--policy", "sync"),
    "quorum": ("--policy", "sync", "--quorum", "2"),
    "quorum and grace": ("--policy", "sync", "--quorum", "2", "--grace", "50ms"),
    "bounded": ("--policy", "bounded", "--bound", "1"),
    "buffered": ("--policy", "buffered", "--buffer-size", "4"),
}


@contextmanager
def training(*options: str) -> Iterator[tuple[str, Admin]]:
    with (
        broker_process("--workers-silent-after", LEASE_S, *options) as (address, _),
        Admin(address, timeout=20) as admin,
    ):
        admin.set_model_parameters({"w": np.zeros(100, np.float32)})
        yield address, admin


def start(stack: ExitStack, address: str, worker: str) -> Process:
    return stack.enter_context(Process(address, worker, program=(sys.executable, "-c", PROGRAM)))


def applied(admin: Admin, worker: str) -> int:
    """Count what was applied of a worker's; 0 if it is not known."""
    return next((int(known["applied"]) for known in admin.workers() if known["id"] == worker), 0)


def wait_for_more(admin: Admin, *workers: str, more: int = ENOUGH) -> None:
    targets = {worker: applied(admin, worker) + more for worker in workers}
    wait_until(lambda: all(applied(admin, worker) >= target for worker, target in targets.items()))


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_a_killed_worker_does_not_stop_the_others_and_one_more_joins(options: tuple[str, ...]) -> None:
    with training(*options) as (address, admin), ExitStack() as stack:
        victim = start(stack, address, "victim")
        for worker in ("a", "b"):
            start(stack, address, worker)
        wait_for_more(admin, "victim", "a", "b", more=3)

        victim.kill()

        # Well beyond what could have been under way; the suite's own limit ends a wait for ever.
        wait_for_more(admin, "a", "b")
        start(stack, address, "late")
        wait_for_more(admin, "late", "a", "b", more=3)
        status = admin.status()
        assert status["refused"] == {}
        assert status["applied"] >= 2 * ENOUGH


def test_a_fixed_set_waits_for_a_killed_member_names_it_and_goes_on_when_it_returns() -> None:
    with training("--policy", "sync", "--workers", "3") as (address, admin), ExitStack() as stack:
        processes = {worker: start(stack, address, worker) for worker in ("a", "b", "c")}
        wait_for_more(admin, *processes, more=3)

        processes["b"].kill()

        wait_until(lambda: admin.status()["waits_for"] == ["b"] and admin.status()["held"] == 2)
        standing = admin.status()["version"]
        wait_until(lambda: any(known["state"] == "silent" for known in admin.workers()))
        assert admin.status()["version"] == standing
        start(stack, address, "b")
        wait_for_more(admin, "a", "b", "c")
        # In one reply, so of one moment: each step has one gradient of each.
        assert len({known["applied"] for known in admin.workers()}) == 1
        assert admin.status()["refused"] == {}


def test_a_worker_that_never_comes_back_to_a_fixed_set_lets_a_pull_time_out_and_not_hang() -> None:
    with training("--policy", "sync", "--workers", "2") as (address, _), Worker(address, worker_id="a") as worker:
        worker.pull()
        worker.push({"w": np.ones(100, np.float32)})

        with pytest.raises(TimeoutError, match="nothing within"):
            worker.pull(timeout=0.3)
        with Worker(address, worker_id="b") as other:
            other.pull()
            other.push({"w": np.ones(100, np.float32)})
            assert worker.pull(timeout=20).version == 1
