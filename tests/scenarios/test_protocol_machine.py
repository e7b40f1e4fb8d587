"""The real core and real sessions under any interleaving of faults (PROTOCOL 1-10, 13, 15, 16, 20)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from distgrad.wire import pack
from support.simulated import Network, Pipe, SimulatedWorker
from support.simulated_broker import LARGE, SMALL

INDEX = st.integers(0, 7)
FEW = st.integers(0, 3)


class Protocol(RuleBasedStateMachine):
    """Everything that can happen, in any order; `teardown` ends the faults and asks for the sum."""

    network: Network

    @initialize(
        queue_bytes=st.sampled_from([2_000, 2_500, 4_100, 6_500, 20_000, 1_000_000]),
        max_staleness=st.sampled_from([None, None, 1]),
        n_workers=st.integers(1, 4),
        window_bytes=st.sampled_from([None, 1, 5_000]),
        heals=st.integers(0, 3),
    )
    def begin(
        self, queue_bytes: int, max_staleness: int | None, n_workers: int, window_bytes: int | None, heals: int
    ) -> None:
        self.network = Network(queue_bytes, max_staleness)
        self.network.set_parameters(SMALL)
        for index in range(n_workers):
            self.network.join(f"w{index}", generated=index == 3, window_bytes=window_bytes)
        for _ in range(heals):
            self.network.heal()

    def alive(self, index: int) -> SimulatedWorker:
        alive = self.network.alive
        return alive[index % len(alive)]

    def pipe(self, index: int) -> Pipe:
        full = [pipe for pipe in self.network.pipes if pipe.messages]
        return full[index % len(full)]

    def can_push(self) -> bool:
        return bool(self.network.alive)

    def has_mail(self) -> bool:
        return any(pipe.messages for pipe in self.network.pipes)

    # Workers

    @precondition(can_push)
    @rule(index=INDEX, value=st.integers(1, 50), count=st.integers(1, 4))
    def push(self, index: int, value: int, count: int) -> None:
        for _ in range(count):
            self.alive(index).push(value)

    @precondition(can_push)
    @rule(index=INDEX)
    def give_up_a_push(self, index: int) -> None:
        self.alive(index).give_up()

    @precondition(can_push)
    @rule(index=INDEX, again=st.booleans())
    def ask(self, index: int, again: bool) -> None:
        self.alive(index).ask(again=again)

    @precondition(can_push)
    @rule(index=INDEX)
    def notice_a_lost_connection(self, index: int) -> None:
        worker = self.alive(index)
        worker.session.connection_lost()
        worker.losses += 1

    @precondition(lambda self: len(self.network.workers) < 9)
    @rule(index=st.integers(0, 4), dies=st.booleans())
    def another_process_comes(self, index: int, dies: bool) -> None:
        """Under an id that may be in use: what came before may have died, or be frozen and come back."""
        for former in self.network.alive:
            if former.session.worker_id == f"w{index}" and dies:
                former.is_gone = True
        self.network.join(f"w{index}")

    @precondition(can_push)
    @rule(index=INDEX)
    def leave(self, index: int) -> None:
        worker = self.alive(index)
        if not len(worker.session.window) and worker.session.state is not None:
            worker.leave()

    # The network

    @precondition(lambda self: self.network.requests)
    @rule(index=FEW, keep=st.booleans())
    def a_request_arrives(self, index: int, keep: bool) -> None:
        self.network.deliver_request(index % len(self.network.requests), keep=keep)

    @precondition(lambda self: self.network.requests)
    @rule(index=FEW)
    def a_request_is_lost(self, index: int) -> None:
        del self.network.requests[index % len(self.network.requests)]

    @precondition(lambda self: self.network.replies)
    @rule(index=FEW)
    def a_reply_arrives(self, index: int) -> None:
        self.network.deliver_reply(index % len(self.network.replies))

    @precondition(lambda self: self.network.replies)
    @rule(index=FEW)
    def a_reply_is_lost(self, index: int) -> None:
        del self.network.replies[index % len(self.network.replies)]

    @precondition(has_mail)
    @rule(index=FEW, count=st.integers(1, 4))
    def gradients_arrive(self, index: int, count: int) -> None:
        pipe = self.pipe(index)
        for _ in range(min(count, len(pipe.messages))):
            self.network.deliver_gradient(pipe)

    @precondition(has_mail)
    @rule(index=FEW, start=FEW, count=st.integers(1, 9), is_seen=st.booleans())
    def a_connection_is_cut(self, index: int, start: int, count: int, is_seen: bool) -> None:
        pipe = self.pipe(index)
        if pipe.cut(start, count) and is_seen and pipe.owner.pipe is pipe and pipe.owner.is_alive:
            pipe.owner.session.connection_lost()

    @rule()
    def everything_arrives(self) -> None:
        self.network.heal()

    @rule(
        frames=st.lists(st.binary(max_size=40), min_size=1, max_size=3),
        header=st.dictionaries(
            st.sampled_from(["v", "kind", "worker", "session", "attempt", "number", "fingerprint", "cursor", "base"]),
            st.sampled_from([1, 0, -1, 2**63, "gradient", "w0", "inc0:1", "", None, b"", [], SMALL.fingerprint]),
        ),
    )
    def garbage_arrives(self, frames: list[bytes], header: dict[str, Any]) -> None:
        self.network.give_gradient(frames)
        self.network.give_gradient([pack({"v": 1, "kind": "gradient", **header}), *frames])

    # The broker

    @rule(count=st.integers(1, 5))
    def work(self, count: int) -> None:
        for _ in range(count):
            self.network.work()

    @rule(busy_s=st.sampled_from([0.0, 0.0, 20.0]), seconds=st.sampled_from([0.01, 0.06, 0.3, 2.5, 31.0]))
    def time_passes(self, busy_s: float, seconds: float) -> None:
        self.network.now += seconds
        self.network.drain_sockets(min(busy_s, seconds))

    @rule(op=st.sampled_from(["start", "stop", "clear", "start"]))
    def command(self, op: str) -> None:
        assert self.network.command(op)["ok"]

    @rule(layout=st.sampled_from([SMALL, SMALL, LARGE, None]))
    def set_parameters(self, layout: Any) -> None:
        self.network.set_parameters(layout)

    @precondition(lambda self: len(self.network.former) < 3)
    @rule(layout=st.sampled_from([SMALL, LARGE, None]))
    def the_broker_is_restarted(self, layout: Any) -> None:
        self.network.restart()
        if layout is not None:
            self.network.set_parameters(layout)

    # What must hold

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "network"):
            self.network.check()

    def teardown(self) -> None:
        if hasattr(self, "network"):
            self.network.finish()


QUICK = settings(
    max_examples=400, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
THOROUGH = settings(QUICK, max_examples=5_000, stateful_step_count=60, derandomize=False)


def test_each_gradient_counts_once_whatever_happens() -> None:
    run_state_machine_as_test(Protocol, settings=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_each_gradient_counts_once_whatever_happens_at_length() -> None:
    run_state_machine_as_test(Protocol, settings=THOROUGH)
