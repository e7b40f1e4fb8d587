"""Measure the broker's peak memory while 4 workers push 100 MB gradients.

Peak resident memory of ``distgrad broker`` without an optimizer, from its start, through the first parameters (which
come over the wire) and pulls of every worker, to the last gradient. Promised is three times the parameters (the current
version, the next one, and one that a reader holds), the queue's bytes, and 150 MB for Python and its libraries.
Linux only.
"""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks import harness
from distgrad.errors import SnapshotRevoked
from distgrad_worker import Worker

DTYPE = np.dtype(np.float32)
N_WORKERS = 4
QUEUE_BYTES = 256 * 1024 * 1024
OTHER_BYTES = 150_000_000


def worker(connection: Connection, address: str, size: int) -> None:
    gradient = np.full(size, 1e-3, DTYPE)
    with Worker(address, shares_memory=False) as ours:
        snapshot = ours.initialize(np.zeros(size, DTYPE))

        def run(count: int) -> None:
            nonlocal snapshot
            for number in range(count):
                if number % 4 == 0:
                    # More readers than versions are kept for: some lose their snapshot, which is part of the load.
                    with contextlib.suppress(SnapshotRevoked):
                        snapshot = ours.pull(out=snapshot)
                ours.push(gradient)
            ours.flush()

        harness.take_rounds(connection, run)


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    size = 300_000 if tiny else 25_000_000
    count = 4 if tiny else 40
    with harness.Broker("--queue-bytes", str(QUEUE_BYTES)) as broker:
        with harness.several(worker, N_WORKERS, broker.address, size) as workers:
            for child in workers:
                child.hear()
            for child in workers:
                child.tell(count)
            for child in workers:
                child.hear(harness.ROUND_S)
        peak = broker.peak_bytes()
    allowed = 3 * size * DTYPE.itemsize + QUEUE_BYTES + OTHER_BYTES
    return [
        {
            "question": "broker's memory, MB",
            "target": f"<= {allowed / 1e6:.0f}",
            "value": peak / 1e6,
            "low": peak / 1e6,
            "high": peak / 1e6,
            "met": peak <= allowed,
            "rounds": 1,
            "count": count,
            "floats": size,
            "workers": N_WORKERS,
            "queue_bytes": QUEUE_BYTES,
        }
    ]
