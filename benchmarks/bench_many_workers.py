"""Measure what a gradient costs where 256 workers are connected, and what a stopped worker costs the others.

- *256 workers*: four processes with 64 `Worker`s each, which share a ZeroMQ context, push in turn. The floor: four
  processes with one each.
- *one is stopped*: three workers push beside a fourth that is frozen (SIGSTOP) while it pushes 4 MB gradients. The
  floor: the same three alone.

Both sides are ours: a broker each, one side idle while the other runs. Linux only.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from benchmarks import harness
from distgrad_worker import Worker

DTYPE = np.dtype(np.float32)
SIZE, LARGE_SIZE = 1_000, 1_000_000
N_PROCESSES, N_EACH = 4, 64


def pushers(connection: Connection, address: str, size: int, n_workers: int) -> None:
    gradient = np.full(size, 1e-3, DTYPE)
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        workers = [stack.enter_context(Worker(address, shares_memory=False, context=context)) for _ in range(n_workers)]
        for worker in workers:
            worker.initialize(np.zeros(size, DTYPE))

        def run(count: int) -> None:
            for number in range(count):
                workers[number % n_workers].push(gradient)
            for worker in workers[:count]:
                worker.flush()

        harness.take_rounds(connection, run)


def endless_pusher(connection: Connection, address: str, size: int) -> None:
    gradient = np.full(size, 1e-3, DTYPE)
    with Worker(address, shares_memory=False, worker_id="stopped") as worker:
        worker.initialize(np.zeros(size, DTYPE))
        connection.send("ready")
        while True:
            number = worker.push(gradient)
            connection.send(number)


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    return [_many(tiny=tiny), _stopped(tiny=tiny)]


def _many(*, tiny: bool) -> dict[str, Any]:
    each = 4 if tiny else N_EACH
    with (
        harness.Broker() as broker,
        harness.Broker() as other,
        harness.several(pushers, N_PROCESSES, broker.address, SIZE, each) as many,
        harness.several(pushers, N_PROCESSES, other.address, SIZE, 1) as few,
    ):
        for child in [*many, *few]:
            child.hear()
        return harness.compare(
            f"push, {N_PROCESSES * each} workers",
            0.8,  # a gradient's cost at most 1.25 times that with four
            harness.Side(harness.Together(many), [broker.pid, *(child.pid for child in many)]),
            harness.Side(harness.Together(few), [other.pid, *(child.pid for child in few)]),
            count=40 if tiny else 10_000,
            rounds=2 if tiny else 9,
            floats=SIZE,
            workers=N_PROCESSES * each,
        )


def _stopped(*, tiny: bool) -> dict[str, Any]:
    size = 10_000 if tiny else LARGE_SIZE
    with (
        harness.Broker() as broker,
        harness.Broker() as other,
        harness.several(pushers, 3, broker.address, size, 1) as beside,
        harness.several(pushers, 3, other.address, size, 1) as alone,
        harness.Child(endless_pusher, broker.address, size) as stopped,
    ):
        for child in [*beside, *alone]:
            child.hear()
        for _ in range(5):
            stopped.hear()  # it is on its way
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            return harness.compare(
                "push, one of 4 is stopped",
                0.9,
                harness.Side(harness.Together(beside), [broker.pid, *(child.pid for child in beside)]),
                harness.Side(harness.Together(alone), [other.pid, *(child.pid for child in alone)]),
                count=4 if tiny else 60,
                rounds=2 if tiny else 9,
                floats=size,
            )
        finally:
            os.kill(stopped.pid, signal.SIGKILL)
