"""Measure what a data folder costs: pushes that are settled from the journal, beside pushes that nothing keeps.

Both sides are `Worker.push` to ``distgrad broker`` and then `flush`, so everything is settled in the end; ours has
``--data`` and its default durability. The disk may be slower than the network, so a second floor is the disk alone: one
process that writes the same bytes one behind the other into a file with its room reserved, as the journal does, and
waits for the disk once at the end. Promised is half of the speed without a folder, or 0.8 of the disk's if that is
lower.
"""

from __future__ import annotations

import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from distgrad_worker import Worker

DTYPE = np.dtype(np.float32)
OF_NOTHING, OF_DISK = 0.5, 0.8


def worker(connection: Connection, address: str, size: int) -> None:
    gradient = np.full(size, 1e-3, DTYPE)
    with Worker(address, shares_memory=False) as ours:
        ours.initialize(np.zeros(size, DTYPE))

        def run(count: int) -> None:
            for _ in range(count):
                ours.push(gradient)
            ours.flush()

        harness.take_rounds(connection, run)


def disk(connection: Connection, folder: str, size: int) -> None:
    gradient = np.full(size, 1e-3, DTYPE).data.cast("B")
    path = Path(folder) / "floor"

    def run(count: int) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        os.posix_fallocate(descriptor, 0, count * len(gradient))
        for _ in range(count):
            os.write(descriptor, gradient)
        os.fdatasync(descriptor)
        os.close(descriptor)

    harness.take_rounds(connection, run)


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    results = []
    for name, size, count in (("40 KB", 10_000, 4_000), ("4 MB", 1_000_000, 60)):
        results += measure_one(name, size, 20 if tiny else count, rounds=2 if tiny else 11)
    return results


def measure_one(name: str, size: int, count: int, rounds: int) -> list[dict[str, Any]]:
    # Beside the project, not in /tmp, which may be memory.
    with (
        tempfile.TemporaryDirectory(dir=harness.ROOT, prefix=".bench-") as folder,
        harness.Broker("--data", f"{folder}/data") as kept,
        harness.Broker() as bare,
        harness.Child(worker, kept.address, size) as ours,
        harness.Child(worker, bare.address, size) as nothing,
        harness.Child(disk, folder, size) as alone,
    ):
        for child in (ours, nothing, alone):
            child.hear()
        # All three in turns: what a disk takes changes from minute to minute.
        sides = {
            "ours": harness.Side(ours, [ours.pid, kept.pid]),
            "nothing": harness.Side(nothing, [nothing.pid, bare.pid]),
            "disk": harness.Side(alone, [alone.pid]),
        }
        taken = harness.take_turns(sides, count=count, rounds=rounds)
    about = {"count": count, "floats": size}
    beside_disk = harness.judge(f"journal of {name}, disk", OF_DISK, taken["ours"], taken["disk"], **about)
    beside_nothing = harness.judge(f"journal of {name}", OF_NOTHING, taken["ours"], taken["nothing"], **about)
    by_disk = OF_DISK * beside_nothing["floor_s"] / beside_disk["floor_s"]
    promised = min(OF_NOTHING, by_disk)
    is_met = beside_nothing["value"] >= promised or beside_disk["value"] >= OF_DISK
    beside_nothing |= {"target": f">= {promised:.2f}", "met": is_met}
    return [beside_nothing, beside_disk | {"target": f"or >= {OF_DISK}", "met": is_met}]
