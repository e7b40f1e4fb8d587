"""distgrad as users run it: ``distgrad broker`` in a process of its own, and `Worker` in the others.

On one host worker and broker share memory; over TCP they are told not to. Two ways to use it under W1 and W2, because
they give different things:

- *own gradient included*: the parameters that come back hold what this worker has just pushed, as with every peer
  that answers a request.
- *pulling ahead*: a pull brings any version that this worker does not have yet, which is what asynchronous training
  needs; its own last gradient may still be under way. How many were missing at most is in the record.

A small gradient is copied, by `push_pull` where the parameters hold it. A large one is lent (``copy=False``): with
its own gradient included it is settled, and the array free, when the parameters come; pulling ahead, two arrays take
turns, and `Worker.settled` tells when one is free again. `pull` reuses the arrays of the pull before it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import harness
from benchmarks.peers.contender import OURS, Contender
from benchmarks.peers.team import Link, Team, team_of, work
from benchmarks.peers.update import zeros
from benchmarks.peers.work import LR, Array, Cell
from distgrad.errors import SnapshotRevoked
from distgrad.shared_pages import host_name
from distgrad_worker import Snapshot, Worker

LENT_BYTES = 1 << 18
"""Gradients from which copying costs more than knowing when an array is free again."""

_QUEUE_BYTES = 256 << 20  # the broker's default


class OwnIncluded(Link):
    """Push, and pull what holds it; under ``sync`` the pull waits for the step.

    Parameters
    ----------
    cell : Cell
        What is done.
    worker : Worker
        Connected.
    """

    pulls_copies = True

    def __init__(self, cell: Cell, worker: Worker) -> None:
        super().__init__(cell)
        self._worker = worker
        self._snapshot = worker.initialize(zeros(cell.size))
        self._copies = cell.n_bytes < LENT_BYTES
        self._revoked = 0

    def exchange(self) -> Array:
        """Return what holds all that was pushed."""
        if self._copies:
            self._snapshot = self._worker.push_pull(self.gradient, out=self._snapshot)
            return self._array()
        self._worker.push(self.gradient, copy=False)
        return self._pull()

    def finish(self) -> None:
        """Wait until everything is settled."""
        self._worker.flush()

    def notes(self) -> dict[str, Any]:
        """Tell how often a pull had to begin again."""
        return {"revoked": self._revoked}

    def _pull(self, newer_than: Snapshot | None = None) -> Array:
        copy, own = self.pulls_copies, newer_than is None
        while True:
            try:
                self._snapshot = self._worker.pull(newer_than, out=self._snapshot, own=own, copy=copy)
                break
            except SnapshotRevoked:
                self._revoked += 1
        return self._array()

    def _array(self) -> Array:
        parameters: Array = self._snapshot.parameters
        return parameters


class Received(OwnIncluded):
    """Push, and pull what holds it; large parameters stay where ZeroMQ has received them.

    Parameters
    ----------
    cell : Cell
        What is done.
    worker : Worker
        Connected.
    """

    pulls_copies = False


class Ahead(OwnIncluded):
    """Push, and pull what is newer than what was pulled last.

    Parameters
    ----------
    cell : Cell
        What is done.
    worker : Worker
        Connected.
    """

    def __init__(self, cell: Cell, worker: Worker) -> None:
        super().__init__(cell, worker)
        self._spare = self.gradient if self._copies else zeros(cell.size)
        self._spare_number = 0

    def buffer(self) -> Array:
        """Give an array that is settled."""
        if self._spare is not self.gradient:
            self.gradient, self._spare = self._spare, self.gradient
            if self._worker.settled < self._spare_number - 1:
                self._worker.flush()
        return self.gradient

    def exchange(self) -> Array:
        """Return any newer version."""
        self._spare_number = self._worker.push(self.gradient, copy=self._copies)
        return self._pull(newer_than=self._snapshot)

    def last_exchange(self) -> Array:
        """Exchange as the others do."""
        self._worker.push(self.gradient)
        self._worker.flush()
        return self._pull()


class InSlot(OwnIncluded):
    """Compute into a slot, and read the parameters where the broker has them.

    Parameters
    ----------
    cell : Cell
        What is done.
    worker : Worker
        Connected.
    """

    def __init__(self, cell: Cell, worker: Worker) -> None:
        super().__init__(cell, worker)
        self._slot = worker.slot()

    def buffer(self) -> Array:
        """Give the slot's array."""
        self._slot = self._worker.slot()
        array: Array = self._slot.open()
        return array

    def exchange(self) -> Array:
        """Return what holds all that was pushed."""
        self._snapshot = self._slot.push_pull(copy=False)
        return self._array()


def run_worker(
    connection: Connection, cell: Cell, rank: int, address: str, link: Callable[..., Link], shares: bool
) -> None:
    with Worker(address, worker_id=f"worker-{rank}", shares_memory=shares) as worker:
        work(connection, cell, rank, link(cell, worker))


@contextlib.contextmanager
def start(cell: Cell, link: Callable[..., Link], shares: bool) -> Iterator[Team]:
    options = ["--queue-bytes", str(max(_QUEUE_BYTES, 2 * cell.workers * (cell.n_bytes + 4096)))]
    if cell.work == "W2":
        options += ["--optimizer", "adam", "--lr", str(LR)]
    if cell.steps_together:
        options += ["--policy", "sync", "--workers", str(cell.workers), "--reduction", "sum"]
    with harness.Broker(*options) as broker, team_of(cell, run_worker, [broker.address, link, shares]) as team:
        yield Team(cell, team.workers, pids=[broker.pid, *team.pids])


def no_shared_memory() -> str | None:
    return None if host_name() else "memory is shared on Linux only"


PACKAGES = ("distgrad", "pyzmq", "msgpack", "numba")

CONTENDERS = (
    Contender(
        "distgrad-slot",
        "distgrad, same host, in the slot",
        OURS,
        ("W1", "W2", "W3", "W4"),
        functools.partial(start, link=InSlot, shares=True),
        no_shared_memory,
        packages=PACKAGES,
        note="`Slot.push_pull(copy=False)`: the gradient is born in shared memory, parameters are read there.",
    ),
    Contender(
        "distgrad-host",
        "distgrad, same host",
        OURS,
        ("W1", "W2", "W3", "W4"),
        functools.partial(start, link=OwnIncluded, shares=True),
        no_shared_memory,
        packages=PACKAGES,
        note="`push` and `pull` as everywhere: both copy, into and out of shared memory.",
    ),
    Contender(
        "distgrad",
        "distgrad, TCP",
        OURS,
        ("W1", "W2", "W3", "W4"),
        functools.partial(start, link=Received, shares=False),
        packages=PACKAGES,
        note="What comes back holds the worker's own gradient, as with every peer. From 256 KiB on with `copy=False`.",
    ),
    Contender(
        "distgrad-ahead",
        "distgrad, TCP, pulling ahead",
        OURS,
        ("W1", "W2"),
        functools.partial(start, link=Ahead, shares=False),
        packages=PACKAGES,
        note="What comes back is newer than what the worker had; its own last gradients may be missing (column lag).",
    ),
)
