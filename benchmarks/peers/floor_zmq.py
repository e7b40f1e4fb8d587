"""Floors of bare ZeroMQ over TCP, with all that distgrad does to be fast and none of what makes it safe.

- *PUSH/PULL*: gradients go one way and parameters the other as messages of 1 MiB parts; ``mallopt`` keeps freed memory;
  no high-water mark. Large arrays are lent on both sides, and the server writes the next version beside the one that it
  has lent; others are copied. It applies from the parts, and the worker receives them into one array.
- *REQ/REP* (W4 alone): one request with the raw gradient, one reply with the raw parameters.

Nothing is numbered, kept, checked or sent again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from benchmarks.peers.contender import FLOOR, Contender
from benchmarks.peers.team import Link, Team, serve, team_of, work
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import DTYPE, Array, Cell
from distgrad.sockets import Context, open_context

_PART = (1 << 20) // DTYPE.itemsize
_COPIED_BYTES = 16 << 20
"""Up to here ZeroMQ's copying, in 1 MiB parts, costs less than pyzmq's telling that a part is free again (measured)."""


def cut(array: Array) -> list[Array]:
    """View an array in parts of 1 MiB."""
    return [array[low : low + _PART] for low in range(0, array.size, _PART)]


def bound(context: Context, kind: int) -> tuple[Any, int]:
    socket = context.socket(kind)
    socket.sndhwm = socket.rcvhwm = 0
    return socket, socket.bind_to_random_port("tcp://127.0.0.1")


def connected(context: Context, kind: int, port: int) -> Any:
    socket = context.socket(kind)
    socket.sndhwm = socket.rcvhwm = 0
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


class Pushed(Link):
    """PUSH the gradient, PULL the parameters.

    Parameters
    ----------
    cell : Cell
        What is done.
    context : Context
        Of this process.
    rank : int
        Of the worker.
    ports : list of int
        Of the server: for gradients, and for each worker's parameters.
    """

    def __init__(self, cell: Cell, context: Context, rank: int, ports: list[int]) -> None:
        super().__init__(cell)
        self._gradients = connected(context, zmq.PUSH, ports[0])
        self._versions = connected(context, zmq.PULL, ports[1 + rank])
        self._copies = cell.n_bytes <= _COPIED_BYTES
        self._message = [bytes([rank]), *cut(self.gradient)]
        self._parameters = zeros(cell.size)
        self._parts = cut(self._parameters)

    def exchange(self) -> Array:
        """Wait for the parameters; then the gradient is free again as well."""
        self._gradients.send_multipart(self._message, copy=self._copies)
        for part in self._parts:
            self._versions.recv_into(part)
        return self._parameters


class Asked(Link):
    """REQ.

    Parameters
    ----------
    cell : Cell
        What is done.
    context : Context
        Of this process.
    rank : int
        Of the worker.
    ports : list of int
        Of the server.
    """

    def __init__(self, cell: Cell, context: Context, rank: int, ports: list[int]) -> None:
        super().__init__(cell)
        self._socket = connected(context, zmq.REQ, ports[0])

    def exchange(self) -> Array:
        """Wait for the reply."""
        self._socket.send(self.gradient)
        return np.frombuffer(self._socket.recv(), DTYPE)


class Current:
    """One version of the parameters, changed in place; ZeroMQ copies it.

    Parameters
    ----------
    cell : Cell
        What is done.
    """

    def __init__(self, cell: Cell) -> None:
        self._update = Update(cell)
        self._parts = cut(self._update.parameters)

    def apply(self, *parts: Array) -> None:
        """Change it."""
        self._update.apply(*parts)

    def send(self, socket: Any) -> None:
        """Send it."""
        socket.send_multipart(self._parts)


class Versions:
    """Versions of the parameters beside each other: one is current, ZeroMQ still has others.

    Parameters
    ----------
    cell : Cell
        What is done.
    """

    def __init__(self, cell: Cell) -> None:
        self._update = Update(cell)
        self._current = zeros(cell.size)
        self._free = [zeros(cell.size) for _ in range(cell.workers + 1)]
        self._lent: list[tuple[Array, list[Any]]] = []
        self._trackers: list[Any] = []

    def apply(self, *parts: Array) -> None:
        """Make the next version from the current one."""
        while not self._free:
            self._collect()
        out = self._free.pop()
        self._update.apply_beside(out, self._current, *parts)
        self._lent.append((self._current, self._trackers))
        self._current, self._trackers = out, []
        self._collect()

    def send(self, socket: Any) -> None:
        """Lend the current version to ZeroMQ."""
        self._trackers.append(socket.send_multipart(cut(self._current), copy=False, track=True))

    def _collect(self) -> None:
        is_free = [all(tracker.done for tracker in trackers) for _, trackers in self._lent]
        self._free += [version for (version, _), free in zip(self._lent, is_free, strict=True) if free]
        self._lent = [one for one, free in zip(self._lent, is_free, strict=True) if not free]


def run_pushed_worker(connection: Connection, cell: Cell, rank: int, *ports: int) -> None:
    context = open_context()
    work(connection, cell, rank, Pushed(cell, context, rank, list(ports)))
    context.destroy(linger=0)


def run_asked_worker(connection: Connection, cell: Cell, rank: int, *ports: int) -> None:
    context = open_context()
    work(connection, cell, rank, Asked(cell, context, rank, list(ports)))
    context.destroy(linger=0)


def run_pushed_server(connection: Connection, cell: Cell) -> None:
    context = open_context()
    gradients, port = bound(context, zmq.PULL)
    replies = [bound(context, zmq.PUSH) for _ in range(cell.workers)]
    connection.send([port, *[reply_port for _, reply_port in replies]])
    parameters = Current(cell) if cell.n_bytes <= _COPIED_BYTES else Versions(cell)

    def receive() -> int:
        who, *frames = gradients.recv_multipart(copy=False)
        parameters.apply(*[np.frombuffer(frame.buffer, DTYPE) for frame in frames])
        return int(who.bytes[0])

    def reply(rank: int) -> None:
        parameters.send(replies[rank][0])

    serve(connection, cell, receive, reply)
    context.destroy(linger=0)


def run_asked_server(connection: Connection, cell: Cell) -> None:
    context = open_context()
    socket, port = bound(context, zmq.REP)
    connection.send([port])
    update = Update(cell)

    def receive() -> None:
        update.apply(np.frombuffer(socket.recv(), DTYPE))

    def reply(_: None) -> None:
        socket.send(update.parameters)

    serve(connection, cell, receive, reply)
    context.destroy(linger=0)


def start_pushed(cell: Cell) -> AbstractContextManager[Team]:
    return team_of(cell, run_pushed_worker, server=run_pushed_server)


def start_asked(cell: Cell) -> AbstractContextManager[Team]:
    return team_of(cell, run_asked_worker, server=run_asked_server)


CONTENDERS = (
    Contender(
        "floor-zmq", "bare PUSH/PULL, 1 MiB parts", FLOOR, ("W1", "W2", "W3", "W4"), start_pushed, packages=("pyzmq",)
    ),
    Contender("floor-reqrep", "bare REQ/REP", FLOOR, ("W4",), start_asked, packages=("pyzmq",)),
)
