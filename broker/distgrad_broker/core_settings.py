"""What the core is told at the start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NONE, JOURNAL, CHECKPOINT = "none", "journal", "checkpoint"


@dataclass(frozen=True)
class DataSettings:
    """How what happens is kept in a data folder.

    Attributes
    ----------
    durability : str
        When a gradient is settled: with its record (``journal``), with the next checkpoint, or at once (``none``).
    every_s, every_updates, every_bytes : float, int, int or None
        A checkpoint is due after so many seconds, updates, bytes of journal; None for never.
    started_with : dict
        Settings of this start, to be compared with the next one's.
    sequence : int
        Of the last record that is on the disk.
    """

    durability: str
    every_s: float | None = None
    every_updates: int | None = None
    every_bytes: int | None = None
    started_with: dict[str, Any] = field(default_factory=dict)
    sequence: int = 0


@dataclass(frozen=True)
class CoreSettings:
    """What the core is told at the start.

    Attributes
    ----------
    incarnation : str
        New for every start.
    gradients : str
        Endpoint that `hello` tells workers.
    queue_bytes : int or None
        Budget of all grants; None is 256 MiB or two gradients, whichever is more.
    max_workers : int
        Worker ids remembered at most.
    lease_s : float
        Seconds without a sign of life after which a worker is silent.
    is_stopped : bool
        Begin with the updater stopped.
    save_path : str or None
        File that `save` writes.
    data : DataSettings or None
        None if nothing is kept.
    host : str or None
        Names the host to workers that might share memory; None if they cannot.
    lane : str or None
        The name of the lanes that they find here; None if there are none.
    """

    incarnation: str
    gradients: str
    queue_bytes: int | None = None
    max_workers: int = 1024
    lease_s: float = 30.0
    is_stopped: bool = False
    save_path: str | None = None
    data: DataSettings | None = None
    host: str | None = None
    lane: str | None = None
