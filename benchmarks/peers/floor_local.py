"""Floors that move nothing between processes: copying in memory, and the kernel alone.

- *memory copy*: for each gradient one copy of it and one of the parameters, by one thread of one process; nothing is
  applied.
- *kernel alone*: for each gradient one update in place, by the kernel, and the threads, that everyone has; the gradient
  is already in memory, and is not written anew.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np

from benchmarks import harness
from benchmarks.peers.contender import FLOOR, Contender
from benchmarks.peers.team import Report, Team, take_part
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import Cell, Gradients


def run_copy(connection: Connection, cell: Cell, rank: int) -> None:
    arrays = [zeros(cell.size) for _ in range(4)]

    def run(count: int) -> None:
        for _ in range(count * cell.workers):
            np.copyto(arrays[0], arrays[1])
            np.copyto(arrays[2], arrays[3])

    take_part(connection, run, lambda: Report(None))


def run_kernel(connection: Connection, cell: Cell, rank: int) -> None:
    update, gradients, gradient = Update(cell), Gradients(cell, rank), zeros(cell.size)
    gradients.write(gradient)
    applied = 0

    def run(count: int) -> None:
        nonlocal applied
        for _ in range(count * cell.workers):
            update.apply(gradient)
            applied += 1

    def check() -> Report:
        middle = float(update.parameters[cell.size // 2])
        return Report(None if applied and np.isfinite(middle) else "the kernel did not run")

    take_part(connection, run, check)


@contextlib.contextmanager
def start(cell: Cell, run: Callable[..., None]) -> Iterator[Team]:
    """Start one process, which does the work of all workers."""
    with harness.Child(run, cell, 0) as child:
        child.hear()
        yield Team(cell, [child], pids=[child.pid])


CONTENDERS = (
    Contender("floor-copy", "memory copy", FLOOR, ("W1", "W2", "W3"), functools.partial(start, run=run_copy)),
    Contender("floor-kernel", "kernel alone", FLOOR, ("W1", "W2", "W3"), functools.partial(start, run=run_kernel)),
)
