"""Measure the broker's peak memory while 4 workers push 100 MB gradients, over TCP and through shared memory.

*Over TCP*: peak resident memory of ``distgrad broker`` without an optimizer, from its start, through the first
parameters (which come over the wire) and pulls of every worker, to the last gradient. Promised is three times the
parameters (the current version, the next one, and one that a reader holds), the queue's bytes, and 150 MB for Python
and its libraries.

*Shared*: the most that its proportional share (PSS, in which a page that others have too counts in part) was seen to
be, a look every 20 ms, with Adam. Promised is the optimizer's state, three versions, the queue's bytes, and 100 MB.
Linux only.
"""

from __future__ import annotations

import contextlib
import re
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from distgrad.errors import SnapshotRevoked
from distgrad_worker import Worker

DTYPE = np.dtype(np.float32)
N_WORKERS = 4
QUEUE_BYTES = 256 * 1024 * 1024
OTHER_BYTES = 150_000_000


def worker(connection: Connection, address: str, size: int, shares: bool) -> None:
    gradient = np.full(size, 1e-3, DTYPE)
    with Worker(address, shares_memory=shares) as ours:
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
    return [_over_tcp(tiny=tiny), _shared(tiny=tiny)]


def _over_tcp(*, tiny: bool) -> dict[str, Any]:
    size = 300_000 if tiny else 25_000_000
    with harness.Broker("--queue-bytes", str(QUEUE_BYTES)) as broker:
        _push(broker, size, 4 if tiny else 40, shares=False)
        peak = broker.peak_bytes()
    return _report("broker's memory, MB", peak, 3 * size * DTYPE.itemsize + QUEUE_BYTES + OTHER_BYTES, size)


def _shared(*, tiny: bool) -> dict[str, Any]:
    size = 300_000 if tiny else 25_000_000
    rule = ("--optimizer", "adam", "--lr", "0.001")
    with harness.Broker("--queue-bytes", str(QUEUE_BYTES), *rule) as broker, _Watched(broker.pid) as watched:
        _push(broker, size, 4 if tiny else 40, shares=True)
    return _report(
        "the same shared, Adam (PSS)", watched.peak, (2 + 3) * size * DTYPE.itemsize + QUEUE_BYTES + 100_000_000, size
    )


def _push(broker: harness.Broker, size: int, count: int, *, shares: bool) -> None:
    with harness.several(worker, N_WORKERS, broker.address, size, shares) as workers:
        for child in workers:
            child.hear()
        for child in workers:
            child.tell(count)
        for child in workers:
            child.hear(harness.ROUND_S)


class _Watched:
    """Looks at a process's proportional share of memory, again and again."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._path = Path(f"/proc/{pid}/smaps_rollup")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._is_over.wait(0.02):
            match = re.search(r"^Pss:\s+(\d+) kB", self._path.read_text(), re.MULTILINE)
            assert match is not None  # proc(5)
            self.peak = max(self.peak, int(match.group(1)) * 1024)

    def __enter__(self) -> _Watched:
        self._thread.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()


def _report(question: str, peak: int, allowed: int, size: int) -> dict[str, Any]:
    return {
        "question": question,
        "target": f"<= {allowed / 1e6:.0f}",
        "value": peak / 1e6,
        "low": peak / 1e6,
        "high": peak / 1e6,
        "met": peak <= allowed,
        "rounds": 1,
        "floats": size,
        "workers": N_WORKERS,
        "queue_bytes": QUEUE_BYTES,
    }
