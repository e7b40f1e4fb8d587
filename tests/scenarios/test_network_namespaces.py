"""Broker and workers on two hosts, with keys: who has none, or the wrong one, gets nothing and is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.hosts import BROKER_IP, Hosts, two_hosts
from support.key_folders import KeyFolder, make_key_folder
from support.processes import DISTGRAD, Process, clean_environment

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")

WORKER = """
import sys
import numpy as np
from distgrad_worker import Worker

address, key, name = sys.argv[1:]
with Worker(address, worker_id=name, keys=key or None, timeout=30 if "good" in name else 4) as worker:
    snapshot = worker.initialize({"w": np.zeros(100_000, np.float32)})
    for _ in range(20):
        worker.push({"w": np.ones(100_000, np.float32)}, base_version=snapshot)
    worker.flush(timeout=60)
    print("flushed", worker.settled)
"""

# Past Worker, which would not let them: gradients straight into the channel, with a key that may do other things.
PUSHED = 5
PUSHER = f"""
import sys
import zmq
from distgrad import sockets, wire
from distgrad.keys import ClientKeys

endpoint, key = sys.argv[1:]
fields = dict(worker="good-0", session="x", attempt=1, number=1, fingerprint=0)
with sockets.open_context() as context, sockets.gradient_client(context, endpoint, keys=ClientKeys.load(key)) as push:
    push.raw().linger = 10_000
    for _ in range({PUSHED}):
        push.send_multipart([wire.pack(dict(fields, v=1, kind="gradient")), b"1234"])
    push.raw().close(10_000)
"""


class Stage(NamedTuple):
    hosts: Hosts
    keys: KeyFolder
    broker: Process
    address: str
    gradients: str

    def status(self) -> dict[str, Any]:
        key = str(self.keys.admin)
        command = [*self.hosts.broker, *DISTGRAD, "admin", self.address, "--keys", key, "status", "--json"]
        environment = clean_environment()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def status_when(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask until something is so; what is counted comes from other threads and processes."""
        for _ in range(20):
            status = self.status()
            if is_so(status):
                return status
        raise AssertionError(status)

    def run_worker(self, name: str, key: Path | str) -> Process:
        program = (*self.hosts.worker, sys.executable, "-c", WORKER)
        return Process(self.address, key, name, program=program)

    def run_pusher(self, key: Path) -> Process:
        program = (*self.hosts.worker, sys.executable, "-c", PUSHER)
        return Process(self.gradients, key, program=program)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    keys = make_key_folder(tmp_path)
    with two_hosts() as hosts:
        listen = ("--control", "tcp://*:5556", "--gradients", "tcp://*:5555")
        with Process("broker", *listen, "--keys", keys.folder, program=(*hosts.broker, *DISTGRAD)) as broker:
            broker.wait_for_line(r"control=\S+ gradients=\S+")
            yield Stage(hosts, keys, broker, f"{BROKER_IP}:5556", f"tcp://{BROKER_IP}:5555")


def test_workers_on_another_host_train_and_strangers_get_nothing(stage: Stage, tmp_path: Path) -> None:
    other = make_key_folder(tmp_path, "other")

    with ExitStack() as stack:
        good = [stack.enter_context(stage.run_worker(f"good-{index}", stage.keys.worker)) for index in range(2)]
        without = stack.enter_context(stage.run_worker("without-a-key", ""))
        foreign = stack.enter_context(stage.run_worker("with-a-key-of-another-broker", other.worker))
        wrong = stack.enter_context(stage.run_worker("with-the-wrong-role", stage.keys.read))
        pusher = stack.enter_context(stage.run_pusher(stage.keys.admin))

        for worker in good:
            worker.wait_for_line(r"^flushed 20$")
            assert worker.wait() == 0
        for stranger, error in ((without, "BrokerUnreachable"), (foreign, "BrokerUnreachable"), (wrong, "Forbidden")):
            assert stranger.wait() == 1
            assert error in stranger.output()
        assert pusher.wait() == 0, pusher.output()

    status = stage.status_when(
        lambda status: (
            {"other_broker", "forbidden"} <= status["rejected"].keys()
            # Who hangs up first, the client that finds no keys or the broker, decides what the broker can tell of it.
            and not {"no_key", "handshake"}.isdisjoint(status["rejected"])
            # One hello of the reader, and what the admin's key pushed.
            and status["rejected"]["forbidden"] == 1 + PUSHED
        )
    )
    assert status["version"] == 40
    assert status["workers"] == 2
