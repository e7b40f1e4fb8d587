"""The real core and real sessions on a network that a test plays by hand: nothing moves unless it is told to.

Real bytes travel: headers are packed and unpacked, gradients are parsed, payloads are frames. What became of each
gradient is written down here, beside the core's own books, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from distgrad import gradient_messages, wire
from distgrad.codec import encode
from distgrad.durable.books import LIVE
from distgrad.errors import (
    BrokerRestarted,
    DeliveryFailed,
    DistgradError,
    GradientRefused,
    LayoutError,
    MalformedMessage,
    from_code,
)
from distgrad.layout import Layout
from distgrad_broker.events import Event, Reply, RequestReceived, SocketsDrained, WorkDue
from distgrad_worker import asking
from distgrad_worker.bundles import messages
from distgrad_worker.headers import Header, checked_details
from distgrad_worker.losses import MAX_TRIES
from distgrad_worker.session import GREETING, OPEN, Session
from support.simulated_broker import SMALL, Ledger, SimulatedBroker

MAX_ROUNDS = 400  # of half a second: leases of the dead run out, and five attempts with doubled patience


class Pipe:
    """One PUSH connection: messages arrive in order, if they arrive."""

    def __init__(self, owner: SimulatedWorker) -> None:
        self.owner = owner
        self.messages: list[list[bytes]] = []

    def cut(self, start: int, count: int) -> bool:
        """Lose messages from the middle or the end; tell whether there were any."""
        lost = self.messages[start : start + count]
        del self.messages[start : start + count]
        self.owner.losses += bool(lost)
        return bool(lost)


class Asked(NamedTuple):
    """The request whose reply a worker waits for."""

    id: int
    is_hello: bool
    hurry: int


class SimulatedWorker:
    """One process: a session, and what its driver would do, a step at a time."""

    def __init__(self, network: Network, worker_id: str, *, generated: bool, window_bytes: int | None) -> None:
        self.network = network
        self.uid = len(network.workers)
        self.session = Session(worker_id, b"nonce%06d" % self.uid, generated=generated, window_bytes=window_bytes)
        self.pipe: Pipe | None = None
        self.asked: Asked | None = None
        self.is_gone = False
        self.losses = 0
        self.pushed: list[int] = []
        self.problems: list[DistgradError] = []
        self.waiting: tuple[Layout, list[np.ndarray[Any, Any]]] | None = None
        self._requests = 0

    @property
    def is_alive(self) -> bool:
        return not self.is_gone and self.session.ended is None

    def push(self, values: int) -> None:
        """Begin to push a gradient; it waits if there is no grant for it."""
        session = self.session
        if self.waiting is None and session.layout is not None:
            trained = [arena for arena in session.layout.arenas if arena.trainable]
            arenas = [np.full(arena.size, values, arena.dtype) for arena in trained]
            arenas[0][self.uid % 8] += 1  # so that a mix-up of two workers changes the sum
            self.waiting = session.layout, arenas
        self.pump()

    def give_up(self) -> None:
        """Interrupt the push that waits, as Ctrl-C does."""
        self.waiting = None
        self.session.stop_wanting()

    def pump(self) -> None:
        """Do what needs no reply: number a gradient that waits, open a pipe, send."""
        session, network = self.session, self.network
        if self.waiting is not None and session.ended is None:
            layout, arenas = self.waiting
            try:
                can_push = session.can_push(layout.gradient_bytes, layout.fingerprint)
            except LayoutError:
                can_push = False
                self.give_up()
            if can_push:
                cursor = f"{self.uid}.{len(self.pushed)}"
                header = Header(session.worker_id, layout.fingerprint, session.state)
                details = checked_details(None, 1, cursor)
                number = session.push(header, details, encode(layout, arenas), layout.gradient_bytes)
                network.ledger[cursor] = (number, layout, arenas)
                self.pushed.append(number)
                self.waiting = None
        if session.must_reopen:
            self.pipe = network.open_pipe(self)
            session.reopened()
        if self.pipe is not None:
            for frames in messages(session.sendable(network.now)):
                self.pipe.messages.append([bytes(frame) for frame in frames])
        while session.problems:
            self.problems.append(session.problems.popleft())

    def ask(self, *, again: bool = False) -> None:
        """Send a hello or a heartbeat, if none waits for its reply or the time-out has come."""
        session, asked = self.session, self.asked
        if not self.is_alive:
            return
        if asked is not None and not again and (asked.is_hello or not session.hurry or asked.hurry == session.hurry):
            return
        is_hello = session.phase == GREETING
        header = asking.hello(session) if is_hello else asking.heartbeat(session)
        self._requests += 1
        header["id"] = self._requests
        self.asked = Asked(self._requests, is_hello, session.hurry)
        self.network.send_request(self, [wire.pack(header)])

    def receive(self, frames: Sequence[bytes]) -> None:
        """Take in a reply, as the driver does."""
        session, asked = self.session, self.asked
        header = wire.unpack(frames[0])
        if asked is None or header.get("id") != asked.id or not self.is_alive:
            return
        self.asked = None
        now = self.network.now
        if not header["ok"]:
            code = header["error"]
            session.on_error(from_code(code, header["message"]), code)
        elif asked.is_hello:
            session.on_hello(header, frames[1] if len(frames) > 1 else None, now)
        elif session.phase != GREETING:
            session.on_heartbeat(header, now)
        self.pump()

    def leave(self) -> None:
        """Say goodbye, as `close` does after its flush, and end."""
        self.give_up()
        self.network.send_request(
            self, [wire.pack({**asking.leave(self.session), "client": b"goodbye%04d" % self.uid, "id": 1})]
        )
        self.is_gone = True


class Network:
    """What is on its way, and one broker; processes come and go."""

    def __init__(self, queue_bytes: int, max_staleness: int | None = None) -> None:
        self.now = 100.0
        self.workers: list[SimulatedWorker] = []
        self.pipes: list[Pipe] = []
        self.requests: list[tuple[SimulatedWorker, list[bytes]]] = []
        self.replies: list[tuple[SimulatedWorker, list[bytes]]] = []
        self.ledger: Ledger = {}
        self.former: list[SimulatedBroker] = []
        self._queue_bytes = queue_bytes
        self._max_staleness = max_staleness
        self._commands = 0
        self.broker = self._new_broker()

    @property
    def alive(self) -> list[SimulatedWorker]:
        return [worker for worker in self.workers if worker.is_alive]

    def join(self, worker_id: str, *, generated: bool = False, window_bytes: int | None = None) -> SimulatedWorker:
        """Start a process; another one under the same id goes on as a ghost."""
        worker = SimulatedWorker(self, worker_id, generated=generated, window_bytes=window_bytes)
        self.workers.append(worker)
        return worker

    def restart(self) -> None:
        """End the broker and start another, which knows nothing."""
        self.former.append(self.broker)
        self.broker = self._new_broker()
        for worker in self.workers:
            worker.losses += 1

    def open_pipe(self, worker: SimulatedWorker) -> Pipe:
        self.pipes = [pipe for pipe in self.pipes if pipe.messages or pipe.owner.pipe is pipe]
        self.pipes.append(Pipe(worker))
        return self.pipes[-1]

    def send_request(self, worker: SimulatedWorker, frames: list[bytes]) -> None:
        self.requests.append((worker, frames))

    def deliver_request(self, index: int, *, keep: bool = False) -> None:
        """Hand one request to the broker; `keep` leaves a copy on the way."""
        worker, frames = self.requests[index] if keep else self.requests.pop(index)
        self._handle(RequestReceived((b"%d" % worker.uid, b""), wire.unpack(frames[0]), frames[1:]))

    def deliver_reply(self, index: int) -> None:
        worker, frames = self.replies.pop(index)
        worker.receive(frames)

    def deliver_gradient(self, pipe: Pipe) -> None:
        self.give_gradient(pipe.messages.pop(0))

    def give_gradient(self, frames: list[bytes]) -> None:
        """Hand a message of the gradients channel to the broker, as the channel does."""
        parts = frames[1:]
        try:
            gradients = gradient_messages.parse_gradients(
                wire.unpack(frames[0]), parts, sum(len(part) for part in parts)
            )
        except MalformedMessage:
            return
        for gradient in gradients:
            self._handle(gradient)

    def work(self) -> None:
        self._handle(WorkDue())

    def drain_sockets(self, busy_s: float = 0.0) -> None:
        self._handle(SocketsDrained(busy_s))

    def command(self, op: str, frames: Sequence[bytes] = (), **keys: Any) -> dict[str, Any]:
        """Have an administrator do something; its reply is heard at once."""
        self._commands += 1
        header = {"v": 1, "op": op, "incarnation": self.broker.state.incarnation, **keys}
        header |= {"client": b"administrator", "id": self._commands}
        replies = self._handle(RequestReceived((b"admin", b""), wire.unpack(wire.pack(header)), frames))
        (reply,) = [reply for reply in replies if reply.envelope[0] == b"admin"]
        return reply.header

    def set_parameters(self, layout: Layout | None) -> None:
        """Replace the parameters by zeros of a layout, or take them away."""
        broker = self.broker
        broker.expected = []
        if layout is None:
            assert self.command("set", absent=True)["ok"]
            return
        arenas = [np.zeros(arena.size, arena.dtype) for arena in layout.arenas]
        parts = [bytes(part) for part in encode(layout, arenas, trained_only=False)]
        broker.expected = arenas
        assert self.command("set", [layout.to_frame(), *parts])["changed"]

    def heal(self, pause_s: float = 0.06) -> None:
        """Let everything arrive once: what a turn of time does when nothing is broken."""
        for worker in self.alive:
            worker.pump()
            worker.ask(again=worker.asked is not None)
        for pipe in list(self.pipes):
            while pipe.messages:
                self.deliver_gradient(pipe)
        while self.requests:
            self.deliver_request(0)
        self.drain_sockets()
        while self.broker.core.has_work:
            self.work()
        self.now += pause_s
        self.drain_sockets()
        while self.replies:
            self.deliver_reply(0)

    def finish(self) -> None:
        """End all faults and check that everything pushed is settled, and was told, within bounded time."""
        if self.broker.versions.layout is None:
            self.set_parameters(SMALL)
        self.command("start")
        for _ in range(MAX_ROUNDS):
            self.heal(0.5)
            self.check()
            if not any(w.waiting or len(w.session.window) or w.session.phase != OPEN for w in self.alive):
                break
        else:
            raise AssertionError("a livelock: something is never settled")
        outcomes: dict[str, set[str]] = {}
        for broker in (*self.former, self.broker):
            for settled in broker.settled:
                outcomes.setdefault(settled.cursor, set()).add(settled.outcome)
        refused = {settled.cursor for settled in self.broker.settled if settled.outcome == "refused"}
        for worker in self.workers:
            told = refused_numbers(worker)
            cursors = {number: f"{worker.uid}.{index}" for index, number in enumerate(worker.pushed)}
            assert len(set(told)) == len(told)
            assert all("refused" in outcomes[cursors[number]] for number in told)
            if isinstance(worker.session.ended, DeliveryFailed):
                assert worker.losses >= MAX_TRIES - 1
            if worker.is_alive:
                assert all(cursor in outcomes for cursor in cursors.values())
                assert all(cursor not in refused or number in told for number, cursor in cursors.items())

    def check(self) -> None:
        """Check what must hold at every moment."""
        self.broker.check()
        deadline = self.broker.core.next_deadline()
        assert deadline is None or deadline <= self.now + 5.0
        for worker in self.workers:
            self._check_worker(worker)

    def _check_worker(self, worker: SimulatedWorker) -> None:
        session, window = worker.session, worker.session.window
        assert window.settled <= window.sent <= window.last
        member = self.broker.state.members.get(session.worker_id)
        if member is None or session.phase != OPEN or not worker.is_alive:
            return
        if asking.heartbeat(session)["session"] != member.session or member.state != LIVE:
            return
        if window.in_flight_bytes <= member.committed and asking.heartbeat(session)["grant_seq"] == member.grant_seq:
            self.broker.lapsed.discard(member)
        # A lease that lapsed took the grant with it; what was sent meanwhile is dropped and sent again.
        assert window.in_flight_bytes <= member.committed or member in self.broker.lapsed

    def _handle(self, event: Event | wire.Gradient) -> list[Reply]:
        replies = self.broker.handle(event, self.now, self.ledger)
        for reply in replies:
            if reply.envelope[0] != b"admin":
                worker = self.workers[int(reply.envelope[0])]
                self.replies.append((worker, [wire.pack(reply.header), *(bytes(frame) for frame in reply.frames)]))
        return replies

    def _new_broker(self) -> SimulatedBroker:
        return SimulatedBroker(f"inc{len(self.former)}", self._queue_bytes, max_staleness=self._max_staleness)


def refused_numbers(worker: SimulatedWorker) -> list[int]:
    """List the numbers whose refusal a process was told of."""
    return [int(p.number or 0) for p in worker.problems if isinstance(p, GradientRefused)]


def restarts(worker: SimulatedWorker) -> int:
    """Count how often a process was told that the broker had been restarted."""
    return sum(isinstance(problem, BrokerRestarted) for problem in worker.problems)
