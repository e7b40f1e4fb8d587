"""A core with a data folder on a simulated disk, that can be crashed and started again on what is left of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from distgrad import wire
from distgrad.durable.books import MemberBook, Recovered
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk_events import CheckpointEnded, DiskTroubled, RecordsWritten, WriteCheckpoint
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.policies import Policy
from distgrad.rules import Rule
from distgrad_broker.config import BrokerConfig
from distgrad_broker.core import Core
from distgrad_broker.core_settings import CoreSettings
from distgrad_broker.data import OpenData, open_data
from distgrad_broker.events import Effect, Event, ShutdownAsked, TimePassed
from distgrad_broker.versions import Versions
from support.core_kit import LAYOUT, Kit
from support.sim_disk import SimDisk

DATA = "/data"


SYNC: dict[str, Any] = {"policy": "sync", "workers": 2}
"""Settings under which a step is made of the workers a and b."""


class DurableKit(Kit):
    """A core as `distgrad_broker.broker` builds it with a data folder; `write` is the file thread's turn.

    Parameters
    ----------
    disk : SimDisk, optional
        By default an empty one.
    layout : Layout, optional
        Of the parameters that the broker is started with, all zeros; they are used if the folder has none.
    incarnation : str
        Of this start.
    own_rule, own_policy : Rule, Policy, optional
        Objects instead of the configuration's names.
    now : float
        What the clock shows.
    **config : object
        Fields of `BrokerConfig`.
    """

    def __init__(
        self,
        disk: SimDisk | None = None,
        *,
        layout: Layout | None = LAYOUT,
        incarnation: str = "one",
        own_rule: Rule | None = None,
        own_policy: Policy | None = None,
        now: float = 50.0,
        **config: Any,
    ) -> None:
        self.now = now
        self.disk = disk or SimDisk()
        self.config = BrokerConfig(**{"data": Path(DATA), **config})
        self.holder = ParameterHolder(self.config.mode, own_rule or self.config.rule(), executor="numpy")
        self.data: OpenData = open_data(
            self.config, self.disk, self.holder, own_policy or self.config.consistency(), salt=7
        )
        self.recovered: Recovered = self.data.recovered
        self.writer = self.data.writer
        if layout is not None and self.holder.layout is None:
            self.holder.set_arenas(layout, [np.zeros(arena.size, arena.dtype) for arena in layout.arenas])
        settings = CoreSettings(
            incarnation=incarnation,
            gradients="tcp://127.0.0.1:5555",
            queue_bytes=self.config.queue_bytes,
            max_workers=self.config.max_workers,
            lease_s=self.config.workers_silent_after,
            is_stopped=self.config.stopped,
            save_path=None if self.config.save is None else str(self.config.save),
            data=self.data.settings,
        )
        self.core = Core(
            settings,
            Versions(self.holder),
            self.data.policy,
            self.data.weighing,
            recovered=self.recovered,
            now=now,
        )
        self.state = self.core.state
        self.sessions: dict[str, str] = {}
        self.effects: list[Effect] = []
        self.told: list[RecordsWritten | CheckpointEnded | DiskTroubled] = []
        self._asked = 0
        self.handle(TimePassed())  # the core has something to tell of its beginning

    def handle(self, event: Event | wire.Gradient) -> list[Effect]:
        effects = super().handle(event)
        for effect in effects:
            if isinstance(effect, WriteCheckpoint):
                self._hand_over()
                self.writer.checkpoint(effect)
        return effects

    def _hand_over(self) -> None:
        if records := self.core.take_records():
            self.writer.records(records)

    def write(self, steps: int = 100) -> None:
        """Let the disk have what there is, and tell the core."""
        for _ in range(steps):
            self._hand_over()
            told = self.writer.step(self.now)
            self.told += told
            for event in told:
                self.handle(event)
            if not told and self.writer.wait_s(self.now) != 0.0:
                return

    def checkpoint(self) -> dict[str, Any]:
        """Write a checkpoint of what there is, as `save` does, and return the reply."""
        envelope = self.send("save")
        self.wait(0.0)
        self.write()
        return self.header(envelope)

    @property
    def folder(self) -> DataFolder:
        """The data folder, only to look at."""
        return DataFolder(self.disk, DATA, read_only=True)

    def greet(self, worker: str = "w", nonce: bytes | None = None, **keys: Any) -> dict[str, Any]:
        """Say hello, and let the disk have what the reply waits for."""
        envelope = self.send("hello", worker=worker, nonce=nonce or f"nonce of {worker}".encode(), **keys)
        self.write()
        header = self.header(envelope)
        if header["ok"]:
            self.sessions[worker] = header["session"]
        return header

    def written(self, op: str, frames: Sequence[bytes] = (), **keys: Any) -> dict[str, Any]:
        """Send a request, let the disk have what its reply waits for, and return that."""
        envelope = self.send(op, frames, **keys)
        self.write()
        return self.header(envelope)

    def header(self, envelope: bytes) -> dict[str, Any]:
        """Give the header of the one reply that a request has got."""
        (reply,) = self.replies_to(envelope)
        return wire.unpack(wire.pack(reply.header))

    def is_answered(self, envelope: bytes) -> bool:
        return bool(self.replies_to(envelope))

    def book(self, worker: str = "w") -> MemberBook:
        """Give what was recovered of a worker."""
        return self.recovered.books.members[worker]

    def crash(self, incarnation: str = "two", *, machine: bool = False, seed: int = 0, **config: Any) -> DurableKit:
        """Kill this process, or the machine, and start again with these settings instead of the former ones."""
        disk = self.disk.crash(Random(seed), machine=machine)
        return DurableKit(disk, incarnation=incarnation, now=self.now + 1, **config)

    def stop(self, patience_s: float = 0.0) -> bool:
        """End cleanly; tell whether all was done, or the broker would still wait."""
        self.handle(ShutdownAsked())
        for _ in range(10):
            self.wait(patience_s / 10)
            while self.core.has_work:
                self.work()
            self.write()
            if self.core.is_drained:
                self.writer.close()
                return True
        return False


def applied(*numbers: int, **config: Any) -> DurableKit:
    """Make a broker that has applied gradients of one worker, each computed on the version before it."""
    kit = DurableKit(**config)
    kit.greet()
    for number in numbers:
        kit.push(number, base=list(kit.state.name))
        kit.work()
    kit.write()
    return kit


def stepped(steps: int, **config: Any) -> DurableKit:
    """Make a broker that has made steps of two workers."""
    kit = DurableKit(**{**SYNC, **config})
    kit.greet("a")
    kit.greet("b")
    for number in range(1, steps + 1):
        step(kit, number)
    kit.write()
    return kit


def step(kit: DurableKit, number: int, base: wire.State | None = None) -> None:
    """Have both workers push the gradient of a step, and apply it."""
    for worker, value in (("b", 2.0), ("a", 1.0)):
        kit.push(number, worker=worker, value=value * number, base=list(base or kit.state.name))
    kit.work(2)
