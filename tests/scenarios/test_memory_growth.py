"""A broker's memory: it does not grow with the gradients that went through it, nor with readers that stop reading."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from distgrad import Admin, wire
from distgrad.client import ControlClient
from distgrad_broker.buffers import N_BUFFERS
from distgrad_worker import Worker
from support.broker_process import queue_up
from support.processes import Process

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MIB = 1 << 20
MAX_HELD = N_BUFFERS - 1
FOLLOWING = """
import sys
from distgrad import Reader

with Reader(sys.argv[1], shares_memory=False) as reader:
    for snapshot in reader.follow(reuse=True):
        print("version", snapshot.version, flush=True)
"""
ANY_PORTS = ("--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0")


def resident_bytes(process: Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def address_of(process: Process) -> str:
    return process.wait_for_line(r"^distgrad broker control=(\S+)")[1]


def push_through_workers(address: str, first: int, last: int, gradients: int) -> None:
    gradient = {"w": np.ones(100, np.float32)}
    for index in range(first, last):
        # Every other one keeps its id, as a program with named workers would.
        with Worker(address, worker_id=f"worker-{index}" if index % 2 else None) as worker:
            worker.initialize({"w": np.zeros(100, np.float32)})
            for step in range(gradients):
                worker.push(gradient, loss=1.0, cursor=str(step))


def grown_bytes(workers: int, gradients: int) -> int:
    """Tell by how much a broker grew between the first quarter of the workers and the last.

    Its queue is kept short: a fuller one, because the machine is busy, would look like growth.
    """
    with Process("broker", *ANY_PORTS, "--queue-bytes", "1MiB") as broker:
        address = address_of(broker)
        push_through_workers(address, 0, workers // 4, gradients)
        before = resident_bytes(broker)
        push_through_workers(address, workers // 4, workers, gradients)
        after = resident_bytes(broker)
        with Admin(address) as admin:
            status = admin.status()
    assert status["version"] == workers * gradients
    assert status["workers_live"] == 0
    return after - before


def test_a_broker_does_not_grow_with_20_000_gradients() -> None:
    assert grown_bytes(20, 1_000) < 5 * MIB


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_broker_does_not_grow_with_200_000_gradients() -> None:
    assert grown_bytes(20, 10_000) < 5_000_000


def test_readers_that_freeze_stop_no_update_and_pin_no_more_than_the_pools_versions() -> None:
    """One kind never reads what it asked for; the other reads the beginning and never asks for the rest."""
    model = 24 * MIB
    frozen = 4
    request = msgpack.packb({"v": 1, "op": "get", "newer_than": None, "wait_s": 0.0, "have": None})
    with ExitStack() as stack:
        broker = stack.enter_context(Process("broker", *ANY_PORTS, "--queue-bytes", str(2 * model)))
        address = address_of(broker)
        worker = stack.enter_context(Worker(address))
        admin = stack.enter_context(Admin(address))
        context = stack.enter_context(zmq.Context())
        worker.initialize({"w": np.zeros(model // 4, np.float32)})
        ones = {"w": np.ones(model // 4, np.float32)}

        def update(count: int) -> None:
            for _ in range(count):
                worker.push(ones)
            worker.flush(timeout=60)

        update(10)
        worker.pull()
        before = resident_bytes(broker)
        for index in range(2 * frozen):
            reader = stack.enter_context(context.socket(zmq.REQ))
            reader.linger = 0
            reader.rcvhwm = 1
            reader.connect(address)
            reader.send(request)
            if index % 2:
                assert reader.poll(20_000)
                assert msgpack.unpackb(reader.recv_multipart()[0])["token"]
            update(3)
        update(10)

        held = admin.status()["snapshots_held"]
        grown = resident_bytes(broker) - before
        assert worker.pull().parameters["w"][0] == -(10 + 2 * frozen * 3 + 10)
    assert held <= MAX_HELD
    # Each reader may have one reply of 16 MiB under way; the rest is slack for the allocator.
    assert grown <= MAX_HELD * model + frozen * 16 * MIB + 24 * MIB


def test_a_frozen_follower_and_a_reader_ten_times_too_slow_cost_one_more_version() -> None:
    """A process is stopped while it follows; a reader gets through a version while more than ten are made."""
    model = 24 * MIB
    n_parts = model // wire.PART_BYTES
    with ExitStack() as stack:
        broker = stack.enter_context(Process("broker", *ANY_PORTS, "--queue-bytes", str(2 * model)))
        address = address_of(broker)
        worker = stack.enter_context(Worker(address))
        admin = stack.enter_context(Admin(address))
        slow = stack.enter_context(ControlClient(address))
        worker.initialize({"w": np.zeros(model // 4, np.float32)})
        ones = {"w": np.ones(model // 4, np.float32)}

        def update(count: int) -> int:
            for _ in range(count):
                number = worker.push(ones)
            worker.flush(timeout=60)
            return number

        update(8)
        # As many gradients as the queue holds at a time: one more than before would look like growth.
        admin.stop()
        queue_up(admin, worker, ones, ones)
        admin.start()
        worker.flush(timeout=60)
        worker.pull()
        before = resident_bytes(broker)

        frozen = stack.enter_context(Process(address, program=(sys.executable, "-c", FOLLOWING)))
        frozen.wait_for_line("^version 10$")
        worker.push(ones)
        os.kill(frozen.pid, signal.SIGSTOP)
        held = []
        for _ in range(2):
            begun = slow.request("get", newer_than=None, wait_s=0.0, have=None)
            parts = begun.frames[1:]
            while len(parts) < n_parts:
                last = update(3)
                held.append(admin.status()["snapshots_held"])
                parts += slow.request("range", token=begun.header["token"], first=len(parts)).frames
            assert {float(np.frombuffer(part, np.float32)[0]) for part in parts} == {-float(begun.state.version)}
            assert last - begun.state.version > 10
        grown = resident_bytes(broker) - before

        assert admin.status()["version"] == last
        assert 1 <= max(held) <= MAX_HELD
        assert grown <= model + 4 * MIB
        os.kill(frozen.pid, signal.SIGCONT)
        frozen.wait_for_line(f"^version {last}$")
