"""Measure what slow readers cost training: one that takes ten times as long as a version, and one that is stopped.

One worker pushes gradients of 25 MB; its rate is taken in rounds, in turns without readers and with both. The stopped
one is frozen in the middle of a transfer, as a laptop that was closed is. Promised is that the median rate with readers
differs from that without by less than the rounds without them differ among each other, and that the broker's peak
memory grows by at most one version beside the two that it has anyway. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks import harness
from distgrad import Admin, Reader
from distgrad.errors import SnapshotRevoked
from distgrad_worker import Worker

DTYPE = np.dtype(np.float32)
# What one version may cost beside its numbers: replies under way, pages that malloc keeps.
SLACK_BYTES = 16_000_000


def worker(connection: Connection, address: str, size: int) -> None:
    gradient = np.full(size, 1e-3, DTYPE)
    with Worker(address, shares_memory=False) as ours:
        ours.initialize(np.zeros(size, DTYPE))

        def run(count: int) -> None:
            for _ in range(count):
                ours.push(gradient)
            ours.flush()

        harness.take_rounds(connection, run)


def slow_reader(connection: Connection, address: str, pause_s: float) -> None:
    with Reader(address, shares_memory=False) as reader:
        while True:
            # Revoked, if it was too slow for the updates: it begins again.
            with contextlib.suppress(SnapshotRevoked):
                for _ in reader.follow(reuse=True):
                    connection.send("read")
                    time.sleep(pause_s)


def busy_reader(connection: Connection, address: str) -> None:
    with Reader(address, shares_memory=False) as reader:
        connection.send("ready")
        while True:
            with contextlib.suppress(SnapshotRevoked):
                reader.get()


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    size = 300_000 if tiny else 6_250_000
    count, rounds = (3, 2) if tiny else (20, 8)
    alone: list[float] = []
    beside: list[float] = []
    with harness.Broker() as broker, harness.Child(worker, broker.address, size) as child:
        child.hear()
        each_s = child.run(count) / count
        peak_alone = 0
        for number in range(rounds):
            alone.append(child.run(count) / count)
            if number == 0:
                with Reader(broker.address, shares_memory=False) as reader:
                    reader.get()  # so that the peak without them knows pulls
                child.run(count)
                peak_alone = broker.peak_bytes()
            with (
                harness.Child(slow_reader, broker.address, 10 * each_s) as slow,
                harness.Child(busy_reader, broker.address) as frozen,
            ):
                slow.hear()
                frozen.hear()
                threading.Event().wait(each_s / 2)  # into a transfer; where exactly does not matter
                os.kill(frozen.pid, signal.SIGSTOP)
                beside.append(child.run(count) / count)
                os.kill(frozen.pid, signal.SIGKILL)
                os.kill(slow.pid, signal.SIGKILL)
        grown = broker.peak_bytes() - peak_alone
        with Admin(broker.address) as admin:
            held = admin.status()["snapshots_held"]
    change = statistics.median(alone) / statistics.median(beside)
    spread = (max(alone) - min(alone)) / statistics.median(alone)
    allowed = size * DTYPE.itemsize + SLACK_BYTES
    about = {"rounds": rounds, "count": count, "floats": size, "snapshots_held": held}
    return [
        {
            "question": "rate beside slow readers",
            "target": f">= {1 - spread:.2f}",
            "value": change,
            "low": min(a / b for a, b in zip(alone, beside, strict=True)),
            "high": max(a / b for a, b in zip(alone, beside, strict=True)),
            "met": change >= 1 - spread,
            "ours_s": statistics.median(beside),
            "floor_s": statistics.median(alone),
            **about,
        },
        {
            "question": "memory for slow readers, MB",
            "target": f"<= {allowed / 1e6:.0f}",
            "value": max(grown / 1e6, 1e-3),
            "low": grown / 1e6,
            "high": grown / 1e6,
            "met": grown <= allowed,
            **about,
        },
    ]
