"""One broker's process: the real core behind a loop that the simulation turns, and recovery before its first turn."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from distgrad import gradient_messages, wire
from distgrad.durable.disk_events import WriteCheckpoint
from distgrad.errors import CheckpointError, MalformedMessage
from distgrad.executor import Executor
from distgrad.holder import ParameterHolder
from distgrad.wire import Gradient
from distgrad_broker.core import Core
from distgrad_broker.core_settings import CoreSettings
from distgrad_broker.data import open_data
from distgrad_broker.events import (
    Effect,
    Event,
    Reply,
    RequestReceived,
    ShutdownAsked,
    SocketsDrained,
    TimePassed,
    WorkDue,
)
from simulation import checks
from simulation.clockwork import Alarm
from simulation.file_thread import FileThread
from simulation.reference import SMALL
from simulation.watch import Watch, WatchedVersions
from support.sim_disk import Crash, SimDisk

if TYPE_CHECKING:
    from simulation.network import Frames
    from simulation.world import World

IDLE_S = 0.25
CLOSE_TIMEOUT_S = 3.0
FAREWELL_S = 0.5
MAX_A_TURN = 64

_TIME_PASSED, _DRAINED = TimePassed(), SocketsDrained(0.0)

# Compiled once: a holder's own would take longer than all that it does here.
_EXECUTOR = Executor(threads=1)


def _give_up(_seconds: float) -> None:
    """Wait for room on a full disk: another broker process does that, as nothing waits within one event."""
    raise CheckpointError("the disk is full")


class BrokerProcess:
    """A process that runs a broker on the world's disk.

    Raises
    ------
    Crash
        If it dies while it recovers.
    CheckpointError
        If the disk does not let it recover.
    """

    def __init__(self, world: World, number: int, disk: SimDisk) -> None:
        self.world = world
        self.number = number
        self.name = f"broker {number}"
        self.disk = disk
        self.is_ended = False
        self.frozen_until = 0.0
        self.clock_offset = world.random.random() * 1000
        # How many more steps of its loop it makes before it dies in the middle of a turn.
        self.steps_left = math.inf
        self._started_at = world.now
        holder = ParameterHolder(world.config.mode, world.config.rule(), threads=1)
        holder._executor = _EXECUTOR
        policy, salt = world.config.consistency(), world.random.getrandbits(64)
        data = open_data(world.config, disk, holder, policy, salt=salt, pause=_give_up)
        reference = checks.check_recovery(world, data, holder)
        if holder.layout is None:
            holder.set_arenas(SMALL, [np.zeros(arena.size, arena.dtype) for arena in SMALL.arenas])
        settings = CoreSettings(
            incarnation=f"i{number}",
            gradients="tcp://127.0.0.1:5555",
            queue_bytes=world.config.queue_bytes,
            lease_s=world.config.workers_silent_after,
            data=data.settings,
        )
        self.versions = WatchedVersions(holder)
        self.watch = self.versions.watch = Watch(
            reference,
            data.recovered.sequence,
            world.pushes,
            keeps_gradients=data.settings.durability == "journal",
            is_exact=world.plan.is_exact,
            note=None if world.trace is None else partial(world.note, self.name),
        )
        self.core = Core(settings, self.versions, data.policy, data.weighing, recovered=data.recovered, now=self.now)
        self.files = FileThread(self, data.writer)
        self._posted: deque[Event] = deque()
        self._control: deque[tuple[tuple[bytes, ...], Frames]] = deque()
        self._gradients: deque[Frames] = deque()
        self._alarm = Alarm(world, self._turn)
        self._turns_from = 0.0
        self._is_closing = False
        # Whether anything may be other than at the last check.
        self._is_changed = True
        self._work = WorkDue(world.plan.work)
        self._ends_at = math.inf
        checks.check_core(self, data.recovered)
        self._write_records()
        self.watch.compare(self.versions)
        self.wake(0.0)

    @property
    def now(self) -> float:
        """What this process takes for the time."""
        return self.world.now + self.clock_offset

    # What comes from outside

    def wake(self, delay_s: float) -> None:
        """Turn the loop at a time, if it does not turn before: at a steady pace, so that what comes between gathers."""
        now, pace_s = self.world.now, self.world.plan.pace_s
        if not self._alarm.is_before(now + delay_s):
            self._alarm.set(max(math.ceil((now + delay_s) / pace_s) * pace_s, self._turns_from))

    def receive_gradients(self, batch: Sequence[Frames]) -> None:
        if not self._gradients:
            self.wake(0.0)
        self._gradients.extend(batch)

    def receive_request(self, envelope: tuple[bytes, ...], frames: Frames) -> None:
        if not self._control:
            self.wake(0.0)
        self._control.append((envelope, frames))

    def post(self, event: Event) -> None:
        """Take an event from another thread, or a signal handler."""
        if not self.is_ended:
            self._posted.append(event)
            self.wake(0.0)

    # The loop

    def _turn(self) -> None:
        if self.is_ended:
            return
        world = self.world
        self._turns_from = world.now + 0.5 * world.plan.pace_s
        if world.now < self.frozen_until:
            self.wake(self.frozen_until - world.now)
            return
        now = self.now
        try:
            is_over = self._turn_now(now)
            self._write_records()
            self.watch.all_recorded()
        except Crash:
            world.broker_died(self, machine=False)
            return
        if self._is_changed:
            self._is_changed = False
            checks.check_state(self)
        if is_over or now >= self._ends_at:
            world.broker_ended(self)
            return
        if self.core.has_work or self._control or self._gradients:
            self.wake(0.0)
            return
        deadline = self.core.next_deadline()
        self.wake(IDLE_S if deadline is None else min(IDLE_S, max(0.0, deadline - now)))

    def _turn_now(self, now: float) -> bool:
        """Do what `distgrad_broker.loop` does in a turn; tell whether the broker has closed."""
        core = self.core
        while self._posted:
            event = self._posted.popleft()
            if isinstance(event, ShutdownAsked):
                self._read_gradients(len(self._gradients), now)
                self._is_closing, self._ends_at = True, now + CLOSE_TIMEOUT_S
            self._handle(event, now)
        for _ in range(min(MAX_A_TURN, len(self._control))):
            self._read_request(now)
        if self._gradients:
            self._read_gradients(MAX_A_TURN, now)
        self._handle(_TIME_PASSED if self._control or self._gradients else _DRAINED, now)
        if core.has_work:
            self._handle(self._work, now)
        if self._is_closing and core.is_drained:
            if core.is_known:
                return True
            self._ends_at = min(self._ends_at, now + FAREWELL_S)
        return False

    def _read_gradients(self, limit: int, now: float) -> None:
        watch, members = self.watch, self.core.state.members
        self._is_changed = True
        for _ in range(min(limit, len(self._gradients))):
            frames = self._gradients.popleft()
            parts = frames[1:]
            gradients = gradient_messages.parse_gradients(wire.unpack(frames[0]), parts, sum(map(len, parts)))
            headers = frames[:1] if len(gradients) == 1 else gradient_messages.single_headers(gradients)
            for gradient, header in zip(gradients, headers, strict=True):
                gradient.frame = header
                member = members.get(gradient.worker)
                before = 0 if member is None else member.accepted
                self._handle(gradient, now)
                if member is not None and member.accepted != before:
                    self.world.check_sender(watch.accepted(gradient))

    def _read_request(self, now: float) -> None:
        envelope, frames = self._control.popleft()
        try:
            request = RequestReceived(envelope, wire.unpack(frames[0]), frames[1:])
        except MalformedMessage as error:  # pragma: no cover - a bug of the simulation
            raise AssertionError("the simulation sent what cannot be read") from error
        op, watch = request.header["op"], self.watch
        if op in ("heartbeat", "get"):
            was_changed = self._is_changed
            self._handle(request, now)
            if op == "get":
                self._is_changed = was_changed  # it changes no number, queue or grant
            return
        self._write_records()
        before, session = watch.sequence, self._session_of(request)
        watch.cleared.clear()
        self._handle(request, now)
        self._write_records()
        if op == "hello":
            if not watch.keeps_gradients and self._session_of(request) != session:
                # Where there is no journal a new session takes back what was not decided before it, in order.
                watch.reference.take_back(request.header["worker"])
        elif watch.cleared or watch.sequence > before:
            self.world.told.executed(request.header["client"], request.header["id"], watch.cleared, watch.binding)

    def _session_of(self, request: RequestReceived) -> tuple[str, int] | None:
        own = self.watch.reference.workers.get(request.header.get("worker", ""))
        return None if own is None else own.session

    def _handle(self, event: Event | Gradient, now: float) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise Crash("between two steps of the loop")
        effects = self.core.handle(event, now)
        if event is not _TIME_PASSED and event is not _DRAINED:
            self._is_changed = True
        for effect in effects:
            self._is_changed = True
            self.steps_left -= 1
            if self.steps_left < 0:
                raise Crash("between two steps of the loop")
            self._carry_out(effect, now)

    def _carry_out(self, effect: Effect, now: float) -> None:
        kind = type(effect)
        if kind is Reply:
            assert isinstance(effect, Reply)
            frames = [wire.pack(effect.header), *(bytes(frame) for frame in effect.frames)]
            self.world.replied(self, effect.envelope, effect.header)
            self.world.network.send_reply(effect.envelope, frames, self.number)
        elif kind is WriteCheckpoint:
            assert isinstance(effect, WriteCheckpoint)
            records = self.core.take_records()
            # Some may be newer than the checkpoint, which was begun within this event.
            older = max(0, effect.checkpoint.sequence - self.watch.sequence)
            self.watch.recorded(records[:older], self.versions)
            self.watch.checkpoint_begun(effect)
            self.watch.recorded(records[older:], self.versions)
            self.files.put(records)
            self.files.put(effect)
        elif self.world.trace is not None:
            self.world.note(self.name, str(effect))

    def _write_records(self) -> None:
        records = self.core.take_records()
        if records:
            self.watch.recorded(records, self.versions)
            self.files.put(records)
