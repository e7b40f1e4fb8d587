"""The program that a worker's process runs: it goes on where its data was left, pulls, computes, pushes, flushes.

Batches are numbered from 0, and every push takes the next one, whatever becomes of it. The cursor behind a push names
the batch after it: so a number and its batch always differ by one, over all processes that ran under an id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distgrad import wire
from distgrad.codec import encode
from distgrad.errors import LayoutError
from distgrad.layout import Layout
from distgrad.wire import State
from distgrad_worker import asking
from distgrad_worker.headers import Header, checked_details
from distgrad_worker.session import OPEN
from simulation.reference import Array, Push
from simulation.told import batch_of

if TYPE_CHECKING:
    from simulation.worker_process import WorkerProcess

PULL_WAIT_S = 0.5
RETRY_S = 0.5
LOOK_S = 0.05
GOODBYE_S = 1.0

_ONES = {char: np.ones(8, char) for char in "fd"}

STARTING, PULLING, COMPUTING, PUSHING, FLUSHING, LEAVING = range(6)


class Training:
    """What one process does with its worker.

    Attributes
    ----------
    doing : int
        One of the constants above.
    pushed : list of Push
        In order.
    must_leave : bool
        Whether it is to flush, say goodbye, and end.
    """

    def __init__(self, process: WorkerProcess, index: int, quota: int) -> None:
        self.process = process
        self.doing = STARTING
        self.pushed: list[Push] = []
        self.must_leave = False
        self.quota = quota
        self._index = index
        self._is_fixed = process.world.plan.is_fixed
        self._batch = 0
        self._base: State | None = None
        self._header: Header | None = None
        self._details: Any = None
        self._next: tuple[Layout, list[Array], Any] | None = None
        self._asked = 0
        # The session in which it pulls.
        self._asked_in: str | None = None
        self._retry_at = 0.0
        # Of which broker heartbeats told when the base was pulled: pulls may be ahead of them.
        self._known_then = ""
        self._ready_at = 0.0
        self._flush_to = 0
        self._leave_by: float | None = None

    def go_on(self) -> float | None:
        """Do what can be done now; give the seconds until there is more, or None if only news bring it."""
        process = self.process
        session, now = process.session, process.now
        while True:
            if self.doing == STARTING:
                if session.phase != OPEN:
                    return None
                self._batch = batch_of(session.cursor)
                self._begin_next()
            elif self.doing == PULLING:
                if self._asked and now < self._retry_at:
                    return self._retry_at - now
                self._pull(now)
                return RETRY_S + PULL_WAIT_S
            elif self.doing == COMPUTING:
                if now < self._ready_at:
                    return self._ready_at - now
                self.doing = PUSHING
            elif self.doing == PUSHING:
                rest_s = self._push()
                if self.doing == PUSHING:
                    return rest_s
            elif self.doing == FLUSHING:
                if session.window.settled < self._flush_to:
                    return None
                session.awaited.remove(self._flush_to)
                self._flush_to = 0
                if self.must_leave or self._is_enough():
                    self.doing = LEAVING
                else:
                    self._begin_next()
            else:
                return self._say_goodbye(now)

    def receive_pull(self, frames: Sequence[bytes]) -> None:
        """Take in the reply to a pull."""
        header = wire.unpack(frames[0])
        if self.doing != PULLING or header.get("id") != self._asked or not self.process.is_alive:
            return
        self._asked = 0
        if header.get("settled") is not None:
            session = self.process.session
            session.on_pulled(self._asked_in, header["settled"], header["superseded"], self.process.now)
        if header["ok"] and not header["unchanged"]:
            self._base = State(header["incarnation"], header["generation"], header["version"])
            self._known_then = "" if self.process.session.state is None else self.process.session.state.incarnation
            self._compute()
        elif not header["ok"]:
            self._asked, self._retry_at = -1, self.process.now + LOOK_S
        self.process.turn()

    def receive_goodbye(self, frames: Sequence[bytes]) -> None:
        """Take in the reply to a goodbye, whatever it says, and end."""
        if self.process.is_alive:
            self.process.end_well(is_complete=self._is_enough())

    def _is_enough(self) -> bool:
        if self._is_fixed:
            world, base, now = self.process.world, self._base, self.process.session.state
            # What a former broker showed may have been taken back, and others would wait for whom that made leave.
            target = world.target
            if base is None or now is None or base.version < target:
                return False
            return now.incarnation in (base.incarnation, self._known_then) or now.version >= target
        return self._batch >= self.quota

    def _begin_next(self) -> None:
        """Go on with another batch, or end."""
        process = self.process
        world = process.world
        if self.must_leave or self._is_enough():
            self._flush()
        elif self._base is None or world.random.random() < world.plan.pull_chance:
            self.doing, self._asked = PULLING, 0
        elif world.random.random() < 0.01:
            self._flush()
        else:
            self._compute()

    def _flush(self) -> None:
        session = self.process.session
        self.doing, self._flush_to = FLUSHING, session.window.last
        session.awaited.append(self._flush_to)

    def _compute(self) -> None:
        if self.must_leave or self._is_enough():
            self._flush()
            return
        world = self.process.world
        self.doing = COMPUTING
        if world.random.random() * world.plan.burst < 1.0:
            self._ready_at = self.process.now + world.plan.compute_s * (0.5 + world.random.random())

    def _push(self) -> float | None:
        """Give the next batch's gradient its number, if there is room for it."""
        process = self.process
        session, world = process.session, process.world
        layout = session.layout
        if layout is None:
            return LOOK_S
        if self._next is None or self._next[0].fingerprint != layout.fingerprint:
            self._next = self._make(layout)
        layout, vectors, cursor = self._next
        try:
            if not session.can_push(layout.gradient_bytes, layout.fingerprint):
                return None
        except LayoutError:  # the parameters were replaced just now
            self._next = None
            return LOOK_S
        header = self._header
        if header is None or header.base is not self._base or header.fingerprint != layout.fingerprint:
            header = self._header = Header(session.worker_id, layout.fingerprint, self._base)
        push = Push(session.worker_id, process.uid, self._batch, cursor, layout, vectors)
        parts = encode(layout, vectors)
        # Now and then it asks for the next pull as well; who has no reply after a while pulls by itself.
        asks = process.next_id() if self._asked_in == session.name and self._batch % 32 == 5 else None
        details = checked_details(None, 1, cursor)
        push.number = session.push(header, details, parts, layout.gradient_bytes, None, asks)
        world.was_pushed(push)
        self.pushed.append(push)
        self._next = None
        self._batch += 1
        session.stop_wanting()
        if asks is None or self.must_leave or self._is_enough():
            self._begin_next()
        else:
            self.doing, self._asked = PULLING, asks
            self._retry_at = process.now + RETRY_S + PULL_WAIT_S
        return None

    def _make(self, layout: Layout) -> tuple[Layout, list[Array], Any]:
        """Compute a gradient that tells its worker and its batch apart from all others in any sum."""
        plan = self.process.world.plan
        vectors = []
        for arena in layout.arenas[: layout.n_trainable_arenas]:
            vector = _ONES[arena.dtype.char][: arena.size].copy()
            vector[self._index % arena.size] = self._batch + 2
            vectors.append(vector)
        if plan.bad_chance and self.process.world.random.random() < plan.bad_chance:
            vectors[0][0] = np.nan
        cursor = f"{self._batch + 1}.{self.process.uid}.{len(self.pushed)}"
        return layout, vectors, cursor.encode() if plan.is_bytes else cursor

    def _pull(self, now: float) -> None:
        process = self.process
        session = process.session
        self._asked, self._asked_in = process.next_id(), session.name
        self._retry_at = now + RETRY_S + PULL_WAIT_S
        header = {"v": wire.PROTOCOL_VERSION, "op": "get", "client": b"puller%06d" % process.uid, "id": self._asked}
        header |= {"wait_s": PULL_WAIT_S, "worker": session.worker_id, "pushed": session.window.last}
        header["session"] = session.name
        header["have"] = None if session.layout is None else session.layout.fingerprint
        process.world.network.send_request(process.link, (b"%d" % process.uid, b"pull", b""), [wire.pack(header)])

    def _say_goodbye(self, now: float) -> float:
        """Tell the broker, for a second at most; then end."""
        process = self.process
        if self._leave_by is None:
            self._leave_by, self._retry_at = now + GOODBYE_S, now
        if now >= self._leave_by:
            process.end_well(is_complete=self._is_enough())
        elif now >= self._retry_at:
            self._retry_at = now + RETRY_S
            header = {**asking.leave(process.session), "client": b"goodbye%06d" % process.uid, "id": 1}
            process.world.network.send_request(process.link, (b"%d" % process.uid, b"leave", b""), [wire.pack(header)])
        return self._retry_at - now
