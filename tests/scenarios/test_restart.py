"""Another broker on the same ports: it kept nothing, its workers say so once, and go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from distgrad import Admin
from distgrad.errors import BrokerRestarted, BrokerUnreachable
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.ports import free_port
from support.processes import Process

ZEROS = {"w": np.zeros(100, np.float32)}
ONES = {"w": np.ones(100, np.float32)}


@contextmanager
def ports() -> Iterator[dict[str, Any]]:
    yield {"control": f"tcp://127.0.0.1:{free_port()}", "gradients": f"tcp://127.0.0.1:{free_port()}"}


def test_a_worker_is_told_once_what_a_restart_lost_and_goes_on_with_its_numbers() -> None:
    with ports() as at:
        with Broker(parameters=ZEROS, **at):
            worker = Worker(at["control"], worker_id="w")
            for _ in range(5):
                worker.push(ONES)
            worker.flush()
        with Broker(**at) as broker, Admin(broker.address) as admin:

            def initialize_until_told() -> None:
                while True:
                    worker.initialize(ZEROS)

            with pytest.raises(BrokerRestarted, match="gradients 1 to 5") as caught:
                initialize_until_told()
            assert caught.value.lost == (1, 5)

            worker.initialize(ZEROS)
            assert worker.push(ONES) == 6
            worker.flush()
            assert worker.pull().version == 1
            worker.close()

            assert admin.status()["applied"] == 1
            assert admin.get_model_parameters()["w"][0] == -1


def test_gradients_that_were_not_settled_reach_the_next_broker() -> None:
    """The first broker is stopped, so nothing of it settles: all of it still counts, once, at the second one."""
    with ports() as at:
        with Broker(parameters=ZEROS, stopped=True, **at), Admin(at["control"]) as admin:
            worker = Worker(at["control"], worker_id="w")
            for _ in range(20):
                worker.push(ONES)
            while admin.status()["queued"] < 20:
                pass
        with Broker(parameters=ZEROS, **at) as broker:
            with pytest.raises(BrokerRestarted, match="none was settled") as caught:
                worker.flush(timeout=30)
            assert caught.value.lost is None
            worker.flush(timeout=30)
            worker.close()
            with Admin(broker.address) as admin:
                assert admin.get_model_parameters()["w"][0] == -20
                assert admin.status()["version"] == 20


def test_brokers_killed_in_mid_run_lose_what_they_say_and_nothing_else() -> None:
    """Every gradient is applied by exactly one of the brokers: what the last one has is what was not lost before."""
    n_gradients, kill_at = 2000, [500, 1000, 1500]
    kills = len(kill_at)
    restarts: list[BrokerRestarted] = []
    may_kill = threading.Semaphore(0)
    with ports() as at:
        command = ("broker", "--control", at["control"], "--gradients", at["gradients"])

        def train() -> None:
            with Worker(at["control"], worker_id="w", timeout=60) as worker:
                pushed = 0
                # All may be pushed and settled before the last kill: that one then takes everything.
                while pushed < n_gradients or worker.settled < n_gradients or len(restarts) < kills:
                    try:
                        worker.initialize(ZEROS)
                        while pushed < n_gradients:
                            if kill_at and pushed >= kill_at[0]:
                                worker.flush(timeout=60)
                                del kill_at[0]
                                may_kill.release()
                            pushed = worker.push(ONES)
                        worker.flush(timeout=60)
                    except BrokerRestarted as error:
                        restarts.append(error)

        process = Process(*command)
        process.wait_for_line("control=")
        trainer = threading.Thread(target=train, name="trainer")
        trainer.start()
        for _ in range(kills):
            assert may_kill.acquire(timeout=60)
            process.close()
            process = Process(*command)
            process.wait_for_line("control=")
        trainer.join()
        with Admin(at["control"]) as admin:
            status = admin.status()
            parameters = admin.get_model_parameters()
        process.close()

    assert len(restarts) == kills
    lost = max(error.lost[1] for error in restarts if error.lost is not None)
    assert status["version"] == n_gradients - lost
    assert parameters["w"].tolist() == [lost - n_gradients] * 100


def test_a_push_that_meets_a_new_broker_before_the_lease_does_tells_of_the_restart() -> None:
    with ports() as at:
        command = ("broker", "--control", at["control"], "--gradients", at["gradients"])
        process = Process(*command)
        process.wait_for_line("control=")
        worker = Worker(at["control"], worker_id="w", timeout=60)
        worker.initialize(ZEROS)
        worker.push(ONES)
        worker.flush(timeout=60)

        with worker._lock:  # the lease hears of nothing until the push itself waits for it
            process.close()
            process = Process(*command)
            process.wait_for_line("control=")
            worker._session.layout = None
            with pytest.raises(BrokerRestarted):
                worker.push(ONES)

        worker.close(timeout=60)
        process.close()


def test_a_pull_that_waits_survives_a_restart_and_sees_the_new_broker() -> None:
    with ports() as at:
        with Broker(parameters=ZEROS, **at), Admin(at["control"]) as admin:
            worker = Worker(at["control"], worker_id="w")
            snapshot = worker.pull()
            found = []
            puller = threading.Thread(target=lambda: found.append(worker.pull(newer_than=snapshot)))
            puller.start()
            while not admin.status()["waiting_pulls"]:
                pass
        with Broker(parameters=ONES, **at):
            puller.join()
            assert found[0].state.incarnation != snapshot.state.incarnation
            assert found[0].parameters["w"][0] == 1
            with pytest.raises(BrokerRestarted):
                worker.close()


def test_an_admins_command_never_reaches_another_broker_than_it_meant() -> None:
    with ports() as at, Admin(at["control"]) as admin:
        with Broker(parameters=ZEROS, **at):
            admin.status()
        with Broker(parameters=ZEROS, **at):
            with pytest.raises(BrokerRestarted):
                admin.set_model_parameters(None)
            assert admin.status()["has_parameters"]
            admin.set_model_parameters(None)
            assert not admin.status()["has_parameters"]


def test_calls_give_up_after_the_timeout_when_no_broker_comes_back() -> None:
    with ports() as at:
        with Broker(parameters=ZEROS, **at):
            worker = Worker(at["control"], worker_id="w", timeout=0.5)
            worker.push(ONES)
            worker.flush()
        worker.push(ONES)
        with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1"):
            worker.flush()
        with pytest.raises(BrokerUnreachable):
            worker.pull()
        with pytest.raises(TimeoutError):
            worker.close(timeout=0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_broker_that_is_told_to_end_applies_what_it_has_and_tells_its_workers(number: signal.Signals) -> None:
    """A flush that waits at that moment returns, instead of sending to the next broker what this one has applied."""
    n_gradients = 500
    with Process(
        "broker", "--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0", "--stopped"
    ) as process:
        address = process.wait_for_line(r"control=(\S+)")[1]
        with Admin(address) as admin, Worker(address, timeout=5) as worker:
            worker.initialize(ZEROS)
            for _ in range(n_gradients):
                worker.push(ONES)
            while admin.status()["queued"] < n_gradients:
                pass
            admin.start()
            process.interrupt() if number == signal.SIGINT else process.terminate()
            worker.flush(timeout=30)
            assert process.wait() == 0
            assert worker.settled == n_gradients
            process.wait_for_line(f"broker ended.*version={n_gradients}")
