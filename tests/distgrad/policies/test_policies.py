"""Each policy by itself: what becomes of gradients as workers come, push, and go."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.errors import ConfigError
from distgrad.policies import (
    APPLY,
    HOLD,
    SUPERSEDE,
    Action,
    Asynchronous,
    Bounded,
    Buffered,
    Chain,
    Held,
    Policy,
    Situation,
    Staleness,
    Synchronous,
    Weighing,
    build,
    names,
)


class Version(NamedTuple):
    version: int


class Gradient(NamedTuple):
    worker: str
    number: int = 1
    examples: int = 1
    base: Version | None = Version(0)


class World:
    """Workers that push one after the other, and the steps that come of it."""

    def __init__(self, policy: Policy, *workers: str) -> None:
        self.policy = policy
        self.live: set[str] = set()
        self.version = 0
        self.now = 0.0
        self.numbers: dict[str, int] = {}
        self.steps: list[list[str]] = []
        for worker in workers:
            self.join(worker)

    @property
    def situation(self) -> Situation:
        return Situation(self.version, frozenset(self.live), self.now)

    def join(self, worker: str) -> None:
        self.live.add(worker)
        self.policy.joined(worker, self.situation)

    def depart(self, worker: str, *, left: bool = False) -> None:
        self.live.discard(worker)
        self.policy.departed(worker, left=left)
        self.advance()

    def push(self, worker: str, base: int | None = None) -> Action:
        gradient = self.next(worker, base)
        staleness = self.version - (self.version if base is None else base)
        action = self.policy.offer(gradient, staleness, self.situation).action
        if action is Action.APPLY:
            self.version += 1
        self.advance()
        return action

    def next(self, worker: str, base: int | None = None) -> Gradient:
        self.numbers[worker] = number = self.numbers.get(worker, 0) + 1
        return Gradient(worker, number, base=Version(self.version if base is None else base))

    def advance(self) -> None:
        while (step := self.policy.complete(self.situation)) is not None:
            self.steps.append([gradient.worker for gradient in step])
            self.version += 1

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.advance()

    def may(self, worker: str) -> bool:
        return self.policy.may_pull(worker, self.situation)

    def waits_for(self) -> Sequence[str]:
        return self.policy.waits_for(self.situation)


# async and staleness


def test_async_has_nothing_to_be_asked() -> None:
    policy = Asynchronous()

    assert (policy.is_immediate, policy.must_hold(7), policy.next_deadline()) == (True, 1, None)


@pytest.mark.parametrize(
    ("policy", "factors"),
    [
        (Staleness(), [1, 1, 1]),
        (Staleness(staleness_scaling="inverse"), [1, 1 / 2, 1 / 4]),
        (Staleness(staleness_scaling="sqrt"), [1, 2**-0.5, 1 / 2]),
        (Staleness(staleness_decay=0.5), [1, 1 / 2, 1 / 8]),
    ],
)
def test_old_gradients_are_scaled_by_their_staleness(policy: Policy, factors: list[float]) -> None:
    decisions = [policy.offer(Gradient("a"), staleness, Situation(9, (), 0.0)) for staleness in (0, 1, 3)]

    assert [decision.factor for decision in decisions] == pytest.approx(factors)


@pytest.mark.parametrize(
    ("limit", "base", "staleness", "action"),
    [
        (2, Version(0), 2, Action.APPLY),
        (2, Version(0), 3, Action.SUPERSEDE),
        (0, Version(0), 0, Action.APPLY),
        (2, Version(0), None, Action.SUPERSEDE),  # computed on parameters that were replaced
        (2, None, None, Action.APPLY),  # its worker does not say on what it was computed
        (None, Version(0), 10**9, Action.APPLY),
    ],
)
def test_what_is_older_than_the_bound_is_superseded(
    limit: int | None, base: Version | None, staleness: int | None, action: Action
) -> None:
    gradient = Gradient("a", base=base)

    assert Staleness(limit).offer(gradient, staleness, Situation(9, (), 0.0)).action is action


# sync


def test_a_step_is_one_gradient_of_each_live_worker_in_the_order_of_their_ids() -> None:
    world = World(Synchronous(), "b", "c", "a")

    actions = [world.push(worker) for worker in ("c", "a", "b")]

    assert actions == [Action.HOLD] * 3
    assert world.steps == [["a", "b", "c"]]


def test_a_gradient_of_a_closed_step_is_superseded() -> None:
    world = World(Synchronous(), "a")
    world.push("a")

    assert world.push("a", base=0) is Action.SUPERSEDE


def test_a_second_gradient_for_a_step_and_one_without_a_base_are_refused() -> None:
    world = World(Synchronous(), "a", "b")
    world.push("a")

    second = world.policy.offer(world.next("a"), 0, world.situation)
    baseless = world.policy.offer(Gradient("b", base=None), None, world.situation)

    assert (second.action, second.reason) == (Action.REFUSE, "second")
    assert "step 0" in second.message
    assert (baseless.action, baseless.reason) == (Action.REFUSE, "no_base")


def test_a_worker_that_took_part_waits_in_its_pull_until_the_step_is_closed() -> None:
    world = World(Synchronous(), "a", "b")
    world.push("a")

    assert (world.may("a"), world.may("b")) == (False, True)
    world.push("b")
    assert world.may("a")


def test_an_elastic_step_does_not_wait_for_who_is_gone_and_keeps_what_it_gave() -> None:
    world = World(Synchronous(), "a", "b", "c")
    world.push("a")
    world.push("b")
    world.depart("b")

    world.depart("c")

    assert world.steps == [["a", "b"]]


def test_a_newcomer_is_waited_for_from_the_next_step_on() -> None:
    world = World(Synchronous(), "a")
    world.push("a")
    world.join("b")

    world.push("a")
    world.push("a")

    assert world.steps == [["a"], ["a"]]
    assert world.waits_for() == ["b"]
    world.push("b")
    assert world.steps[-1] == ["a", "b"]


def test_a_quorum_closes_the_step_and_supersedes_the_rest() -> None:
    world = World(Synchronous(quorum=2), "a", "b", "c")
    world.push("c")
    world.push("a")

    assert world.push("b", base=0) is Action.SUPERSEDE
    assert world.steps == [["a", "c"]]


def test_grace_waits_for_the_others_after_the_quorum_and_no_longer() -> None:
    world = World(Synchronous(quorum=1, grace=5.0), "a", "b", "c")
    world.push("a")
    world.push("b")
    world.wait(4.9)
    assert world.steps == []
    assert world.policy.next_deadline() == 5.0

    world.wait(0.1)

    assert world.steps == [["a", "b"]]
    assert world.policy.next_deadline() is None


def test_a_quorum_larger_than_what_is_live_is_met_by_all() -> None:
    world = World(Synchronous(quorum=3), "a", "b", "c")
    world.depart("c")
    world.push("a")
    world.push("b")

    assert world.steps == [["a", "b"]]


def test_a_fixed_set_waits_for_its_members_and_says_for_whom() -> None:
    world = World(Synchronous(workers=2), "a", "b")
    world.push("a")
    assert world.waits_for() == ["1 more worker(s)"]
    world.push("b")
    world.push("a")

    world.depart("b")

    assert world.steps == [["a", "b"]]
    assert world.waits_for() == ["b"]
    world.join("b")
    world.push("b")
    assert world.steps == [["a", "b"], ["a", "b"]]


def test_a_fixed_set_that_is_full_refuses_others_until_a_member_says_goodbye() -> None:
    world = World(Synchronous(workers=1), "a", "b")
    world.push("a")

    assert world.policy.offer(world.next("b"), 0, world.situation).reason == "not_a_member"
    world.depart("a", left=True)
    assert world.push("b") is Action.HOLD


def test_a_bad_gradient_counts_as_having_taken_part() -> None:
    world = World(Synchronous(), "a", "b")
    bad = world.next("a")
    world.policy.offer(bad, 0, world.situation)
    world.policy.withdrawn(bad)
    world.advance()

    world.push("b")

    assert world.steps == [["b"]]


def test_when_all_gradients_of_a_step_were_bad_they_may_all_try_again() -> None:
    world = World(Synchronous(), "a", "b")
    for worker in ("a", "b"):
        bad = world.next(worker)
        world.policy.offer(bad, 0, world.situation)
        world.policy.withdrawn(bad)
        world.advance()

    world.push("a")
    world.push("b")

    assert world.steps == [["a", "b"]]


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_arrival_does_not_change_a_step(order: list[str]) -> None:
    world = World(Synchronous(workers=4), *order)
    for worker in order:
        world.push(worker)

    assert world.steps == [["a", "b", "c", "d"]]


@given(st.data(), st.sampled_from([(None, None), (1, None), (2, 3.0), (9, None)]))
def test_an_elastic_step_never_hangs_whoever_dies_or_joins(
    data: st.DataObject, setting: tuple[int | None, float | None]
) -> None:
    quorum, grace = setting
    world = World(Synchronous(quorum, grace), "a", "b", "c")
    fresh = (f"n{number}" for number in itertools.count())
    seen: dict[str, int] = {}
    for _ in range(30):
        able = sorted(worker for worker in world.live if world.may(worker))
        deed = data.draw(st.sampled_from(["push", "push", "push", "die", "join", "wait"]))
        if deed == "join":
            world.join(next(fresh))
        elif deed == "die" and world.live:
            world.depart(data.draw(st.sampled_from(sorted(world.live))))
        elif deed == "wait":
            world.wait(data.draw(st.floats(0, 4)))
        elif able:
            world.push(data.draw(st.sampled_from(able)), base=data.draw(st.integers(0, world.version)))
    for worker in sorted(world.live):
        seen[worker] = world.version
    before = world.version
    for _ in range(2):
        for worker in sorted(world.live):
            if world.may(worker):
                world.push(worker)
        world.wait(3.0)

    if world.live:
        assert world.version >= before + 1
        late = {worker for step in world.steps[before:] for worker in step}
        assert quorum is not None or world.live <= late
    assert all(step == sorted(set(step)) for step in world.steps)


# bounded


def test_nobody_gets_further_ahead_than_the_bound() -> None:
    world = World(Bounded(2), "fast", "slow")
    world.push("fast")
    assert world.may("fast")
    world.push("fast")

    assert (world.may("fast"), world.may("slow")) == (False, True)
    assert world.waits_for() == ["slow"]
    world.push("slow")
    assert world.may("fast")


def test_who_joins_or_comes_back_begins_with_the_slowest() -> None:
    world = World(Bounded(1), "a", "b")
    for _ in range(5):
        world.push("a")
        world.push("b")
    world.join("c")
    world.depart("b")
    world.push("a")
    assert not world.may("a")
    world.push("c")
    assert world.may("a")

    world.join("b")

    assert world.may("b")
    world.push("a")
    assert world.may("c")
    assert world.may("b")


def test_a_gradient_that_is_offered_again_does_not_move_its_workers_clock_twice() -> None:
    world = World(Bounded(2), "a", "b")
    gradient = world.next("a")
    for _ in range(3):
        world.policy.offer(gradient, 0, world.situation)

    assert world.may("a")


@given(st.data(), st.integers(1, 3))
def test_a_run_under_a_bound_keeps_it_and_never_stops(data: st.DataObject, bound: int) -> None:
    world = World(Bounded(bound), "a", "b", "c")
    done: dict[str, int] = dict.fromkeys("abc", 0)
    for _ in range(40):
        deed = data.draw(st.sampled_from(["push", "push", "push", "die", "back"]))
        worker = data.draw(st.sampled_from("abc"))
        if deed == "die" and worker in world.live and len(world.live) > 1:
            world.depart(worker)
        elif deed == "back" and worker not in world.live:
            done[worker] = min(done[other] for other in world.live)
            world.join(worker)
        elif worker in world.live and world.may(worker):
            world.push(worker)
            done[worker] += 1
        slowest = min(done[other] for other in world.live)
        assert all(done[other] - slowest <= bound for other in world.live)
        assert any(world.may(other) for other in world.live)


# buffered


def test_every_so_many_gradients_are_a_step_whoever_sent_them() -> None:
    world = World(Buffered(3), "a", "b")
    for worker in ("b", "a", "b", "b"):
        world.push(worker)

    assert world.steps == [["a", "b", "b"]]
    assert world.waits_for() == ["2 more gradient(s)"]


def test_a_partial_buffer_is_applied_when_one_of_its_workers_has_waited_for_the_grace() -> None:
    world = World(Buffered(10, grace=2.0), "a", "b")
    world.push("a")
    world.policy.awaited("b", world.situation)
    world.wait(5.0)
    assert world.steps == []

    world.policy.awaited("a", world.situation)
    world.wait(2.0)

    assert world.steps == [["a"]]
    assert world.policy.next_deadline() is None


# chain, weights, registry


def test_a_chain_multiplies_factors_and_stops_at_the_first_no() -> None:
    bounded = Bounded(1)
    chain = Chain([bounded, Staleness(3, "inverse"), Staleness(staleness_decay=0.5), Buffered(2)])
    chain.joined("a", Situation(9, {"a", "b"}, 0.0))
    chain.joined("b", Situation(9, {"a", "b"}, 0.0))

    assert chain.offer(Gradient("a"), 1, Situation(9, {"a"}, 0.0)) == HOLD._replace(factor=0.25)
    assert chain.offer(Gradient("b"), 4, Situation(9, {"a"}, 0.0)) == SUPERSEDE
    assert chain.complete(Situation(9, {"a"}, 0.0)) is None
    assert (chain.name, chain.gates_pulls, chain.holds, chain.must_hold(5)) == ("buffered", True, True, 2)


def test_only_the_last_link_may_hold() -> None:
    with pytest.raises(ConfigError, match="must be the last"):
        Chain([Buffered(2), Staleness()])


@pytest.mark.parametrize(
    ("weighing", "weights"),
    [
        (Weighing(), [0.25, 0.5]),
        (Weighing("sum"), [0.5, 1.0]),
        (Weighing("mean", weigh_by_examples=True), [0.375, 0.25]),
        (Weighing("sum", weigh_by_examples=True), [1.5, 1.0]),
    ],
)
def test_weights_are_factor_times_share(weighing: Weighing, weights: list[float]) -> None:
    step = [Held(Gradient("a", examples=3), 0.5), Held(Gradient("b", examples=1), 1.0)]

    assert weighing.weights(step) == weights


def test_gradients_without_examples_count_the_same_in_a_mean() -> None:
    step = [Held(Gradient(worker, examples=0)) for worker in "ab"]

    assert Weighing("mean", weigh_by_examples=True).weights(step) == [0.5, 0.5]


@pytest.mark.parametrize("name", ["async", "sync", "bounded", "buffered"])
def test_every_built_in_policy_is_made_by_its_name_and_copies(name: str) -> None:
    policy = build(name)

    assert name in names()
    assert policy.name == name
    assert copy.deepcopy(policy).settings() == policy.settings()
    assert build(name, {k: v for k, v in policy.settings().items() if v is not None}).settings() == policy.settings()


def test_staleness_and_bound_combine_with_every_policy() -> None:
    policy = build("buffered", {"buffer_size": 4, "bound": 2, "staleness_scaling": "sqrt"})

    assert policy.settings() == {
        "bound": 2,
        "max_staleness": None,
        "staleness_scaling": "sqrt",
        "staleness_decay": None,
        "buffer_size": 4,
        "grace": 1.0,
    }
    assert policy.offer(Gradient("a"), 3, Situation(3, {"a"}, 0.0)).factor == 0.5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("asink", {}, "must be one of async, sync, bounded, buffered"),
        ("async", {"quorum": 3}, "quorum belongs to sync"),
        ("sync", {"buffer_size": 3}, "buffer_size belongs to buffered"),
        ("bounded", {"bound": 0}, "bound must be at least 1"),
        ("sync", {"quorum": 5, "workers": 4}, "quorum must be at most workers, 4"),
        ("sync", {"grace": 1.0}, "give quorum as well"),
        ("buffered", {"buffer_size": 0}, "at least 1"),
        ("async", {"staleness_scaling": "linear"}, "none, inverse, sqrt"),
        ("async", {"staleness_decay": 1.5}, "at most 1"),
        ("async", {"staleness_decay": 0.5, "staleness_scaling": "sqrt"}, "not both"),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, settings)


def test_a_quorum_beyond_the_workers_allowed_is_refused() -> None:
    with pytest.raises(ConfigError, match="quorum must be at most max_workers, 8"):
        build("sync", {"quorum": 9}).check(8)


def test_the_interface_itself_has_no_opinion() -> None:
    world = World(Policy(), "a")

    assert world.policy.offer(Gradient("a"), 5, world.situation) == APPLY
    assert world.may("a")
    assert (world.policy.next_deadline(), world.policy.must_hold(9), world.waits_for()) == (None, 1, ())
