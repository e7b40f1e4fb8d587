"""A pipe of `multiprocessing` to each worker: ``send`` and ``recv`` of NumPy arrays, which pickles them.

The server waits for all pipes (``multiprocessing.connection.wait``), applies what has come, and sends the parameters
back on the same pipe. Nothing is tuned: this is what the standard library's documentation shows.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

from benchmarks import harness
from benchmarks.peers.contender import PEER, Contender
from benchmarks.peers.team import Link, Team, serve, work
from benchmarks.peers.update import Update
from benchmarks.peers.work import Array, Cell


class Pipe(Link):
    """Send the gradient, receive the parameters.

    Parameters
    ----------
    cell : Cell
        What is done.
    pipe : Connection
        To the server.
    """

    def __init__(self, cell: Cell, pipe: Connection) -> None:
        super().__init__(cell)
        self._pipe = pipe

    def exchange(self) -> Array:
        """Wait for the reply."""
        self._pipe.send(self.gradient)
        parameters: Array = self._pipe.recv()
        return parameters


def run_worker(connection: Connection, cell: Cell, rank: int, pipe: Connection) -> None:
    work(connection, cell, rank, Pipe(cell, pipe))


def run_server(connection: Connection, cell: Cell, pipes: list[Connection]) -> None:
    update = Update(cell)
    ready: deque[Connection] = deque()

    def receive() -> Connection:
        if not ready:
            ready.extend(pipe for pipe in wait(pipes) if isinstance(pipe, Connection))
        pipe = ready.popleft()
        update.apply(pipe.recv())
        return pipe

    def reply(pipe: Connection) -> None:
        pipe.send(update.parameters)

    serve(connection, cell, receive, reply)


@contextlib.contextmanager
def start(cell: Cell) -> Iterator[Team]:
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(cell.workers)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(harness.Child(run_server, cell, [ours for ours, _ in pairs]))
        workers = [
            stack.enter_context(harness.Child(run_worker, cell, rank, theirs)) for rank, (_, theirs) in enumerate(pairs)
        ]
        for pair in pairs:
            for end in pair:
                end.close()
        for child in [server, *workers]:
            child.hear()
        yield Team(cell, workers, [server], [child.pid for child in [server, *workers]])


CONTENDERS = (
    Contender("pipe", "pipe with pickle", PEER, ("W1", "W2", "W3", "W4"), start, note="multiprocessing.Pipe"),
)
