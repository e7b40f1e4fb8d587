"""Processes that freeze and links that go down, with a data folder: what was pushed counts once when they are back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from distgrad import Admin
from distgrad.errors import Fenced
from distgrad_worker import Worker, driver
from support.broker_process import wait_until
from support.durable_broker import DurableBroker
from support.hosts import BROKER_IP, two_hosts
from support.processes import DISTGRAD, Process
from support.proxy import CuttingProxy, budgets

FLOATS = 1_000
ONES = {"w": np.ones(FLOATS, np.float32)}

PUSHER = f"""
import sys
import numpy as np
from distgrad_worker import Worker

control, gradients, name, count = sys.argv[1], sys.argv[2] or None, sys.argv[3], int(sys.argv[4])
with Worker(control, worker_id=name, gradients=gradients, timeout=60) as worker:
    worker.initialize({{"w": np.zeros({FLOATS}, np.float32)}})
    print("ready", flush=True)
    for _ in range(count):
        worker.push({{"w": np.ones({FLOATS}, np.float32)}})
        worker.pull()
    worker.flush(timeout=100)
    print("flushed", worker.settled, flush=True)
"""


def wait_for_sum(admin: Admin, count: int) -> None:
    """Check that so many gradients of ones were applied."""
    wait_until(lambda: bool(admin.status()["version"] >= count))
    assert admin.status()["version"] == count
    np.testing.assert_array_equal(admin.get_model_parameters()["w"], np.full(FLOATS, -count, np.float32))


def test_who_pulls_from_a_restarted_broker_can_push_to_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that is pushed until the lease asks again would be computed on what the new broker began with."""
    for name in ("FIRST_RETRY_S", "LAST_RETRY_S", "LOST_RETRY_S"):
        monkeypatch.setattr(driver, name, 3600.0)
    with DurableBroker(tmp_path / "data") as broker, Worker(broker.address, timeout=60) as worker:
        worker.initialize({"w": np.zeros(FLOATS, np.float32)})
        worker.push(ONES)
        worker.flush()
        os.kill(broker.process.pid, signal.SIGSTOP)
        worker.push(ONES)
        # The lease has asked what became of it, and the broker dies with the question.
        wait_until(lambda: worker._connection.driver._asked is not None)
        broker.kill()
        broker.start()

        pulled = worker.pull(timeout=30)

        known = worker._connection.session.state
        assert known is not None
        assert known.incarnation == pulled.state.incarnation
        worker.flush(timeout=30)
        assert worker.pull().version == 2


def test_a_broker_that_freezes_goes_on_where_it_was(tmp_path: Path) -> None:
    with (
        DurableBroker(tmp_path / "data") as broker,
        Worker(broker.address, timeout=60) as worker,
        broker.admin() as admin,
    ):
        worker.initialize({"w": np.zeros(FLOATS, np.float32)})
        for _ in range(50):
            worker.push(ONES)
        os.kill(broker.process.pid, signal.SIGSTOP)
        for _ in range(50):
            worker.push(ONES)
        with pytest.raises(TimeoutError):
            worker.flush(timeout=1.0)
        os.kill(broker.process.pid, signal.SIGCONT)

        worker.flush(timeout=60)

        wait_for_sum(admin, 100)


def test_a_worker_that_freezes_beyond_its_lease_is_fenced_by_its_successor_also_after_a_restart(tmp_path: Path) -> None:
    with DurableBroker(tmp_path / "data", "--workers-silent-after", "500ms") as broker, ExitStack() as stack:
        program = (sys.executable, "-c", PUSHER)
        frozen = stack.enter_context(Process(broker.address, "", "w", 1_000_000, program=program))
        frozen.wait_for_line("^ready")
        os.kill(frozen.pid, signal.SIGSTOP)
        with Worker(broker.address, worker_id="w", timeout=60) as successor:
            first = successor.settled
            for _ in range(20):
                successor.push(ONES)
            successor.flush(timeout=60)
            broker.kill()
            broker.start()
            os.kill(frozen.pid, signal.SIGCONT)
            assert frozen.wait() == 1
            assert Fenced.__name__ in frozen.output()
            for _ in range(20):
                successor.push(ONES)
            successor.flush(timeout=60)
            assert successor.settled >= first + 40
            settled = successor.settled
        with broker.admin() as admin:
            wait_for_sum(admin, settled)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_connections_that_are_cut_and_a_broker_that_is_killed_count_once_together(tmp_path: Path) -> None:
    count = 150
    with DurableBroker(tmp_path / "data", "--checkpoint-updates", "100") as broker, ExitStack() as stack:
        proxy = stack.enter_context(CuttingProxy())
        workers = []
        for place in range(3):
            control = proxy.listen(broker.address, f"control-{place}", budgets(place, 20_000, 200_000))
            gradients = proxy.listen(broker.gradients, f"gradients-{place}", budgets(9 + place, 30_000, 120_000))
            program = (sys.executable, "-c", PUSHER)
            workers.append(stack.enter_context(Process(control, gradients, f"w{place}", count, program=program)))
        for kill in range(3):
            broker.wait_for_version(1 + 60 * kill)
            broker.kill()
            broker.start()
        for worker in workers:
            worker.wait_for_line(rf"^flushed {count}$", timeout=150)
            assert worker.wait() == 0
        with broker.admin() as admin:
            wait_for_sum(admin, 3 * count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")
def test_a_link_that_goes_down_for_a_while_delays_and_loses_nothing(tmp_path: Path) -> None:
    count = 400
    with two_hosts() as hosts:
        listen = ("--control", "tcp://*:5556", "--gradients", "tcp://*:5555", "--insecure", "--data", tmp_path / "data")
        with (
            Process("broker", *listen, program=(*hosts.broker, *DISTGRAD)) as broker,
            Process(
                f"{BROKER_IP}:5556", "", "w", count, program=(*hosts.worker, sys.executable, "-c", PUSHER)
            ) as worker,
        ):
            broker.wait_for_line(r"control=\S+")
            worker.wait_for_line("^ready")
            for _ in range(2):
                subprocess.run([*hosts.worker, "ip", "link", "set", "cable", "down"], check=True)
                threading.Event().wait(2.5)  # the outage itself
                subprocess.run([*hosts.worker, "ip", "link", "set", "cable", "up"], check=True)
                threading.Event().wait(0.5)
            worker.wait_for_line(rf"^flushed {count}$", timeout=100)
            assert worker.wait() == 0
            broker.terminate()
            assert broker.wait() == 0
            assert any(f"broker ended version={count}" in line for line in broker.lines), broker.output()
