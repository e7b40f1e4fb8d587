"""A core to talk to directly: requests as maps, replies as maps, gradients by their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrad import gradient_messages, wire
from distgrad.codec import encode
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.policies import Asynchronous, Policy, Weighing
from distgrad.rules import Rule
from distgrad_broker.core import Core
from distgrad_broker.core_settings import CoreSettings
from distgrad_broker.events import Effect, Event, Reply, RequestReceived, SocketsDrained, WorkDue
from distgrad_broker.members import Member
from distgrad_broker.versions import Versions

LAYOUT = Layout.of({"b": np.zeros(2, np.float32), "w": np.zeros((2, 3), np.float32)})
OTHER = Layout.of([np.zeros(5, np.float32)])
# The least that a gradient is charged; those of both layouts are.
ONE = wire.MIN_CHARGE_BYTES


def frames_of(layout: Layout, value: float = 0.0) -> list[bytes]:
    """Build the frames of a `set`."""
    arenas = [np.full(arena.size, value, arena.dtype) for arena in layout.arenas]
    return [layout.to_frame(), *(bytes(part) for part in encode(layout, arenas, trained_only=False))]


class Kit:
    """A core, and a clock that the test moves."""

    def __init__(
        self,
        layout: Layout | None = LAYOUT,
        *,
        policy: Policy | None = None,
        weighing: Weighing | None = None,
        rule: Rule | None = None,
        incarnation: str = "one",
        **settings: Any,
    ) -> None:
        self.now = 50.0
        self.holder = ParameterHolder(rule=rule, executor="numpy")
        if layout is not None:
            self.holder.set_arenas(layout, [np.zeros(arena.size, arena.dtype) for arena in layout.arenas])
        settings = {"incarnation": incarnation, "gradients": "tcp://127.0.0.1:5555", **settings}
        self.core = Core(CoreSettings(**settings), Versions(self.holder), policy or Asynchronous(), weighing)
        self.state = self.core.state
        self.sessions: dict[str, str] = {}
        self.effects: list[Effect] = []
        self._asked = 0

    def handle(self, event: Event | wire.Gradient) -> list[Effect]:
        effects = list(self.core.handle(event, self.now))
        self.effects += effects
        return effects

    def replies_to(self, envelope: bytes) -> list[Reply]:
        """List what was answered so far to a request that came with this envelope."""
        return [e for e in self.effects if isinstance(e, Reply) and e.envelope[0] == envelope]

    def send(
        self,
        op: Any,
        frames: Sequence[bytes] = (),
        *,
        envelope: bytes | None = None,
        role: str | None = None,
        user: str | None = None,
        **keys: Any,
    ) -> bytes:
        """Send a request and return its envelope."""
        self._asked += 1
        envelope = envelope or b"request%d" % self._asked
        header = {"v": 1, "op": op, "incarnation": self.state.incarnation, **keys}
        header = wire.unpack(wire.pack(header))
        self.handle(RequestReceived((envelope, b""), header, frames, role, user))
        return envelope

    def reply(self, op: Any, frames: Sequence[bytes] = (), **keys: Any) -> Reply:
        """Send a request that is answered at once."""
        (reply,) = self.replies_to(self.send(op, frames, **keys))
        return reply

    def ask(self, op: Any, frames: Sequence[bytes] = (), **keys: Any) -> dict[str, Any]:
        """Send a request that is answered at once, and return the reply's header as it crosses the wire."""
        return wire.unpack(wire.pack(self.reply(op, frames, **keys).header))

    def hello(self, worker: str = "w", nonce: bytes | None = None, **keys: Any) -> dict[str, Any]:
        header = self.ask("hello", worker=worker, nonce=nonce or f"nonce of {worker}".encode(), **keys)
        if header["ok"]:
            self.sessions[worker] = header["session"]
        return header

    def beat_keys(self, worker: str = "w", **keys: Any) -> dict[str, Any]:
        member = self.state.members.get(worker)
        fingerprint = self.state.fingerprint
        grant_seq = member.grant_seq if member else 0
        held = member.promised if member else 0
        keys = {"sent": 0, "settled": 0, "grant_seq": grant_seq, "held": held, "fingerprint": fingerprint, **keys}
        return {"worker": worker, "session": self.sessions.get(worker, ""), "attempt": 1, **keys}

    def beat(self, worker: str = "w", **keys: Any) -> dict[str, Any]:
        """Send a heartbeat that does not wait."""
        return self.ask("heartbeat", **self.beat_keys(worker, **keys))

    def gradient(
        self,
        number: int,
        worker: str = "w",
        *,
        value: float = 1.0,
        layout: Layout = LAYOUT,
        parts: Sequence[bytes] | None = None,
        user: str | None = None,
        **keys: Any,
    ) -> wire.Gradient:
        if parts is None:
            arenas = [np.full(arena.size, value, arena.dtype) for arena in layout.arenas if arena.trainable]
            parts = [bytes(part) for part in encode(layout, arenas)]
        header = {"v": 1, "kind": "gradient", "worker": worker, "session": self.sessions.get(worker, ""), "attempt": 1}
        header |= {"number": number, "fingerprint": layout.fingerprint, **keys}
        frame = wire.pack(header)
        gradient = gradient_messages.parse_gradient(wire.unpack(frame), parts, sum(len(part) for part in parts), user)
        gradient.frame = frame
        return gradient

    def push(self, *numbers: int, worker: str = "w", **keys: Any) -> None:
        for number in numbers:
            self.handle(self.gradient(number, worker, **keys))

    def work(self, times: int = 1) -> None:
        for _ in range(times):
            self.handle(WorkDue())

    def wait(self, seconds: float, busy_s: float = 0.0) -> None:
        """Let time pass; at its end the sockets are drained."""
        self.now += seconds
        self.handle(SocketsDrained(busy_s))

    def member(self, worker: str = "w") -> Member:
        member = self.state.members.get(worker)
        assert member is not None
        return member

    @property
    def total(self) -> float:
        """Sum of the first arena."""
        assert self.holder.storage is not None
        return float(self.holder.storage.arenas[0].sum())
