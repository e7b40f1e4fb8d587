"""Floor of a raw TCP socket: no message format, no library, one connection for each worker.

The server waits for whichever connection has something, receives the gradient by 1 MiB and applies each piece while
it is in the cache, then sends the parameters. A worker sends all, then receives all, into an array that it has already.
Parameters are changed in place by one thread that also sends them, so no version is ever torn.
"""

from __future__ import annotations

import selectors
import socket
from collections import deque
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.peers.contender import FLOOR, Contender
from benchmarks.peers.team import Link, Team, serve, team_of, work
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import DTYPE, Array, Cell

_PIECE = (1 << 20) // DTYPE.itemsize
_BUFFER_BYTES = 4 << 20


class Stream(Link):
    """Send the gradient, receive the parameters.

    Parameters
    ----------
    cell : Cell
        What is done.
    rank : int
        Of the worker.
    port : int
        Of the server.
    """

    def __init__(self, cell: Cell, rank: int, port: int) -> None:
        super().__init__(cell)
        self._socket = socket.create_connection(("127.0.0.1", port))
        tune(self._socket)
        self._parameters = zeros(cell.size)

    def exchange(self) -> Array:
        """Wait for the last byte."""
        self._socket.sendall(self.gradient.data)
        receive_all(self._socket, self._parameters)
        return self._parameters


def tune(stream: socket.socket) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def receive_all(stream: socket.socket, array: Array) -> None:
    """Fill an array."""
    left = array.data.cast("B")
    while left:
        n_bytes = stream.recv_into(left)
        if not n_bytes:
            raise EOFError("the other side is gone")
        left = left[n_bytes:]


def run_worker(connection: Connection, cell: Cell, rank: int, port: int) -> None:
    work(connection, cell, rank, Stream(cell, rank, port))


def run_server(connection: Connection, cell: Cell) -> None:
    update = Update(cell)
    piece = np.zeros(min(_PIECE, cell.size), DTYPE)
    ready: deque[socket.socket] = deque()
    with socket.create_server(("127.0.0.1", 0)) as listener, selectors.DefaultSelector() as selector:
        connection.send([listener.getsockname()[1]])
        for _ in range(cell.workers):
            stream, _ = listener.accept()
            tune(stream)
            selector.register(stream, selectors.EVENT_READ, stream)

        def receive() -> socket.socket:
            if not ready:
                ready.extend(key.data for key, _ in selector.select())
            stream = ready.popleft()
            update.begin()
            for low in range(0, cell.size, _PIECE):
                part = piece[: min(_PIECE, cell.size - low)]
                receive_all(stream, part)
                update.apply_part(low, part)
            return stream

        def reply(stream: socket.socket) -> None:
            stream.sendall(update.parameters.data)

        serve(connection, cell, receive, reply)


def start(cell: Cell) -> AbstractContextManager[Team]:
    return team_of(cell, run_worker, server=run_server)


CONTENDERS = (Contender("floor-socket", "raw TCP socket", FLOOR, ("W1", "W2", "W3", "W4"), start),)
