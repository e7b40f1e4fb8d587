"""torch.distributed with gloo: a server rank that sends and receives for W1, W2 and W4, all-reduce for W3.

The server receives from whoever comes (``recv`` without a source), applies, and sends the parameters back. Under W3
there is no server: ranks all-reduce their gradients, and each applies the sum to parameters of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import harness
from benchmarks.peers.contender import PEER, Contender, needs
from benchmarks.peers.team import Link, Team, serve, work
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import Array, Cell

_SERVER = 0


class Sent(Link):
    """Send to the server rank, receive from it.

    Parameters
    ----------
    cell : Cell
        What is done.
    distributed : module
        ``torch.distributed``.
    """

    def __init__(self, cell: Cell, distributed: Any) -> None:
        super().__init__(cell)
        self._distributed = distributed
        self._parameters = zeros(cell.size)
        self._sent, self._received = map(importlib.import_module("torch").from_numpy, (self.gradient, self._parameters))

    def exchange(self) -> Array:
        """Wait for the reply."""
        self._distributed.send(self._sent, dst=_SERVER)
        self._distributed.recv(self._received, src=_SERVER)
        return self._parameters


class Reduced(Link):
    """Add up all gradients in place, and apply the sum to parameters of its own.

    Parameters
    ----------
    cell : Cell
        What is done.
    distributed : module
        ``torch.distributed``.
    """

    def __init__(self, cell: Cell, distributed: Any) -> None:
        super().__init__(cell)
        self._distributed = distributed
        self._update = Update(cell, threads=max(1, (os.cpu_count() or 1) // cell.workers))
        self._tensor = importlib.import_module("torch").from_numpy(self.gradient)

    def exchange(self) -> Array:
        """Make one step."""
        self._distributed.all_reduce(self._tensor)
        self._update.apply(self.gradient)
        return self._update.parameters


def join(cell: Cell, rank: int, folder: str) -> Any:
    """Make this process a rank; the others are found by a file."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    distributed: Any = importlib.import_module("torch.distributed")
    ranks = cell.workers if cell.steps_together else cell.workers + 1
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    return distributed


def run_worker(connection: Connection, cell: Cell, rank: int, folder: str) -> None:
    if cell.steps_together:
        distributed = join(cell, rank, folder)
        work(connection, cell, rank, Reduced(cell, distributed))
    else:
        distributed = join(cell, rank + 1, folder)
        work(connection, cell, rank, Sent(cell, distributed))
    distributed.destroy_process_group()


def run_server(connection: Connection, cell: Cell, folder: str) -> None:
    distributed = join(cell, _SERVER, folder)
    update, gradient = Update(cell), zeros(cell.size)
    received, parameters = map(importlib.import_module("torch").from_numpy, (gradient, update.parameters))

    def receive() -> int:
        rank = distributed.recv(received)
        update.apply(gradient)
        return int(rank)

    def reply(rank: int) -> None:
        distributed.send(parameters, dst=rank)

    serve(connection, cell, receive, reply)
    distributed.destroy_process_group()


@contextlib.contextmanager
def start(cell: Cell) -> Iterator[Team]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="peers"))
        # All ranks wait for each other, so none is heard before all are started.
        servers = [] if cell.steps_together else [stack.enter_context(harness.Child(run_server, cell, folder))]
        workers = [stack.enter_context(harness.Child(run_worker, cell, rank, folder)) for rank in range(cell.workers)]
        for child in [*servers, *workers]:
            child.hear()
        yield Team(cell, workers, servers, [child.pid for child in [*servers, *workers]])


CONTENDERS = (
    Contender(
        "gloo",
        "torch gloo",
        PEER,
        ("W1", "W2", "W3", "W4"),
        start,
        needs("torch"),
        listens=True,
        packages=("torch",),
        note="send and recv with a server; W3: all_reduce, and a step on each rank.",
    ),
)
