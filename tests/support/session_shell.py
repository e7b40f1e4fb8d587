"""A session whose broker is the test."""

from __future__ import annotations

from typing import Any

import numpy as np

from distgrad.layout import Layout
from distgrad_worker.headers import Header
from distgrad_worker.session import Session

LAYOUT = Layout.of(np.zeros(4, np.float32))
OTHER = Layout.of(np.zeros(400, np.float32))
ONE = 1024


class Shell:
    """A session whose broker is the test."""

    def __init__(self, *, greeted: bool = True, **hello: Any) -> None:
        self.session = Session("w", b"n" * 16, generated=False, window_bytes=None)
        self.now = 10.0
        if greeted:
            self.hello(**hello)
            self.session.reopened()

    def hello(self, *, layout: Layout | None = LAYOUT, **keys: Any) -> None:
        header: dict[str, Any] = {"session": "one:1", "accepted": 0, "settled": 0, "queued": 0, "adopted": False}
        header |= {"cursor": None}
        self.queued = keys.get("queued", 0)
        header |= {"gradients": "tcp://127.0.0.1:5555", "lease_s": 30.0, "queue_bytes": 8 * ONE, "grant": 4 * ONE}
        header |= {"grant_seq": 1, "incarnation": "one", "generation": 0, "version": 0, "running": True, **keys}
        self.session.on_hello(header, None if layout is None else layout.to_frame(), self.now)

    def beat(self, **keys: Any) -> None:
        session = self.session
        header: dict[str, Any] = {"accepted": 0, "settled": 0, "attempt": session.attempt, "resend": False}
        header |= {"queued": self.queued}
        header |= {"grant": 4 * ONE, "grant_seq": 1, "refused": [], "incarnation": "one", "generation": 0, "version": 0}
        header |= {"running": True, "fingerprint": session.layout.fingerprint if session.layout else None, **keys}
        session.on_heartbeat(header, self.now)

    def push(self, count: int = 1, layout: Layout = LAYOUT) -> None:
        for _ in range(count):
            size = layout.gradient_bytes
            assert self.session.can_push(size, layout.fingerprint)
            self.session.push(Header("w", layout.fingerprint, None), {}, [bytes(size)], size)

    def send(self) -> list[int]:
        return [entry.number for entry in self.session.sendable(self.now)]
