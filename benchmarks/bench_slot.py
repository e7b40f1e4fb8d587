"""Measure pushes of 100 MB through memory that worker and broker share, beside the kernel alone and a bare loop.

- *in the slot*: the worker writes each gradient, all of it, into a slot (`Worker.slot`). The floor is our fastest
  kernel alone, in one process, with a gradient that is there already: what is left is what everything else costs, the
  writing of the gradient included.
- *copied in*: the worker copies an array of its own (`Worker.push`). The floor is a bare loop over shared memory that
  does the same: two slots, a byte in a pipe each way, the same kernel. It numbers, keeps and checks nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import DTYPE, LR, Cell, Gradients
from distgrad.shared_pages import Address, SharedPages, attach, host_name
from distgrad_worker import Worker

N_SLOTS = 2


def worker(connection: Connection, address: str, cell: Cell, copies: bool) -> None:
    gradients, own = Gradients(cell, 0), zeros(cell.size)
    gradients.write(own)
    with Worker(address) as ours:
        ours.initialize(zeros(cell.size))

        def run(count: int) -> None:
            for _ in range(count):
                if copies:
                    ours.push(own)
                else:
                    with ours.slot() as slot:
                        gradients.write(slot)
            ours.flush()

        harness.take_rounds(connection, run)


def kernel_alone(connection: Connection, cell: Cell) -> None:
    update, gradient, beside = Update(cell), zeros(cell.size), zeros(cell.size)
    Gradients(cell, 0).write(gradient)

    def in_place(count: int) -> None:
        for _ in range(count):
            update.apply(gradient)

    def next_to_it(count: int) -> None:
        for _ in range(count):
            update.apply_beside(beside, update.parameters, gradient)

    harness.take_rounds(connection, _fastest(in_place, next_to_it))


def _fastest(*ways: Callable[[int], None]) -> Callable[[int], None]:
    """Try each way a few times, and give the fastest: a floor is tuned."""
    best: tuple[float, Callable[[int], None]] | None = None
    for way in ways:
        way(1)
        started = time.perf_counter()
        way(3)
        took_s = time.perf_counter() - started
        if best is None or took_s < best[0]:
            best = (took_s, way)
    assert best is not None
    return best[1]


def bare_server(connection: Connection, cell: Cell, notices: Connection, replies: Connection) -> None:
    pages = [SharedPages(cell.n_bytes) for _ in range(N_SLOTS)]
    slots = [memory.array.view(DTYPE) for memory in pages]
    update = Update(cell)
    current, following = update.parameters, zeros(cell.size)
    connection.send([list(memory.address) for memory in pages])
    while notice := os.read(notices.fileno(), 1):
        update.apply_beside(following, current, slots[notice[0]])
        current, following = following, current
        os.write(replies.fileno(), notice)


def bare_worker(
    connection: Connection, cell: Cell, places: list[list[Any]], notices: Connection, replies: Connection
) -> None:
    slots = [attach(Address(*place), writes=True).view(DTYPE) for place in places]
    own = zeros(cell.size)
    Gradients(cell, 0).write(own)

    def run(count: int) -> None:
        for number in range(count):
            if number >= N_SLOTS:
                os.read(replies.fileno(), 1)
            np.copyto(slots[number % N_SLOTS], own)
            os.write(notices.fileno(), bytes([number % N_SLOTS]))
        for _ in range(min(count, N_SLOTS)):
            os.read(replies.fileno(), 1)

    harness.take_rounds(connection, run)


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    if host_name() is None:
        return []
    return [
        _in_slot("push 100 MB in the slot, SGD", "W1", tiny=tiny),
        _in_slot("push 100 MB in the slot, Adam", "W2", tiny=tiny),
        _copied(tiny=tiny),
    ]


def _cell(work: str, *, tiny: bool) -> Cell:
    return Cell(work, 300_000 if tiny else 25_000_000, 1)


def _in_slot(question: str, work: str, *, tiny: bool) -> dict[str, Any]:
    cell = _cell(work, tiny=tiny)
    rule = ["--optimizer", "adam", "--lr", str(LR)] if work == "W2" else []
    with (
        harness.Broker("--queue-bytes", str(4 * cell.n_bytes + (1 << 20)), *rule) as broker,
        harness.Child(worker, broker.address, cell, False) as ours,
        harness.Child(kernel_alone, cell) as floor,
    ):
        ours.hear()
        floor.hear()
        return harness.compare(
            question,
            0.85,
            harness.Side(ours, [ours.pid, broker.pid]),
            harness.Side(floor, [floor.pid]),
            count=2 if tiny else 12,
            rounds=2 if tiny else 9,
            floats=cell.size,
        )


def _copied(*, tiny: bool) -> dict[str, Any]:
    cell = _cell("W1", tiny=tiny)
    context = multiprocessing.get_context("spawn")
    incoming, notices = context.Pipe(duplex=False)
    replies, outgoing = context.Pipe(duplex=False)
    with (
        incoming,
        notices,
        replies,
        outgoing,
        harness.Broker("--queue-bytes", str(4 * cell.n_bytes + (1 << 20))) as broker,
        harness.Child(worker, broker.address, cell, True) as ours,
        harness.Child(bare_server, cell, incoming, outgoing) as server,
    ):
        places = server.hear()
        with harness.Child(bare_worker, cell, places, notices, replies) as floor:
            ours.hear()
            floor.hear()
            return harness.compare(
                "push 100 MB copied into the slot",
                0.85,
                harness.Side(ours, [ours.pid, broker.pid]),
                harness.Side(floor, [floor.pid, server.pid]),
                count=2 if tiny else 12,
                rounds=2 if tiny else 9,
                floats=cell.size,
            )
