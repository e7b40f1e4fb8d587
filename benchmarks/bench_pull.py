"""Measure how fast one worker pulls 100 MB of parameters, beside a bare REQ/REP of the same parts.

Ours: `Worker.pull` from ``distgrad broker``, into the arrays of the former pull, as a training loop does. Floor: one
request is answered with all 1 MiB parts at once, without a copy on either side: what arrives is left in ZeroMQ's
frames, where it is in no array yet. Ours asks in short ranges, and copies the parts to their places.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from benchmarks import harness
from distgrad.arrays import aligned_empty
from distgrad.sockets import open_context
from distgrad_worker import Worker

PART = 1 << 20
DTYPE = np.dtype(np.float32)


def worker(connection: Connection, address: str, size: int) -> None:
    with Worker(address, shares_memory=False) as ours:
        snapshot = ours.initialize(np.zeros(size, DTYPE))

        def run(count: int) -> None:
            nonlocal snapshot
            for _ in range(count):
                snapshot = ours.pull(out=snapshot)

        harness.take_rounds(connection, run)


def floor_server(connection: Connection, size: int) -> None:
    socket = open_context().socket(zmq.REP)
    socket.sndhwm = 0
    connection.send(socket.bind_to_random_port("tcp://127.0.0.1"))
    parameters = aligned_empty(size, DTYPE)
    parameters[:] = 0
    step = PART // DTYPE.itemsize
    parts = [parameters[low : low + step].data for low in range(0, size, step)]
    while True:
        socket.recv()
        socket.send_multipart(parts, copy=False)


def floor_client(connection: Connection, port: int) -> None:
    socket = open_context().socket(zmq.REQ)
    socket.rcvhwm = 0
    socket.connect(f"tcp://127.0.0.1:{port}")

    def run(count: int) -> None:
        for _ in range(count):
            socket.send(b"get")
            socket.recv_multipart(copy=False)

    harness.take_rounds(connection, run)


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    size = 300_000 if tiny else 25_000_000
    with harness.Broker() as broker, harness.Child(floor_server, size) as server:
        port = server.hear()
        with harness.Child(worker, broker.address, size) as ours, harness.Child(floor_client, port) as floor:
            ours.hear()
            floor.hear()
            return [
                harness.compare(
                    "pull 100 MB",
                    0.7,
                    harness.Side(ours, [ours.pid, broker.pid]),
                    harness.Side(floor, [floor.pid, server.pid]),
                    count=2 if tiny else 8,
                    rounds=2 if tiny else 15,
                    floats=size,
                )
            ]
