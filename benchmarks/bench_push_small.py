"""Measure how fast one worker pushes gradients of 1,000 floats, beside a bare PUSH/PULL loop.

Ours: `Worker.push` to ``distgrad broker`` without an optimizer, then `flush`. The floor: a loop that packs the same
header with msgpack and sends it with the array, and a loop that unpacks the header and applies the array with the same
kernel. It knows that each message has two frames, keeps nothing, and checks nothing at all.

Then four workers push as many between them as one does alone: the broker is the same.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import msgpack
import numpy as np
import zmq

from benchmarks import harness
from distgrad.blocked import sign_mask
from distgrad.executor import Executor
from distgrad.sockets import open_context
from distgrad_worker import Worker

DTYPE = np.dtype(np.float32)
SIZE = 1000
HEADER = {
    "v": 1,
    "kind": "gradient",
    "worker": "worker-0123456789ab",
    "session": "0123456789abcdef:1",
    "attempt": 1,
    "base": ["0123456789abcdef", 1, 0],
    "fingerprint": 2**63,
    "encoding": "raw",
    "examples": 1,
    "loss": None,
    "cursor": None,
}


def worker(connection: Connection, address: str, n_workers: int) -> None:
    gradient = np.full(SIZE, 1e-3, DTYPE)
    with Worker(address) as ours:
        ours.initialize(np.zeros(SIZE, DTYPE))

        def run(count: int) -> None:
            for _ in range(count // n_workers):
                ours.push(gradient)
            ours.flush()

        harness.take_rounds(connection, run)


def floor_receiver(connection: Connection) -> None:
    context = open_context()
    gradients, acknowledge = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    gradients.rcvhwm = 0
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (gradients, acknowledge)]
    kernel = Executor().kernel("step", DTYPE)
    ones, word = np.ones(1, DTYPE), sign_mask(DTYPE)
    parameters = np.zeros(SIZE, DTYPE)
    connection.send(ports)
    while True:
        header = msgpack.unpackb(gradients.recv())
        kernel.in_place(parameters, np.frombuffer(gradients.recv(), DTYPE), ones, word)
        if header["is_last"]:
            acknowledge.send(b"")


def floor_sender(connection: Connection, ports: tuple[int, int]) -> None:
    context = open_context()
    gradients, acknowledged = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    gradients.sndhwm = 0
    gradients.connect(f"tcp://127.0.0.1:{ports[0]}")
    acknowledged.connect(f"tcp://127.0.0.1:{ports[1]}")
    gradient = np.full(SIZE, 1e-3, DTYPE)

    def run(count: int) -> None:
        for number in range(count):
            header = {**HEADER, "number": number, "is_last": number == count - 1}
            gradients.send(msgpack.packb(header), zmq.SNDMORE)
            gradients.send(gradient.data)
        acknowledged.recv()

    harness.take_rounds(connection, run)


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    return [_beside_floor(tiny=tiny), _four_beside_one(tiny=tiny)]


def _beside_floor(*, tiny: bool) -> dict[str, Any]:
    with harness.Broker() as broker, harness.Child(floor_receiver) as receiver:
        ports = receiver.hear()
        with harness.Child(worker, broker.address, 1) as ours, harness.Child(floor_sender, ports) as floor:
            ours.hear()
            floor.hear()
            return harness.compare(
                "push 1,000 floats",
                0.6,
                harness.Side(ours, [ours.pid, broker.pid]),
                harness.Side(floor, [floor.pid, receiver.pid]),
                count=200 if tiny else 10_000,
                rounds=2 if tiny else 15,
                floats=SIZE,
            )


def _four_beside_one(*, tiny: bool) -> dict[str, Any]:
    with (
        harness.Broker() as broker,
        harness.Broker() as other,
        harness.several(worker, 4, broker.address, 4) as four,
        harness.Child(worker, other.address, 1) as one,
    ):
        for child in [*four, one]:
            child.hear()
        return harness.compare(
            "the same, 4 workers beside 1",
            1.0,
            harness.Side(harness.Together(four), [broker.pid, *(child.pid for child in four)]),
            harness.Side(one, [one.pid, other.pid]),
            count=200 if tiny else 10_000,
            rounds=2 if tiny else 15,
            floats=SIZE,
            workers=4,
        )
