"""distgrad over TCP, as users run it: ``distgrad broker`` in a process of its own, and `Worker` in the others.

Two ways to use it under W1 and W2, because they give different things:

- *own gradient included*: the parameters that come back hold what this worker has just pushed, as with every peer
  that answers a request. One worker pulls what is newer than the version before its gradient; several wait for
  `flush` first, since a newer version may hold only somebody else's.
- *pulling ahead*: a pull brings any version that this worker does not have yet, which is what asynchronous training
  needs; its own last gradient may still be under way. How many were missing at most is in the record.

A small gradient is copied by `push`. A large one is lent (``copy=False``): with its own gradient included it is
settled, and the array free, when the parameters come; pulling ahead, two arrays take turns, and `Worker.settled`
tells when one is free again. `pull` reuses the arrays of the pull before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import harness
from benchmarks.peers.contender import OURS, Contender
from benchmarks.peers.team import Link, Team, team_of, work
from benchmarks.peers.update import zeros
from benchmarks.peers.work import LR, Array, Cell
from distgrad.errors import SnapshotRevoked
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

    def __init__(self, cell: Cell, worker: Worker) -> None:
        super().__init__(cell)
        self._worker = worker
        self._snapshot = worker.initialize(zeros(cell.size))
        self._copies = cell.n_bytes < LENT_BYTES
        self._is_alone = cell.workers == 1
        self._steps_together = cell.steps_together
        self._revoked = 0

    def exchange(self) -> Array:
        """Return what holds all that was pushed."""
        worker = self._worker
        number = worker.push(self.gradient, copy=self._copies)
        if self._steps_together:
            return self._pull()
        if self._is_alone:
            # Every version is one gradient of this worker's.
            return self._pull(newer_than=number - 1)
        worker.flush()
        return self._pull()

    def finish(self) -> None:
        """Wait until everything is settled."""
        self._worker.flush()

    def notes(self) -> dict[str, Any]:
        """Tell how often a pull had to begin again."""
        return {"revoked": self._revoked}

    def _pull(self, newer_than: Snapshot | int | None = None) -> Array:
        while True:
            try:
                self._snapshot = self._worker.pull(newer_than=newer_than, out=self._snapshot)
                break
            except SnapshotRevoked:
                self._revoked += 1
        parameters: Array = self._snapshot.parameters
        return parameters


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


def run_worker(connection: Connection, cell: Cell, rank: int, address: str, link: Callable[..., Link]) -> None:
    with Worker(address, worker_id=f"worker-{rank}") as worker:
        work(connection, cell, rank, link(cell, worker))


@contextlib.contextmanager
def start(cell: Cell, link: Callable[..., Link]) -> Iterator[Team]:
    options = ["--queue-bytes", str(max(_QUEUE_BYTES, 2 * cell.workers * (cell.n_bytes + 4096)))]
    if cell.work == "W2":
        options += ["--optimizer", "adam", "--lr", str(LR)]
    if cell.steps_together:
        options += ["--policy", "sync", "--workers", str(cell.workers), "--reduction", "sum"]
    with harness.Broker(*options) as broker, team_of(cell, run_worker, [broker.address, link]) as team:
        yield Team(cell, team.workers, pids=[broker.pid, *team.pids])


def start_own_included(cell: Cell) -> contextlib.AbstractContextManager[Team]:
    return start(cell, OwnIncluded)


def start_ahead(cell: Cell) -> contextlib.AbstractContextManager[Team]:
    return start(cell, Ahead)


def no_shared_memory() -> str | None:
    return "distgrad has no shared memory for workers on the broker's host yet"


PACKAGES = ("distgrad", "pyzmq", "msgpack", "numba")

CONTENDERS = (
    # The place of shared memory: a worker whose link writes into a slot, and reads from the broker's versions.
    Contender(
        "distgrad-host", "distgrad, same host", OURS, ("W1", "W2", "W3", "W4"), start_own_included, no_shared_memory
    ),
    Contender(
        "distgrad",
        "distgrad, TCP",
        OURS,
        ("W1", "W2", "W3", "W4"),
        start_own_included,
        packages=PACKAGES,
        note="What comes back holds the worker's own gradient, as with every peer.",
    ),
    Contender(
        "distgrad-ahead",
        "distgrad, TCP, pulling ahead",
        OURS,
        ("W1", "W2"),
        start_ahead,
        packages=PACKAGES,
        note="What comes back is newer than what the worker had; its own last gradients may be missing (column lag).",
    ),
)
