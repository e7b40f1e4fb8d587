"""Synchronous runs in which everything may happen in any order: no gradient counts twice, and nothing hangs."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distgrad.policies import Action, Decision, Offered, Situation, Synchronous
from support.policy_world import Accounts

IDS = ["a", "b", "c", "d", "e"]
ids = st.sampled_from(IDS)


class Watched(Synchronous):
    """Keeps an account of its own of who has to be waited for, and compares when a step is given out."""

    def __init__(self, quorum: int | None, grace: float | None, workers: int | None) -> None:
        super().__init__(quorum, grace, workers)
        self.quorum, self.grace, self.workers = quorum, grace, workers
        # Elastic: live when the step was opened, and ever since; None before it is. Fixed: the members.
        self.expected: set[str] | None = None if workers is None else set()
        self.in_it: set[str] = set()  # who has a gradient in the open step
        self.spent: set[str] = set()  # who had one that was bad
        self.quorum_since: float | None = None

    @property
    def is_all_in(self) -> bool:
        expected = self.expected or set()
        return expected <= self.in_it | self.spent and (self.workers is None or len(expected) == self.workers)

    def offer(self, gradient: Offered, staleness: int | None, situation: Situation) -> Decision:
        decision = super().offer(gradient, staleness, situation)
        if decision.action is Action.HOLD:
            assert staleness == 0
            assert gradient.worker not in self.in_it
            if self.expected is None:
                self.expected = set(situation.live)
            if self.workers is not None:
                self.expected.add(gradient.worker)
                assert len(self.expected) <= self.workers
            self.in_it.add(gradient.worker)
            self.spent.discard(gradient.worker)
            if len(self.in_it) == self.quorum:
                self.quorum_since = situation.now
        return decision

    def withdrawn(self, gradient: Offered) -> None:
        self.in_it.remove(gradient.worker)
        self.spent.add(gradient.worker)
        if self.quorum is not None and len(self.in_it) < self.quorum:
            self.quorum_since = None
        self.open_if_void()
        super().withdrawn(gradient)

    def departed(self, worker: str, *, left: bool) -> None:
        if self.expected is not None and (left or self.workers is None):
            self.expected.discard(worker)
            self.spent.discard(worker)
            self.open_if_void()
        super().departed(worker, left=left)

    def reset(self) -> None:
        super().reset()
        self.open(None)

    def complete(self, situation: Situation) -> list[Offered] | None:
        was_in, was_all_in, since = sorted(self.in_it), self.is_all_in, self.quorum_since
        step = super().complete(situation)
        is_enough = since is not None and situation.now >= since + (self.grace or 0.0)
        assert (step is not None) == bool(was_in and (was_all_in or is_enough)), "it is given out in time, not before"
        if step is not None:
            assert [gradient.worker for gradient in step] == was_in, "one of each, in a fixed order"
            assert all(g.base is not None and g.base.version == situation.version for g in step)
            self.open(set(situation.live) or None)
        return step

    def open_if_void(self) -> None:
        if not self.in_it and self.is_all_in:
            self.open(None)

    def open(self, expected: set[str] | None) -> None:
        if self.workers is None:
            self.expected = expected
        self.in_it, self.spent, self.quorum_since = set(), set(), None


class Run(RuleBasedStateMachine):
    """Whatever may happen to a policy."""

    @initialize(
        workers=st.none() | st.integers(1, 4),
        quorum=st.none() | st.integers(1, 4),
        grace=st.none() | st.sampled_from([1.0, 2.0]),
        early=st.lists(ids, unique=True),
    )
    def begin(self, workers: int | None, quorum: int | None, grace: float | None, early: list[str]) -> None:
        if workers is not None and quorum is not None:
            quorum = min(quorum, workers)
        self.policy = Watched(quorum, None if quorum is None else grace, workers)
        self.policy.check(len(IDS))
        self.world = Accounts(self.policy, *early)

    @rule(worker=ids)
    def join(self, worker: str) -> None:
        if worker not in self.world.live:
            self.world.join(worker)

    @rule(worker=ids)
    def lapse(self, worker: str) -> None:
        if worker in self.world.live:
            self.world.depart(worker)

    @rule(worker=ids)
    def leave(self, worker: str) -> None:
        if worker in self.world.live and worker not in self.policy.in_it:  # it flushes before
            self.world.depart(worker, left=True)

    @rule()
    def all_lapse(self) -> None:
        for worker in IDS:
            self.lapse(worker)

    @rule()
    def all_join(self) -> None:
        for worker in IDS:
            self.join(worker)

    @rule(worker=ids)
    def pull(self, worker: str) -> None:
        assert self.world.pull(worker) == (worker not in self.policy.in_it)

    @rule(worker=ids)
    def push(self, worker: str) -> None:
        """Push what was computed on the last pull, however old, from the dead as well."""
        base, present = self.world.pulled.get(worker), (self.world.generation, self.world.version)
        decision = self.world.push_pulled(worker)

        if decision.action is Action.HOLD:
            assert base == present
        elif decision.action is Action.SUPERSEDE:
            assert base is not None
            assert base != present
        else:
            assert decision.reason in ("no_base", "second", "not_a_member")
            assert decision.message

    @rule(order=st.permutations(IDS), n=st.integers(1, 3), is_bad=st.booleans())
    def some_work(self, order: list[str], n: int, is_bad: bool) -> None:
        for worker in [worker for worker in order if worker in self.world.live][:n]:
            if self.world.pull(worker):
                self.world.push_pulled(worker, is_bad=is_bad)

    @precondition(lambda self: self.world.held)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        self.world.withdraw(data.draw(st.sampled_from(self.world.held)))

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(anew=st.booleans())
    def clear(self, anew: bool) -> None:
        (self.world.replace if anew else self.world.clear)()

    @rule(order=st.permutations(IDS))
    def everybody_works(self, order: list[str]) -> None:
        """Two rounds of all live workers' loops, and what grace there is, bring the run on."""
        world, policy = self.world, self.policy
        live = [worker for worker in order if worker in world.live]
        before = len(world.steps)
        for worker in live * 2:
            world.pull_and_push(worker)
        if policy.grace is not None:
            world.wait(policy.grace)
        done = world.steps[before:]
        if policy.workers is None:
            assert done or not live
            assert policy.quorum is not None or {worker for step in done for worker in step} >= set(live)
        elif len((policy.expected or set()) & set(live)) == policy.workers:
            assert done, "all members are there"
        else:
            assert done or world.waits_for(), "it says for whom it waits"

    @invariant()
    def every_gradient_is_settled_once_or_held(self) -> None:
        self.world.check()

    @invariant()
    def nothing_is_held_without_somebody_to_wait_for(self) -> None:
        deadline = self.policy.next_deadline()
        if self.world.held:
            assert self.world.waits_for(), "it would wait for ever"
            assert self.policy.quorum_since is None or deadline is not None
        assert deadline is None or (self.world.held and deadline > self.world.now), "who waits for it would spin"

    @invariant()
    def an_elastic_step_waits_for_those_who_were_there_and_are_still(self) -> None:
        policy = self.policy
        if policy.workers is None and self.world.held:
            assert policy.expected is not None
            assert set(self.world.waits_for()) == policy.expected - policy.spent - policy.in_it
            assert policy.expected <= self.world.live


TestRun = Run.TestCase
TestRun.settings = settings(deadline=None, max_examples=150, stateful_step_count=30)
