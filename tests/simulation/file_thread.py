"""A broker's file thread: the real `DiskWriter`, fed as the real thread feeds it, on a disk that takes its time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distgrad.durable.disk_events import CheckpointEnded, RecordsWritten, WriteCheckpoint
from distgrad.durable.disk_writer import DiskWriter, Written
from distgrad.durable.records import Record
from distgrad.durable.segment import segments
from simulation.clockwork import Alarm, Violation
from support.sim_disk import Crash

if TYPE_CHECKING:
    from simulation.broker_process import BrokerProcess

# Steps of a checkpoint that are made at once: each is an event of its own otherwise.
MAX_STEPS = 8


class FileThread:
    """Writes what the loop gives it.

    Attributes
    ----------
    dies_with : str
        What ends when the disk says so in the middle of a call: ``thread``, ``process`` or ``machine``.
    """

    def __init__(self, broker: BrokerProcess, writer: DiskWriter) -> None:
        self.broker = broker
        self.writer = writer
        self.dies_with = "process"
        self.is_dead = False
        self._jobs: list[Sequence[Record] | WriteCheckpoint] = []
        self._tickets: dict[int, tuple[int, int]] = {}
        # The oldest record that each checkpoint needs, newest last.
        self._needed: dict[str, int] = {}
        self._first_needed = 0
        self._busy_until = 0.0
        self._posts_at = 0.0
        self._alarm = Alarm(broker.world, self._turn)

    def put(self, job: Sequence[Record] | WriteCheckpoint) -> None:
        """Take a job; returns at once."""
        self._jobs.append(job)
        self._wake(0.0)

    def close(self) -> None:
        """Write what there is, and close the folder; after the loop has ended."""
        self._take_jobs()
        self.writer.hurry()
        self.writer.step(self.broker.now)
        self.writer.close()

    def _wake(self, delay_s: float) -> None:
        self._alarm.set(max(self.broker.world.now + delay_s, self._busy_until))

    def _turn(self) -> None:
        broker = self.broker
        world = broker.world
        if broker.is_ended or self.is_dead:
            return
        if world.now < broker.frozen_until:
            self._wake(broker.frozen_until - world.now)
            return
        calls = len(broker.disk.calls)
        try:
            self._take_jobs()
            for _ in range(world.random.randrange(1, MAX_STEPS + 1)):
                for event in self.writer.step(broker.now):
                    self._tell(event)
                if self.writer.wait_s(broker.now) != 0.0:
                    break
        except Crash:
            self.is_dead = True
            world.disk_crashed(broker, self.dies_with)
            return
        self._busy_until = world.now + world.disk_time(broker.disk.calls[calls:])
        wait_s = self.writer.wait_s(broker.now)
        if wait_s is not None:
            self._wake(wait_s and max(wait_s, 1e-6))

    def _take_jobs(self) -> None:
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            if isinstance(job, WriteCheckpoint):
                self._tickets[job.ticket] = job.checkpoint.sequence, job.checkpoint.version
                self._first_needed = job.first_needed
                self.writer.checkpoint(job)
            else:
                self.writer.records(job)

    def _tell(self, event: Written) -> None:
        """Post an event to the loop, when the disk has had its time."""
        broker = self.broker
        world, watch = broker.world, broker.watch
        if isinstance(event, RecordsWritten):
            watch.durable = max(watch.durable, event.sequence)
        elif isinstance(event, CheckpointEnded):
            # It may be there in spite of an error: of what is done after it.
            self._needed.pop(event.path, None)
            self._needed[event.path] = self._first_needed
            if event.error is None:
                watch.durable_ticket = event.ticket
                watch.durable_checkpoint = self._tickets[event.ticket]
                self._check_journal(event.path, watch.durable_checkpoint[0])
        if world.trace is not None:
            world.note(broker.name, str(event))
        self._posts_at = max(self._posts_at, world.now + world.disk_time(["sync"]))
        world.at(self._posts_at - world.now, broker.post, event)

    def _check_journal(self, path: str, sequence: int) -> None:
        """Check that the journal has what a checkpoint covers, and still has what any that is kept needs."""
        broker = self.broker
        if broker.watch.durable < sequence:
            raise Violation(f"{path} is there, but the journal only up to {broker.watch.durable}")
        there = set(broker.disk.paths())
        kept = [first for path, first in self._needed.items() if path in there]
        found = segments(broker.disk, str(broker.world.config.data))
        if found and found[0].first > min(kept):
            raise Violation(f"the journal begins with {found[0].first}, but checkpoints need {kept}")
