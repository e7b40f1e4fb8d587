"""torch.distributed.rpc: one call brings the gradient and returns the parameters.

Once as it is, where TensorPipe takes shared memory and copies between address spaces, and once held to TCP
(transport ``uv``, channel ``basic``). As in PyTorch's tutorials the server returns its own tensor without a copy, so
with several workers what comes back may mix two versions; the parameters themselves are changed under a lock. Under
W3 calls wait in futures (``async_execution``) until the last worker's gradient is there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import harness
from benchmarks.peers.contender import PEER, Contender, needs
from benchmarks.peers.team import Link, Team, take_part, work
from benchmarks.peers.update import Update
from benchmarks.peers.work import Array, Cell

_SERVER = "server"
_ENVIRONMENT = {"TP_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class Server:
    """What calls change; there is one in the server's process, because a call names a function.

    Parameters
    ----------
    cell : Cell
        What is done.
    """

    here: Server

    def __init__(self, cell: Cell) -> None:
        self._update = Update(cell)
        self._lock = threading.Lock()
        self._workers = cell.workers
        self._parameters = importlib.import_module("torch").from_numpy(self._update.parameters)
        self._waiting: list[Any] = []

    def exchange(self, gradient: Any) -> Any:
        """Apply a gradient, return the parameters."""
        with self._lock:
            self._update.apply(gradient.numpy())
        return self._parameters

    def step(self, gradient: Any) -> Any:
        """Apply a gradient, return a future of the parameters with those of all workers."""
        future = importlib.import_module("torch.futures").Future()
        with self._lock:
            self._update.apply(gradient.numpy())
            self._waiting.append(future)
            if len(self._waiting) == self._workers:
                done, self._waiting = self._waiting, []
                for one in done:
                    one.set_result(self._parameters)
        return future


def exchange(gradient: Any) -> Any:
    """Be called by a worker under W1, W2 and W4."""
    return Server.here.exchange(gradient)


def step(gradient: Any) -> Any:
    """Be called by a worker under W3; decorated by `join`, when torch is there."""
    return Server.here.step(gradient)


class Called(Link):
    """Call the server.

    Parameters
    ----------
    cell : Cell
        What is done.
    rpc : module
        ``torch.distributed.rpc``.
    """

    def __init__(self, cell: Cell, rpc: Any) -> None:
        super().__init__(cell)
        self._call = rpc.rpc_sync
        self._function = step if cell.steps_together else exchange
        self._tensor = importlib.import_module("torch").from_numpy(self.gradient)

    def exchange(self) -> Array:
        """Wait for the result."""
        parameters: Array = self._call(_SERVER, self._function, args=(self._tensor,)).numpy()
        return parameters


def prepare() -> None:
    """Tell torch, before it is imported, where to listen, and not to tell of its own deprecations and of every end."""
    os.environ |= _ENVIRONMENT
    warnings.simplefilter("ignore")


def join(cell: Cell, name: str, rank: int, folder: str, is_tcp: bool) -> Any:
    """Make this process a member; the others are found by a file."""
    rpc: Any = importlib.import_module("torch.distributed.rpc")
    globals()["step"] = rpc.functions.async_execution(step)
    held = {"_transports": ["uv"], "_channels": ["basic"]} if is_tcp else {}
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/store", rpc_timeout=0, **held)
    rpc.init_rpc(name, rank=rank, world_size=cell.workers + 1, rpc_backend_options=options)
    return rpc


def run_worker(connection: Connection, cell: Cell, rank: int, folder: str, is_tcp: bool) -> None:
    prepare()
    rpc = join(cell, f"worker{rank}", rank + 1, folder, is_tcp)
    work(connection, cell, rank, Called(cell, rpc))
    rpc.shutdown(graceful=False)


def run_server(connection: Connection, cell: Cell, folder: str, is_tcp: bool) -> None:
    prepare()
    Server.here = Server(cell)
    rpc = join(cell, _SERVER, 0, folder, is_tcp)
    take_part(connection, lambda count: None)
    rpc.shutdown(graceful=False)


@contextlib.contextmanager
def start(cell: Cell, is_tcp: bool) -> Iterator[Team]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="peers"))
        # All wait for each other, so none is heard before all are started.
        server = stack.enter_context(harness.Child(run_server, cell, folder, is_tcp))
        workers = [
            stack.enter_context(harness.Child(run_worker, cell, rank, folder, is_tcp)) for rank in range(cell.workers)
        ]
        for child in [server, *workers]:
            child.hear()
        yield Team(cell, workers, [server], [child.pid for child in [server, *workers]])


WORKS = ("W1", "W2", "W3", "W4")
NOTE = "With several workers, what comes back may mix two versions."
CONTENDERS = (
    Contender(
        "rpc",
        "torch rpc",
        PEER,
        WORKS,
        functools.partial(start, is_tcp=False),
        needs("torch"),
        listens=True,
        is_restless=True,  # without TCP, TensorPipe polls
        packages=("torch",),
        note=NOTE,
    ),
    Contender(
        "rpc-tcp",
        "torch rpc, held to TCP",
        PEER,
        WORKS,
        functools.partial(start, is_tcp=True),
        needs("torch"),
        listens=True,
        packages=("torch",),
        note=NOTE,
    ),
)
