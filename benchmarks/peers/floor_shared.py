"""Floors of shared memory with a bare notice: gradients and versions lie where both sides see them, one byte tells.

A worker has one slot for its gradient. The server applies it to the current version, writes the next one beside
that, and tells the worker its number. The worker reads it where it is, until it is given another one; then the server
may write there again. A notice is a byte in a pipe (the workers share one), so whoever waits sleeps.

- *in the slot*: the worker writes its gradient straight to its slot.
- *copied in*: it writes to an array of its own and copies that.

Nothing is numbered, kept or checked, and who dies leaves the others waiting.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.peers.contender import FLOOR, Contender
from benchmarks.peers.team import Link, Team, serve, work
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import DTYPE, Array, Cell

_FOLDER = Path("/dev/shm")
_PAGE = 1 << 21


class Region:
    """The shared file, mapped: a slot for each worker, and versions.

    Parameters
    ----------
    cell : Cell
        What is done.
    path : Path
        Of the file.
    """

    def __init__(self, cell: Cell, path: Path) -> None:
        stride = -(-cell.n_bytes // _PAGE) * _PAGE
        n_versions = cell.workers + 2  # one for each worker, the current one, and the next
        with path.open("r+b") as file:
            total = stride * (cell.workers + n_versions)
            if os.fstat(file.fileno()).st_size != total:
                file.truncate(total)
            pages = mmap.mmap(file.fileno(), total)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        arrays = [np.frombuffer(pages, DTYPE, cell.size, low) for low in range(0, total, stride)]
        self.slots, self.versions = arrays[: cell.workers], arrays[cell.workers :]


class Slot(Link):
    """Write to the slot, read from the version.

    Parameters
    ----------
    cell : Cell
        What is done.
    rank : int
        Of the worker.
    path : Path
        Of the shared file.
    pipes : tuple of Connection
        To write notices to, and to read them from.
    copies : bool
        Whether the gradient is written elsewhere first.
    """

    def __init__(self, cell: Cell, rank: int, path: Path, pipes: tuple[Connection, Connection], copies: bool) -> None:
        self._region = Region(cell, path)
        self._slot = self._region.slots[rank]
        self.gradient = zeros(cell.size) if copies else self._slot
        self._copies = copies
        self._rank = bytes([rank])
        # Kept, because they close what they own.
        self._pipes = pipes
        self._write, self._read = (pipe.fileno() for pipe in pipes)

    def exchange(self) -> Array:
        """Wait for the notice."""
        if self._copies:
            np.copyto(self._slot, self.gradient)
        os.write(self._write, self._rank)
        return self._region.versions[os.read(self._read, 1)[0]]


def run_worker(
    connection: Connection, cell: Cell, rank: int, path: Path, pipes: tuple[Connection, Connection], copies: bool
) -> None:
    work(connection, cell, rank, Slot(cell, rank, path, pipes, copies))


def run_server(connection: Connection, cell: Cell, path: Path, notices: Connection, replies: list[Connection]) -> None:
    region, update = Region(cell, path), Update(cell)
    for array in (*region.slots, *region.versions):
        array[:] = 0  # so that the pages exist
    current = 0
    held = [0] * cell.workers
    incoming = notices.fileno()
    outgoing = [reply.fileno() for reply in replies]

    def receive() -> int:
        nonlocal current
        rank = os.read(incoming, 1)[0]
        free = next(number for number in range(len(region.versions)) if number != current and number not in held)
        update.apply_beside(region.versions[free], region.versions[current], region.slots[rank])
        current = free
        return rank

    def reply(rank: int) -> None:
        held[rank] = current
        os.write(outgoing[rank], bytes([current]))

    serve(connection, cell, receive, reply)


@contextlib.contextmanager
def start(cell: Cell, copies: bool) -> Iterator[Team]:
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.NamedTemporaryFile(prefix="peers", dir=_FOLDER)).name)
        incoming, notices = context.Pipe(duplex=False)
        replies = [context.Pipe(duplex=False) for _ in range(cell.workers)]
        for end in (incoming, notices, *[end for pair in replies for end in pair]):
            stack.callback(end.close)
        server = stack.enter_context(harness.Child(run_server, cell, path, incoming, [write for _, write in replies]))
        server.hear()
        workers = [
            stack.enter_context(harness.Child(run_worker, cell, rank, path, (notices, read), copies))
            for rank, (read, _) in enumerate(replies)
        ]
        for child in workers:
            child.hear()
        yield Team(cell, workers, [server], [child.pid for child in [server, *workers]])


def missing() -> str | None:
    return None if _FOLDER.is_dir() else f"{_FOLDER} does not exist"


WORKS = ("W1", "W2", "W3", "W4")
CONTENDERS = (
    Contender("floor-shm", "shared memory, in the slot", FLOOR, WORKS, functools.partial(start, copies=False), missing),
    Contender(
        "floor-shm-copy", "shared memory, copied in", FLOOR, WORKS, functools.partial(start, copies=True), missing
    ),
)
