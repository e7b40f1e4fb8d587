"""Measure how fast one worker pushes 100 MB gradients, beside a bare PUSH/PULL loop of the same parts.

Ours: `Worker.push` of 25 million float32 to ``distgrad broker`` without an optimizer, then `flush`; once with
``copy=False``, as the floor does it, and once with the copy that it makes by default. The floor: a loop
that sends the same array in 4 MiB parts, without a copy, as one message, and a loop that applies them with the same
kernel on as many threads. The floor numbers nothing, keeps nothing and checks nothing, and never copies the gradient:
its sender's array must not change while ZeroMQ has it, which only a benchmark can promise.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from benchmarks import harness
from distgrad.arrays import aligned_empty
from distgrad.blocked import sign_mask
from distgrad.executor import Executor
from distgrad.sockets import open_context
from distgrad.wire import MAX_FRAME_BYTES
from distgrad_worker import Worker

DTYPE = np.dtype(np.float32)


def worker(connection: Connection, address: str, size: int, copy: bool) -> None:
    gradient = np.full(size, 1e-3, DTYPE)
    with Worker(address, shares_memory=False) as ours:
        ours.initialize(np.zeros(size, DTYPE))

        def run(count: int) -> None:
            for _ in range(count):
                ours.push(gradient, copy=copy)
            ours.flush()

        harness.take_rounds(connection, run)


def floor_receiver(connection: Connection, size: int) -> None:
    context = open_context()
    gradients, acknowledge = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    gradients.rcvhwm = 0
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (gradients, acknowledge)]
    executor = Executor()
    kernel = executor.kernel("step", DTYPE)
    ones, word = np.ones(1, DTYPE), sign_mask(DTYPE)
    parameters, following = aligned_empty(size, DTYPE), aligned_empty(size, DTYPE)
    parameters[:] = following[:] = 0
    connection.send(ports)
    while True:
        frames: list[Any] = gradients.recv_multipart(copy=False)
        calls, low = [], 0
        for frame in frames[1:]:
            part = np.frombuffer(frame.buffer, DTYPE)
            high = low + part.size
            calls.append((following[low:high], parameters[low:high], part, ones, word))
            low = high
        executor.run(kernel.beside, calls, split=True)
        parameters, following = following, parameters
        if frames[0].bytes == b"last":
            acknowledge.send(b"")


def floor_sender(connection: Connection, size: int, ports: tuple[int, int]) -> None:
    context = open_context()
    gradients, acknowledged = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    gradients.sndhwm = 0
    gradients.connect(f"tcp://127.0.0.1:{ports[0]}")
    acknowledged.connect(f"tcp://127.0.0.1:{ports[1]}")
    gradient = aligned_empty(size, DTYPE)
    gradient[:] = 1e-3
    step = MAX_FRAME_BYTES // DTYPE.itemsize
    parts = [gradient[low : low + step].data for low in range(0, size, step)]

    def run(count: int) -> None:
        for left in reversed(range(count)):
            gradients.send_multipart([b"" if left else b"last", *parts], copy=False)
        acknowledged.recv()

    harness.take_rounds(connection, run)


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    # The floor lends its array to ZeroMQ, and so does a push that is told to; by default a push copies.
    return [
        measure_one("push 100 MB, lent", 0.85, copy=False, tiny=tiny),
        measure_one("push 100 MB, copied", 0.75, copy=True, tiny=tiny),
    ]


def measure_one(question: str, target: float, *, copy: bool, tiny: bool) -> dict[str, Any]:
    size = 300_000 if tiny else 25_000_000
    with harness.Broker() as broker, harness.Child(floor_receiver, size) as receiver:
        ports = receiver.hear()
        with (
            harness.Child(worker, broker.address, size, copy) as ours,
            harness.Child(floor_sender, size, ports) as floor,
        ):
            ours.hear()
            floor.hear()
            return harness.compare(
                question,
                target,
                harness.Side(ours, [ours.pid, broker.pid]),
                harness.Side(floor, [floor.pid, receiver.pid]),
                count=2 if tiny else 8,
                rounds=2 if tiny else 15,
                floats=size,
            )
