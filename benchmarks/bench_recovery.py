"""Measure how fast a broker recovers from a journal of 1 GB, beside reading the gradients in it and applying them.

Ours: `recover` of a folder without a checkpoint: every checksum is verified, every header is read, every decision is
carried out. The floor has been told where the gradients are; it reads one after the other and applies it by the same
kernel. Both find the files in the page cache.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from typing import Any

import msgpack
import numpy as np

from benchmarks import harness
from distgrad.arrays import aligned_empty
from distgrad.codec import encode
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import OsDisk
from distgrad.durable.journal import Journal
from distgrad.durable.journal_reader import read
from distgrad.durable.record import PREFIX_BYTES
from distgrad.durable.recovery import recover
from distgrad.durable.replay import is_gradient
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.malloc import keep_freed_memory
from distgrad_worker.headers import Header, checked_details

LEAST = 0.5
# Small gradients are decided on in bunches, about as under load; large ones, one by one.
BUNCH = 16
LARGE_BYTES = 1 << 20


def write_journal(folder: str, size: int, count: int) -> None:
    """Write what a broker writes that takes and applies so many gradients of one worker."""
    nest = np.zeros(size, np.float32)
    layout = Layout.of(nest)
    journal = Journal(OsDisk(), folder, next_sequence=1)

    def add(kind: str, payload: Any = (), **keys: Any) -> None:
        journal.append(msgpack.packb([kind, keys]), payload)

    began = {"incarnation": "one", "executor": "any", "distgrad": "0", "settings": {}, "running": True}
    add("began", **began)
    add("configured", mode="descent", rule=None, policy=["async", {}], weighing={})
    add("set", encode(layout, [nest], trained_only=False), layout=layout.to_frame(), generation=1, version=0)
    add("session", worker="w", user=None, generated=False, incarnation="one", counter=1, nonces=[])
    parts = encode(layout, [np.full(size, 1e-3, np.float32)])
    header = Header("w", layout.fingerprint, None)
    header.address("one:1", 1)
    details = checked_details(None, 1, None)
    bunch = BUNCH if nest.nbytes < LARGE_BYTES else 1
    for first in range(1, count + 1, bunch):
        numbers = range(first, min(first + bunch, count + 1))
        for number in numbers:
            frames = header.frames(number, details, parts)
            journal.append(frames[0], frames[1:])
        add("decided", version=first - 1, decisions=[[0, [["w", number]], None] for number in numbers])
        journal.sync()
    journal.close()


def payloads(folder: str) -> dict[str, list[int]]:
    """Find where gradients are, by file, so that the floor need not look for them."""
    places: dict[str, list[int]] = {}
    for record in read(OsDisk(), folder, 1):
        if is_gradient(record.header):
            places.setdefault(record.path, []).append(record.offset + PREFIX_BYTES + len(record.header))
    return places


def read_and_apply(places: dict[str, list[int]], size: int) -> None:
    """Do what no recovery can do with less."""
    holder = ParameterHolder()
    holder.set_nest(np.zeros(size, np.float32))
    gradient = [aligned_empty(size, np.float32)]
    memory = gradient[0].data.cast("B")
    for path, offsets in places.items():
        with open(path, "rb", buffering=0) as file:
            for offset in offsets:
                file.seek(offset)
                file.readinto(memory)
                holder.apply(gradient)
    holder.close()


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    keep_freed_memory()  # as the broker does
    results = []
    for name, size, total in (("40 KB", 10_000, 1 << 30), ("4 MB", 1_000_000, 1 << 30)):
        count = 40 if tiny else total // (4 * size)
        results.append(measure_one(name, 10_000 if tiny else size, count, rounds=2 if tiny else 5))
    return results


def measure_one(name: str, size: int, count: int, rounds: int) -> dict[str, Any]:
    folder = tempfile.mkdtemp(dir=harness.ROOT, prefix=".bench-")
    try:
        data = DataFolder(OsDisk(), folder)
        write_journal(folder, size, count)
        places = payloads(folder)
        ours, floor = [], []
        for number in range(rounds + 1):
            holder = ParameterHolder()
            begun = time.perf_counter()
            recover(OsDisk(), data, holder)
            ended = time.perf_counter()
            assert holder.version == count
            holder.close()
            started = time.perf_counter()
            read_and_apply(places, size)
            done = time.perf_counter()
            if number:
                ours.append(ended - begun)
                floor.append(done - started)
        data.close()
    finally:
        shutil.rmtree(folder)
    ratios = [f / o for o, f in zip(ours, floor, strict=True)]
    return {
        "question": f"recovery, {name}",
        "target": f">= {LEAST}",
        "value": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "met": statistics.median(ratios) >= LEAST,
        "ours_s": statistics.median(ours),
        "floor_s": statistics.median(floor),
        "rounds": rounds,
        "floats": size,
        "count": count,
    }
