"""Measure pushes of 10,000 leaves of 100 floats beside pushes of one leaf of a million.

What is asked is what a leaf costs:

- *in the slot*: the worker writes into the leaves of a slot (`Worker.slot`), which are views that were made before.
  It writes all of a slot that it has not had before, and then one number, so that numpy's own writing is not measured.
- *copied in*: the worker gives a dict of its own arrays (`Worker.push`); each must be looked at, and copied.
- *over TCP*: the same without shared memory.

Both sides are ours: a worker and a broker each, one side idle while the other runs.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks import harness
from distgrad_worker import Worker

DTYPE = np.dtype(np.float32)
N_LEAVES = 10_000
LEAF_SIZE = 100


def worker(connection: Connection, address: str, n_leaves: int, size: int, in_slot: bool, shares: bool) -> None:
    gradients = {f"leaf{number}": np.full(size, 1e-3, DTYPE) for number in range(n_leaves)}
    with Worker(address, shares_memory=shares) as ours:
        ours.initialize({name: np.zeros(size, DTYPE) for name in gradients})
        written: dict[int, Any] = {}  # by address; that the arrays are kept keeps their memory from being another's

        def run(count: int) -> None:
            for _ in range(count):
                if in_slot:
                    with ours.slot() as slot:
                        first = slot["leaf0"]
                        first[0] = 1e-3
                        if first.ctypes.data not in written:
                            written[first.ctypes.data] = first
                            for leaf in slot.values():
                                leaf.fill(1e-3)
                else:
                    ours.push(gradients)
            ours.flush()

        harness.take_rounds(connection, run)


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    return [
        _compare("push 10,000 leaves in the slot", in_slot=True, shares=True, tiny=tiny),
        _compare("push 10,000 leaves copied in", in_slot=False, shares=True, tiny=tiny),
        _compare("push 10,000 leaves over TCP", in_slot=False, shares=False, tiny=tiny),
    ]


def _compare(question: str, *, in_slot: bool, shares: bool, tiny: bool) -> dict[str, Any]:
    n_leaves = 100 if tiny else N_LEAVES
    floats = n_leaves * LEAF_SIZE
    with (
        harness.Broker() as broker,
        harness.Broker() as other,
        harness.Child(worker, broker.address, n_leaves, LEAF_SIZE, in_slot, shares) as many,
        harness.Child(worker, other.address, 1, floats, in_slot, shares) as one,
    ):
        many.hear()
        one.hear()
        return harness.compare(
            question,
            0.8,
            harness.Side(many, [many.pid, broker.pid]),
            harness.Side(one, [one.pid, other.pid]),
            count=10 if tiny else 200,
            rounds=2 if tiny else 9,
            floats=floats,
            leaves=n_leaves,
        )
