"""The real core of one broker, and a second set of books beside its own."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from distgrad import policies, wire
from distgrad.durable.books import LIVE
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad_broker.core import Core
from distgrad_broker.core_settings import CoreSettings
from distgrad_broker.events import Event, Reply, RequestReceived, WorkDue
from distgrad_broker.members import Member
from distgrad_broker.versions import Versions

# Two layouts whose gradients are charged 1,200 and 2,000 bytes: more than the least charge, and different.
SMALL = Layout.of({"a": np.zeros(200, np.float32), "steps": np.zeros(2, np.int64), "z": np.zeros((2, 50), np.float32)})
LARGE = Layout.of([np.zeros(300, np.float32), np.zeros(100, np.float64)])


class Settled(NamedTuple):
    """What became of one gradient, as seen from outside the core."""

    incarnation: str
    cursor: str
    number: int
    outcome: str


class SimulatedBroker:
    """One incarnation: a core, and a second set of books."""

    def __init__(self, incarnation: str, queue_bytes: int, *, max_staleness: int | None = None) -> None:
        settings = CoreSettings(incarnation=incarnation, gradients="tcp://127.0.0.1:5555", queue_bytes=queue_bytes)
        self.versions = Versions(ParameterHolder(executor="numpy"))
        self.core = Core(
            settings,
            self.versions,
            policies.build("async", {} if max_staleness is None else {"max_staleness": max_staleness}),
        )
        self.state = self.core.state
        self.settled: list[Settled] = []
        self.lapsed: set[Member] = set()
        self._last: dict[Member, int] = {}
        self.expected: list[np.ndarray[Any, Any]] = []

    def handle(self, event: Event | wire.Gradient, now: float, ledger: Ledger) -> list[Reply]:
        """Give the core an event, write down what it settled, and return its replies."""
        state = self.state
        before, outcomes, at = list(state.queue), Counter(state.outcomes), self.versions.version
        effects = self.core.handle(event, now)
        after = {id(gradient) for gradient in state.queue}
        for gradient in before:
            if id(gradient) in after:
                continue
            outcome = "cleared"
            if isinstance(event, WorkDue):
                (outcome,) = (state.outcomes - outcomes).elements()
            self._write_down(gradient, outcome, ledger)
        assert self.versions.version - at == (state.outcomes - outcomes)["applied"]
        if isinstance(event, RequestReceived) and event.header["op"] == "hello":
            member = state.members.get(event.header["worker"])
            if member is not None and member.adopted:
                self._last.pop(member, None)
        self.lapsed.update(member for member in state.members if member.state != LIVE)
        return [effect for effect in effects if isinstance(effect, Reply)]

    def _write_down(self, gradient: wire.Gradient, outcome: str, ledger: Ledger) -> None:
        cursor = str(gradient.cursor)
        self.settled.append(Settled(self.state.incarnation, cursor, gradient.number, outcome))
        member = self.state.members.get(gradient.worker)
        assert member is not None
        assert gradient.number == self._last.get(member, gradient.number - 1) + 1, "once, and in its worker's order"
        self._last[member] = gradient.number
        number, layout, arenas = ledger[cursor]
        assert number == gradient.number
        if outcome == "applied":
            assert self.versions.layout == layout
            for kept, step in zip(self.expected, arenas, strict=False):
                kept -= step

    def check(self) -> None:
        """Compare the core's books with each other and with the budget."""
        state = self.state
        budget = state.grants.budget_bytes
        members = list(state.members)
        assert sum(member.committed for member in members) <= budget
        assert state.queued_bytes == sum(gradient.charge for gradient in state.queue) <= budget
        for member in members:
            mine = [gradient for gradient in state.queue if gradient.worker == member.worker]
            assert member.queued_bytes == sum(gradient.charge for gradient in mine) <= member.committed
            assert member.promised <= member.committed
            assert [gradient.number for gradient in mine] == list(range(member.settled + 1, member.accepted + 1))
        if self.versions.layout is not None:
            assert self.versions.holder.storage is not None
            for expected, arena in zip(self.expected, self.versions.holder.storage.arenas, strict=True):
                np.testing.assert_array_equal(expected, arena)


# By cursor, which names the process and the gradient: the number, layout and arenas that were pushed.
Ledger = dict[str, tuple[int, Layout, list[np.ndarray[Any, Any]]]]
