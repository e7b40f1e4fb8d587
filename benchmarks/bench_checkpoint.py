"""Measure how long the broker's loop stands still for a checkpoint, beside a copy of the same bytes in memory.

Ours: the call of the core that begins a checkpoint of 25 million float32 and Adam's state, 300 MB in all: what the
loop does before the file thread takes over. The floor: NumPy copies as many bytes into memory that is there.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from distgrad import Adam
from distgrad.durable.disk_events import CheckpointEnded, WriteCheckpoint
from distgrad.holder import ParameterHolder
from distgrad.policies import Asynchronous
from distgrad_broker.core import Core
from distgrad_broker.core_settings import NONE, CoreSettings, DataSettings
from distgrad_broker.events import RequestReceived, SocketsDrained
from distgrad_broker.versions import Versions

MOST = 1.5


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    size, rounds = (300_000, 2) if tiny else (25_000_000, 9)
    holder = ParameterHolder(rule=Adam(lr=0.01))
    holder.set_nest(np.ones(size, np.float32))
    holder.apply([np.ones(size, np.float32)])
    settings = CoreSettings("bench", "tcp://127.0.0.1:1", data=DataSettings(NONE))
    core = Core(settings, Versions(holder), Asynchronous())
    sources = [np.ones(size, np.float32) for _ in range(3)]
    targets = [np.ones(size, np.float32) for _ in range(3)]
    ours, floor = [], []
    for number in range(rounds + 1):
        core.handle(RequestReceived((b"c", b""), {"v": 1, "op": "save", "id": 1, "incarnation": "bench"}), number)
        begun = time.perf_counter()
        effects = core.handle(SocketsDrained(0.0), float(number))
        ended = time.perf_counter()
        (checkpoint,) = [effect for effect in effects if isinstance(effect, WriteCheckpoint)]
        core.handle(CheckpointEnded(checkpoint.ticket, "nowhere", None), float(number))
        del effects, checkpoint
        copied = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            np.copyto(target, source)
        done = time.perf_counter()
        if number:
            ours.append(ended - begun)
            floor.append(done - copied)
    holder.close()
    ratios = [f / o for o, f in zip(ours, floor, strict=True)]
    return [
        {
            "question": "stall of a checkpoint",
            "target": f">= {1 / MOST:.2f}",
            "value": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "met": statistics.median(ratios) >= 1 / MOST,
            "ours_s": statistics.median(ours),
            "floor_s": statistics.median(floor),
            "rounds": rounds,
            "floats": size,
        }
    ]
