"""Runs under a bound in which everything may happen in any order: it is kept, and nobody waits for ever."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from distgrad.policies import Bounded
from support.policy_world import Accounts

workers = st.sampled_from("abcd")


class Run(RuleBasedStateMachine):
    """Workers that pull before each gradient, and come and go; their clocks are kept here once more."""

    @initialize(bound=st.integers(1, 4))
    def begin(self, bound: int) -> None:
        self.bound = bound
        self.world = Accounts(Bounded(bound))
        self.clocks: dict[str, int] = {}

    @rule(worker=workers)
    def join(self, worker: str) -> None:
        self.clocks.pop(worker, None)
        self.clocks[worker] = min(self.clocks.values(), default=0)
        self.world.join(worker)

    @rule(worker=workers, left=st.booleans())
    def depart(self, worker: str, left: bool) -> None:
        self.clocks.pop(worker, None)
        self.world.depart(worker, left=left)

    @rule(worker=workers, times=st.integers(1, 9))
    def work(self, worker: str, times: int) -> None:
        for _ in range(times):
            if worker in self.clocks and self.world.pull_and_push(worker):
                self.clocks[worker] += 1

    @rule(worker=workers, times=st.integers(1, 9))
    def have_gradients_cleared(self, worker: str, times: int) -> None:
        """Use up numbers that are never offered."""
        self.world.numbers[worker] = self.world.numbers.get(worker, 0) + times

    @rule(worker=workers)
    def send_what_was_under_way(self, worker: str) -> None:
        """Push without being live."""
        if worker not in self.clocks:
            self.world.push_pulled(worker)

    @rule()
    def everybody_goes_on(self) -> None:
        done = set()
        for worker in list(self.clocks) * 2:
            if self.world.pull_and_push(worker):
                self.clocks[worker] += 1
                done.add(worker)

        assert done == self.clocks.keys(), "nobody waits for longer than a round of the others"

    @invariant()
    def nobody_is_more_than_bound_ahead(self) -> None:
        assert max(self.clocks.values(), default=0) - min(self.clocks.values(), default=0) <= self.bound

    @invariant()
    def exactly_those_wait_who_are_bound_ahead(self) -> None:
        slowest = min(self.clocks.values(), default=0)
        waiting = {worker for worker, clock in self.clocks.items() if clock - slowest >= self.bound}

        assert {worker for worker in self.clocks if not self.world.may(worker)} == waiting
        assert self.world.waits_for() == sorted(w for w, clock in self.clocks.items() if waiting and clock == slowest)


TestRun = Run.TestCase
TestRun.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
