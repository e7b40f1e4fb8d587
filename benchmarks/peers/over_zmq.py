"""ZeroMQ as one writes it by hand over TCP: REQ/REP with pickle, and ROUTER/DEALER with raw arrays.

- *REQ/REP with pickle*: ``send_pyobj`` and ``recv_pyobj`` on both sides, nothing else.
- *ROUTER/DEALER, raw*: an array is one frame. The worker lends it (``copy=False``; the reply tells that it is free
  again) and views what comes back where ZeroMQ has it. The server lends its parameters to a lone worker, which sends
  nothing before it has them all; with more workers it copies them, since the next gradient changes them.

No memory settings, no parts, no versions beside each other: `floor_zmq` shows what those bring.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from benchmarks.peers.contender import PEER, Contender
from benchmarks.peers.team import Link, Team, serve, team_of, work
from benchmarks.peers.update import Update
from benchmarks.peers.work import DTYPE, Array, Cell


class Pickled(Link):
    """REQ with pickle.

    Parameters
    ----------
    cell : Cell
        What is done.
    port : int
        Of the server.
    """

    def __init__(self, cell: Cell, port: int) -> None:
        super().__init__(cell)
        self._socket: Any = zmq.Context.instance().socket(zmq.REQ)
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def exchange(self) -> Array:
        """Wait for the reply."""
        self._socket.send_pyobj(self.gradient)
        parameters: Array = self._socket.recv_pyobj()
        return parameters


class Raw(Link):
    """DEALER with raw arrays.

    Parameters
    ----------
    cell : Cell
        What is done.
    port : int
        Of the server.
    """

    def __init__(self, cell: Cell, port: int) -> None:
        super().__init__(cell)
        self._socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def exchange(self) -> Array:
        """Wait for the reply."""
        self._socket.send(self.gradient, copy=False)
        frame: Any = self._socket.recv(copy=False)
        return np.frombuffer(frame.buffer, DTYPE)


def run_worker(connection: Connection, cell: Cell, rank: int, link: Callable[..., Link], port: int) -> None:
    work(connection, cell, rank, link(cell, port))
    zmq.Context.instance().destroy(linger=0)


def run_pickled_server(connection: Connection, cell: Cell, link: object) -> None:
    socket: Any = zmq.Context.instance().socket(zmq.REP)
    update = Update(cell)
    connection.send([socket.bind_to_random_port("tcp://127.0.0.1")])

    def receive() -> None:
        update.apply(socket.recv_pyobj())

    def reply(_: None) -> None:
        socket.send_pyobj(update.parameters)

    serve(connection, cell, receive, reply)
    zmq.Context.instance().destroy(linger=0)


def run_raw_server(connection: Connection, cell: Cell, link: object) -> None:
    socket: Any = zmq.Context.instance().socket(zmq.ROUTER)
    update = Update(cell)
    lends = cell.workers == 1
    connection.send([socket.bind_to_random_port("tcp://127.0.0.1")])

    def receive() -> bytes:
        who, gradient = socket.recv_multipart(copy=False)
        update.apply(np.frombuffer(gradient.buffer, DTYPE))
        return bytes(who.bytes)

    def reply(who: bytes) -> None:
        socket.send(who, zmq.SNDMORE)
        socket.send(update.parameters, copy=not lends)

    serve(connection, cell, receive, reply)
    zmq.Context.instance().destroy(linger=0)


def start_pickled(cell: Cell) -> AbstractContextManager[Team]:
    return team_of(cell, run_worker, [Pickled], server=run_pickled_server)


def start_raw(cell: Cell) -> AbstractContextManager[Team]:
    return team_of(cell, run_worker, [Raw], server=run_raw_server)


CONTENDERS = (
    Contender("zmq-pickle", "ZeroMQ REQ/REP, pickle", PEER, ("W1", "W2", "W4"), start_pickled, packages=("pyzmq",)),
    Contender("zmq-raw", "ZeroMQ ROUTER/DEALER, raw", PEER, ("W1", "W2", "W3", "W4"), start_raw, packages=("pyzmq",)),
)
