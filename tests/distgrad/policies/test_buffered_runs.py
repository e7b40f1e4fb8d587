"""Buffers to which everything may happen in any order: full ones are given out, awaited ones after the grace."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distgrad.policies import Buffered
from support.policy_world import Accounts


class Run(RuleBasedStateMachine):
    """Pushes, waits, withdrawals, clearing and time."""

    @initialize(buffer_size=st.integers(1, 5), grace=st.sampled_from([1.0, 2.0]))
    def begin(self, buffer_size: int, grace: float) -> None:
        self.buffer_size, self.grace = buffer_size, grace
        self.world = Accounts(Buffered(buffer_size, grace))
        self.since: float | None = None  # when a worker began to wait for what is held

    @rule(worker=st.sampled_from("abc"))
    def push(self, worker: str) -> None:
        before = len(self.world.held)
        self.world.push_pulled(worker)
        assert len(self.world.held) == (before + 1) % self.buffer_size
        self.look()

    @rule(worker=st.sampled_from("abc"))
    def await_it(self, worker: str) -> None:
        if self.since is None and any(gradient.worker == worker for gradient in self.world.held):
            self.since = self.world.now
        self.world.policy.awaited(worker, self.world.situation)

    @precondition(lambda self: self.world.held)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        self.world.withdraw(data.draw(st.sampled_from(self.world.held)))
        self.look()

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        before = len(self.world.held)
        self.world.wait(seconds)
        is_due = self.since is not None and self.world.now >= self.since + self.grace
        assert len(self.world.held) == (0 if is_due else before)
        self.look()

    @rule(anew=st.booleans())
    def clear(self, anew: bool) -> None:
        self.since = None
        (self.world.replace if anew else self.world.clear)()

    def look(self) -> None:
        if not self.world.held:
            self.since = None

    @invariant()
    def every_gradient_is_settled_once_or_held(self) -> None:
        self.world.check()

    @invariant()
    def steps_are_in_the_order_of_workers_and_numbers(self) -> None:
        for step in self.world.given_out:
            places = [(gradient.worker, gradient.number) for gradient in step]
            assert places == sorted(places)
            assert len(step) <= self.buffer_size

    @invariant()
    def only_a_wait_sets_a_deadline(self) -> None:
        assert self.world.policy.next_deadline() == (None if self.since is None else self.since + self.grace)


TestRun = Run.TestCase
TestRun.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
