"""One worker's process: the real session, and what its driver would do with sockets and a clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from distgrad import wire
from distgrad.errors import DeliveryFailed, DistgradError, Fenced, GradientRefused, from_code
from distgrad_worker import asking
from distgrad_worker.bundles import messages
from distgrad_worker.losses import MAX_TRIES
from distgrad_worker.session import GREETING, Session
from simulation.clockwork import Alarm, Violation
from simulation.network import Link, Pipe
from simulation.training import LEAVING, Training

if TYPE_CHECKING:
    from simulation.world import World

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 2.0
LOST_RETRY_S = 0.02
# A real driver asks again as soon as it was answered; with nothing new, pauses that grow keep the simulation fast.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 0.5


class Asked(NamedTuple):
    """The request of the lease that waits for its reply."""

    id: int
    is_hello: bool
    hurry: int
    retry_at: float


class WorkerProcess:
    """A process that runs under a worker id.

    Attributes
    ----------
    training : Training
        The program that pulls and pushes.
    losses : int
        How often something of its was lost on the way.
    refused : list of int
        Numbers whose refusal it was told of.
    """

    training: Training

    def __init__(self, world: World, uid: int, worker_id: str, *, generated: bool) -> None:
        self.world = world
        self.uid = uid
        self.name = f"{worker_id}/{uid}"
        self.session = Session(worker_id, b"nonce%06d" % uid, generated=generated, window_bytes=world.plan.window_bytes)
        self.link = Link()
        self.pipe: Pipe | None = None
        self.is_generated = generated
        self.is_gone = False
        # Whether it ended with everything settled.
        self.has_completed = False
        self.frozen_until = 0.0
        self.clock_offset = 0.0
        self.losses = 0
        self.refused: list[int] = []
        self._asked: Asked | None = None
        self._retry_s = FIRST_RETRY_S
        self._pause_s = FIRST_PAUSE_S
        self._pause_until = 0.0
        self._next_beat = 0.0
        self._requests = 0
        self._alarm = Alarm(world, self.turn)

    @property
    def is_alive(self) -> bool:
        return not self.is_gone and self.session.ended is None

    @property
    def now(self) -> float:
        """What this process takes for the time."""
        return self.world.now + self.clock_offset

    def wake(self, delay_s: float) -> None:
        """Have the process look around at a time, if it does not do so before."""
        self._alarm.set(self.world.now + delay_s)

    def connection_lost(self, pipe: Pipe) -> None:
        """Hear from the operating system that a connection broke."""
        if pipe is not self.pipe or not self.is_alive:
            return
        self.session.connection_lost()
        if self._asked is not None:
            self._asked = self._asked._replace(retry_at=min(self._asked.retry_at, self.now + LOST_RETRY_S))
        self.wake(0.0)

    def receive(self, frames: Sequence[bytes]) -> None:
        """Take in a reply on the channel of the lease, as the driver does."""
        world, session, asked = self.world, self.session, self._asked
        header = wire.unpack(frames[0])
        if not self.is_alive or asked is None or header.get("id") != asked.id or self.training.doing == LEAVING:
            return  # who says goodbye listens to nothing else
        if world.now < self.frozen_until:
            world.at(self.frozen_until - world.now, self.receive, frames)
            return
        now = self.now
        before = session.window.settled
        self._asked, self._retry_s = None, FIRST_RETRY_S
        self._next_beat = now + min(1.0, session.lease_s / 4)
        if not header["ok"]:
            code = header["error"]
            if world.trace is not None:
                world.note(self.name, f"is told: {code}, {header['message']}")
            session.on_error(from_code(code, header["message"]), code)
            if session.phase == GREETING and code == "failed":
                self._asked = Asked(0, True, 0, now + self._retry_s)
        elif asked.is_hello:
            if world.trace is not None:
                world.note(self.name, f"has session {header['session']}, accepted {header['accepted']}")
            session.on_hello(header, frames[1] if len(frames) > 1 else None, now)
        elif session.phase != GREETING:
            if world.trace is not None and header["settled"] > before:
                world.note(self.name, f"is told that {header['settled']} is settled")
            session.on_heartbeat(header, now)
        has_news = session.window.settled > before or asked.is_hello
        self._pause_s = FIRST_PAUSE_S if has_news else min(4 * self._pause_s, LAST_PAUSE_S)
        self._pause_until = now + self._pause_s
        self._check()
        self.turn()

    def awaits(self, request_id: int) -> bool:
        """Tell whether the reply to a request would be looked at: another one may have been sent since."""
        return self._asked is not None and self._asked.id == request_id

    def next_id(self) -> int:
        """Give a request its number."""
        self._requests += 1
        return self._requests

    def end(self) -> None:
        """Stop for good, without a word."""
        self.is_gone = True
        if self.pipe is not None:
            self._close_pipe()

    def end_well(self, *, is_complete: bool) -> None:
        """End with everything settled."""
        self.has_completed = True
        self.end()
        self.world.has_ended(self, is_complete=is_complete)

    def turn(self) -> None:
        """Look around: do what can be done, send and ask what is due."""
        if not self.is_alive:
            return
        world = self.world
        if world.now < self.frozen_until:
            self.wake(self.frozen_until - world.now)
            return
        rest_s = self.training.go_on()
        if self.is_gone:
            return
        if self.training.doing == LEAVING:
            self.wake(rest_s or 0.0)
            return
        self._send()
        wait_s = self._ask_if_due()
        self.wake(max(1e-6, wait_s if rest_s is None else min(wait_s, rest_s)))

    def _send(self) -> None:
        session = self.session
        if session.must_reopen:
            if self.pipe is not None:
                self._close_pipe()
            self.pipe = Pipe(self)
            session.reopened()
        if self.pipe is not None:
            entries = session.sendable(self.now)
            if entries:
                batch = [[bytes(frame) for frame in frames] for frames in messages(entries)]
                if self.world.trace is not None:
                    self.world.note(self.name, f"sends {entries[0].number} to {entries[-1].number}")
                self.world.network.send_gradients(self.pipe, batch)

    def _close_pipe(self) -> None:
        """Close the socket with linger 0: what is on its way may still arrive, all of it or the first few."""
        pipe, self.pipe = self.pipe, None
        assert pipe is not None
        pipe.is_closed = True
        pipe.lose(self.world.random.randrange(len(pipe.sent) + 1), len(pipe.sent))

    def _ask_if_due(self) -> float:
        """Ask what the driver would ask; give the seconds until it would look again."""
        session, asked, now = self.session, self._asked, self.now
        if asked is None:
            is_due = session.phase == GREETING or session.is_busy or now >= self._next_beat
            if not is_due:
                return self._next_beat - now
            if now < self._pause_until and session.phase != GREETING and not session.hurry:
                return self._pause_until - now
        elif now >= asked.retry_at:
            self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
        elif asked.is_hello or asked.hurry == session.hurry or not session.hurry:
            return asked.retry_at - now
        is_hello = session.phase == GREETING
        header = asking.hello(session) if is_hello else asking.heartbeat(session)
        header["id"] = self.next_id()
        self._asked = Asked(self._requests, is_hello, session.hurry, now + self._retry_s)
        if is_hello and self.world.trace is not None:
            self.world.note(self.name, f"says hello, session {header['session']}, lowest {header['lowest']}")
        self.world.network.send_request(self.link, (b"%d" % self.uid, b"lease", b""), [wire.pack(header)])
        return self._retry_s

    def _check(self) -> None:
        """Check what must hold for a session, and take what its user would be told."""
        session, window = self.session, self.session.window
        if not window.settled <= window.sent <= window.last:
            raise Violation(f"{self.name}: settled {window.settled}, sent {window.sent}, last {window.last}")
        while session.problems:
            self._hear_of(session.problems.popleft())
        ended = session.ended
        if ended is None:
            return
        if self.world.trace is not None:
            self.world.note(self.name, f"ends: {ended}")
        if isinstance(ended, Fenced):
            if not self.world.is_superseded(self):
                raise Violation(f"{self.name} was fenced, but there is no newer process")
        elif not isinstance(ended, DeliveryFailed):
            raise Violation(f"{self.name} ended: {ended}")
        elif self.losses < MAX_TRIES - 1:
            raise Violation(f"{self.name} gave up, but only {self.losses} times something was lost: {ended}")
        self.end()
        self.world.has_ended(self, is_complete=False)

    def _hear_of(self, problem: DistgradError) -> None:
        if not isinstance(problem, GradientRefused):
            raise Violation(f"{self.name} is told: {problem}")
        assert problem.number is not None
        if problem.number in self.refused:
            raise Violation(f"{self.name} is told twice that {problem.number} was refused")
        self.refused.append(problem.number)
