"""The broker's loop: one thread that owns every socket, the core and the parameters.

| thread | owns | receives through | gives away |
|---|---|---|---|
| loop (``distgrad-broker``) | all sockets, the core, the parameters | sockets, a pipe | frames, pinned arenas |
| files (``distgrad-files``) | the data folder, and the file of a save | a queue | "written", through the pipe |

A turn: wait for something; read both channels, a bounded amount; let the core answer; apply for a while. Nothing here
decides what a message means.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq

from distgrad.durable.disk_events import CheckpointEnded, DiskTroubled, RecordsWritten, WriteCheckpoint
from distgrad.durable.records import Record
from distgrad.log import RateLimiter
from distgrad.malloc import give_back
from distgrad.spinning import Spinner
from distgrad.wire import ASK_S, Gradient
from distgrad_broker.authenticator import Authenticator
from distgrad_broker.channels import ControlChannel, GradientChannel
from distgrad_broker.core import Core
from distgrad_broker.events import (
    Effect,
    HooksCounted,
    Log,
    MessageRejected,
    Reply,
    RequestReceived,
    SaveEnded,
    SaveParameters,
    Shutdown,
    ShutdownAsked,
    SocketsDrained,
    TimePassed,
    WorkDue,
)
from distgrad_broker.local_lanes import LocalLanes

# How much is read from each channel in a turn before the other one, and the updates, get theirs.
MAX_REQUESTS_A_TURN = 64
MAX_GRADIENTS_A_TURN = 64
# Updates go on for this long before the sockets are looked at again; one update may of course take longer.
WORK_SLICE_S = 0.002
# Leases, quiet readers and revoked keys are looked at about this often even if nothing happens.
IDLE_S = 0.25
# A request with more frames than this (parameters of tens of megabytes are set) leaves memory that nobody uses soon
# after; this long after the last one it is given back.
MANY_FRAMES, GIVE_BACK_AFTER_S = 16, 1.0
# A shutdown reads what has already arrived for this long at most,
INTAKE_TIMEOUT_S = 2.0
# and gives what is queued this long to be applied.
CLOSE_TIMEOUT_S = 30.0
# Then workers ask what became of it (one that waits does so every 50 ms, others every 0.2 s, and this is longer where
# they ask more rarely). Who does not hear of it would send what was applied here to the next broker.
FAREWELL_S = 0.5


class Files(Protocol):
    """Who writes files, on a thread of its own; each method returns at once."""

    def save(self, job: SaveParameters) -> None:
        """Write the parameters to their file; `SaveEnded` follows.

        Parameters
        ----------
        job : SaveParameters
            What to write.
        """
        ...

    def checkpoint(self, job: WriteCheckpoint) -> None:
        """Write a checkpoint; `CheckpointEnded` follows.

        Parameters
        ----------
        job : WriteCheckpoint
            What to write.
        """
        ...

    def write(self, records: Sequence[Record]) -> None:
        """Write records to the journal; `RecordsWritten` follows.

        Parameters
        ----------
        records : sequence of Record
            In order.
        """
        ...


Posted = SaveEnded | RecordsWritten | CheckpointEnded | DiskTroubled | HooksCounted | ShutdownAsked


class Loop:
    """One broker's loop; made and run on the same thread.

    Parameters
    ----------
    core : Core
        Not shared with anybody.
    control, gradients : ControlChannel, GradientChannel
        Bound channels.
    authenticator : Authenticator or None
        With keys.
    files : Files
        The file thread.
    on_log : callable
        Receives each `Log` effect.
    lanes : LocalLanes or None
        Of workers on this host.
    """

    def __init__(
        self,
        core: Core,
        control: ControlChannel,
        gradients: GradientChannel,
        authenticator: Authenticator | None,
        files: Files,
        on_log: Callable[[Log], None],
        lanes: LocalLanes | None = None,
    ) -> None:
        self._core = core
        self._control = control
        self._gradients = gradients
        self._authenticator = authenticator
        self._lanes = lanes
        if lanes is not None:
            control.by_lane = lanes.send
        self._files = files
        self._on_log = on_log
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        # Reentrant, because a signal handler may post while the same thread is posting or closing.
        self._pipe_lock = threading.RLock()
        self._is_closed = False
        self._inbox: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self._ends_at = math.inf
        self._is_closing = False
        # Whether the gradients read in this turn are small.
        self._is_small = True
        self._rejections = RateLimiter()
        self._strangers: Counter[str] = Counter()
        self._count_strangers_at = 0.0
        self._gives_back_at = math.inf

    def post(self, event: Posted) -> None:
        """Hand an event to the loop, from any thread or signal handler.

        Parameters
        ----------
        event : Posted
            What happened.
        """
        with self._pipe_lock:
            if self._is_closed:
                return
            self._inbox.put(event)
            with contextlib.suppress(BlockingIOError):  # a full pipe is a wake-up already
                os.write(self._wake_write, b"x")

    def run(self) -> None:
        """Serve until the core or a shutdown ends it."""
        poller = zmq.Poller()
        sockets: list[Any] = [self._control.socket.raw(), self._gradients.socket.raw(), self._wake_read]
        if self._authenticator is not None:
            sockets.append(self._authenticator.socket)
        lanes_fd = None if self._lanes is None else self._lanes.fd
        if lanes_fd is not None:
            sockets.append(lanes_fd)
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        spinner, spins = Spinner(), False
        handle = self._core.handle
        busy_since_drained = 0.0
        while time.monotonic() < self._ends_at:
            timeout_ms = self._timeout_ms()
            ready = dict(spinner.poll(poller.poll, timeout_ms) if spins else poller.poll(timeout_ms))
            # ZeroMQ's threads would have to share their processors with one that looks for their messages.
            spins = lanes_fd in ready if ready else spins
            now = time.monotonic()
            if self._wake_read in ready:
                self._take_inbox(now)
            if self._authenticator is not None:
                if self._authenticator.socket in ready:
                    self._authenticator.handle()
                self._authenticator.refresh(now)
                self._count_strangers(self._authenticator, now)
            is_drained = self._read_control(now) if sockets[0] in ready else True
            self._is_small = True
            if lanes_fd in ready:
                self._read_lanes(now)
            if sockets[1] in ready:
                is_drained = self._read_gradients(now) and is_drained
            if is_drained:
                self._carry_out(handle(SocketsDrained(busy_since_drained), now), now)
                busy_since_drained = 0.0
            else:
                self._carry_out(handle(_TIME_PASSED, now), now)
            if self._core.has_work:
                busy_since_drained += self._work(now)
            records = self._core.take_records()
            if records:
                self._files.write(records)
            if now >= self._gives_back_at:
                self._gives_back_at = math.inf
                give_back()
            if self._is_closing and self._core.is_drained:
                if self._core.is_known:
                    return
                self._ends_at = min(self._ends_at, now + FAREWELL_S * self._core.ask_s / ASK_S)

    def close(self) -> None:
        """Close the pipe that wakes the loop; `post` does nothing from then on. Idempotent."""
        with self._pipe_lock:
            if self._is_closed:
                return
            self._is_closed = True
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _timeout_ms(self) -> int:
        if self._core.has_work:
            return 0
        timeout_s = IDLE_S
        deadline = self._core.next_deadline()
        if deadline is not None:
            timeout_s = min(timeout_s, max(0.0, deadline - time.monotonic()))
        # Rounded up: a poll that ends a moment too early would spin until the deadline.
        return math.ceil(timeout_s * 1000)

    def _take_inbox(self, now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while not self._inbox.empty():
            event = self._inbox.get()
            if isinstance(event, ShutdownAsked):
                if self._is_closing:
                    continue
                # What has already arrived belongs to what is drained; then nothing more is accepted. A peer that never
                # stops sending must not hold this up; what grants allow is read in a fraction of the time.
                while not self._read_gradients(now) and time.monotonic() < now + INTAKE_TIMEOUT_S:
                    pass
                self._read_lanes(now)
                self._is_closing = True
                self._ends_at = now + CLOSE_TIMEOUT_S
            self._carry_out(self._core.handle(event, now), now)

    def _count_strangers(self, authenticator: Authenticator, now: float) -> None:
        """Tell the core of the connections that the keys kept out since the last look."""
        if now < self._count_strangers_at:
            return
        self._count_strangers_at = now + IDLE_S
        refused = Counter(authenticator.refused())
        for reason in (refused - self._strangers).elements():
            self._reject(MessageRejected(reason), now)
        self._strangers = refused

    def _read_control(self, now: float) -> bool:
        """Read a turn's worth of requests and tell whether that was all."""
        for _ in range(MAX_REQUESTS_A_TURN):
            event = self._control.receive()
            if event is None:
                return True
            if isinstance(event, MessageRejected):
                self._reject(event, now)
                continue
            if type(event) is RequestReceived and len(event.frames) > MANY_FRAMES:
                self._gives_back_at = now + GIVE_BACK_AFTER_S
            self._carry_out(self._core.handle(event, now), now)
        return False

    def _reject(self, event: MessageRejected, now: float) -> None:
        """Have the core count what no peer should send, and log the first of many."""
        self._core.handle(event, now)
        suppressed = self._rejections.admit(event.reason, now)
        if suppressed is not None:
            fields = {"reason": event.reason, "not_logged_before": suppressed}
            self._on_log(Log(logging.WARNING, "message rejected", fields))

    def _read_gradients(self, now: float) -> bool:
        """Read a turn's worth of gradients and tell whether that was all."""
        receive = self._gradients.receive
        n_left = MAX_GRADIENTS_A_TURN
        while n_left > 0:
            gradients = receive()
            if gradients is None:
                return True
            if isinstance(gradients, MessageRejected):
                self._reject(gradients, now)
                n_left -= 1
                continue
            n_left -= len(gradients)
            if self._lanes is not None and self._lanes.is_used:
                self._catch_up(gradients[0], now)
            if not self._take_in(gradients, now):
                # A large one is applied while ZeroMQ's own thread receives the next.
                return False
        return False

    def _read_lanes(self, now: float) -> None:
        """Read what came by lanes: of each little, so it is never more than a turn's worth."""
        if self._lanes is None:
            return
        for gradients in self._lanes.receive():
            if isinstance(gradients, MessageRejected):
                self._reject(gradients, now)
            else:
                self._take_in(gradients, now)

    def _catch_up(self, gradient: Gradient, now: float) -> None:
        """Read what a worker has sent before a gradient, by a lane: it is there by now, perhaps behind a greeting."""
        for _ in range(3):
            if self._core.expects(gradient):
                return
            self._read_lanes(now)

    def _take_in(self, gradients: Sequence[Gradient], now: float) -> bool:
        """Hand gradients of one message to the core, and tell whether they are small."""
        handle = self._core.handle
        for gradient in gradients:
            effects = handle(gradient, now)
            if effects:
                self._carry_out(effects, now)
        if gradients and gradients[0].size > 1 << 20:
            self._is_small = False
            return False
        return True

    def _work(self, now: float) -> float:
        """Apply for one slice of time and tell how long that took."""
        handle = self._core.handle
        started = moment = time.monotonic()
        while self._core.has_work and moment - started < WORK_SLICE_S:
            effects = handle(_SMALL_WORK_DUE if self._is_small else _WORK_DUE, moment)
            if effects:
                self._carry_out(effects, moment)
            moment = time.monotonic()
        return moment - started

    def _carry_out(self, effects: Sequence[Effect], now: float) -> None:
        for effect in effects:
            if type(effect) is Reply:
                self._control.send(effect)
            elif type(effect) is Log:
                self._on_log(effect)
            elif type(effect) is SaveParameters:
                self._files.save(effect)
            elif type(effect) is WriteCheckpoint:
                # It covers what was noted before it, which the disk must have first.
                self._files.write(self._core.take_records())
                self._files.checkpoint(effect)
            elif type(effect) is Shutdown:
                self._ends_at = min(self._ends_at, now + effect.after_s)


_WORK_DUE = WorkDue()
# Gradients that take microseconds each are applied in bunches.
_SMALL_WORK_DUE = WorkDue(16)
_TIME_PASSED = TimePassed()
