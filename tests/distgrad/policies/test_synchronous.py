"""One update per step: who takes part, who is waited for, and what comes too late."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.policies import NO_PLACES, SUPERSEDE, Action, Asynchronous, Chain, Places, Policy, Staleness, Synchronous
from support.policy_world import Accounts, Gradient, World


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


def test_who_took_part_with_nothing_is_remembered_of_a_fixed_set_until_the_step_is_closed() -> None:
    fixed, elastic = World(Synchronous(workers=2), "a", "b"), World(Synchronous(), "a", "b")
    for world in (fixed, elastic):
        for worker in ("a", "b"):
            world.push(worker)
        bad = world.next("a")
        world.policy.offer(bad, 0, world.situation)
        world.policy.withdrawn(bad)
    memory = {**fixed.policy.memory(), **fixed.policy.step_memory()}
    assert (memory, elastic.policy.step_memory()) == ({"members": ["a", "b"], "spent": ["a"]}, {})
    again = World(Synchronous(workers=2), "a", "b")
    again.policy.recall(memory)

    again.push("b")

    assert again.steps == [["b"]]
    assert again.policy.step_memory() == {}


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


def test_a_quorum_that_is_broken_by_a_withdrawal_has_no_deadline_and_its_grace_begins_anew() -> None:
    world = Accounts(Synchronous(quorum=2, grace=5.0), "a", "b", "c")
    world.pull_and_push("a")
    world.pull_and_push("b")
    world.wait(1.0)

    world.withdraw(world.held[1])

    assert world.policy.next_deadline() is None, "whoever waits for it would spin when it has passed"
    world.wait(9.0)
    world.pull_and_push("b")
    assert (world.steps, world.policy.next_deadline()) == ([], 15.0)


@pytest.mark.parametrize("workers", [None, 2])
def test_when_all_were_bad_a_step_waits_for_all_of_them_again(workers: int | None) -> None:
    world = Accounts(Synchronous(workers=workers), "a", "b")
    for worker in "ab":
        world.pull(worker)
        world.push_pulled(worker, is_bad=True)

    world.pull_and_push("a")
    assert (world.steps, world.waits_for()) == ([], ["b"])
    world.pull_and_push("b")

    assert world.steps == [["a", "b"]]


def test_a_step_that_is_opened_when_everybody_has_gone_is_of_those_who_come() -> None:
    for holds in (True, False):
        world = Accounts(Synchronous(), "a", "b")
        if holds:
            world.pull_and_push("a")
        world.depart("a")
        world.depart("b")
        world.join("c")
        world.join("d")
        world.pull_and_push("c")

        assert world.steps == ([["a"]] if holds else [])
        assert world.waits_for() == ["d"]


def test_only_a_gradient_that_is_held_makes_a_member() -> None:
    world = Accounts(Synchronous(workers=2), "a", "b", "c")
    assert world.push_pulled("c").reason == "no_base"
    world.pull("c")
    world.replace()
    assert world.push_pulled("c") is SUPERSEDE

    for worker in "ab":
        world.pull_and_push(worker)

    assert world.steps == [["a", "b"]]


def test_a_member_that_gave_a_bad_gradient_and_died_is_not_waited_for() -> None:
    world = Accounts(Synchronous(workers=2), "a", "b")
    for worker in "ab":
        world.pull_and_push(worker)
    world.pull("a")
    world.push_pulled("a", is_bad=True)
    world.depart("a")

    world.pull_and_push("b")

    assert world.steps == [["a", "b"], ["b"]]


def test_a_fixed_set_outlives_its_process_and_an_elastic_one_has_nothing_to_remember() -> None:
    world = World(Synchronous(workers=2), "a", "b")
    world.push("b")
    world.push("a")
    memory = world.policy.memory()
    assert memory == {"members": ["a", "b"]}

    again = World(Synchronous(workers=2), "a", "b", "c")
    again.policy.recall(memory)

    assert list(again.waits_for()) == ["a", "b"]
    assert again.push("c") is Action.REFUSE
    assert World(Synchronous(), "a").policy.memory() == {}


def test_room_is_kept_for_a_fixed_set_and_for_those_of_it_that_are_not_known_yet() -> None:
    world = World(Synchronous(workers=3), "a", "b")
    assert world.policy.places() == Places(set(), 3)
    world.push("b")

    assert world.policy.places() == Places({"b"}, 2)
    assert Chain([world.policy]).places() == Places({"b"}, 2)
    assert World(Synchronous(quorum=2), "a").policy.places() == NO_PLACES


def test_room_is_kept_for_a_quorum_of_a_fixed_set_and_not_for_all_of_it() -> None:
    world = World(Synchronous(quorum=2, workers=3), "a", "b", "c")
    assert world.policy.places() == Places((), 2, None)
    for worker in "abc":
        world.push(worker)

    assert world.policy.places() == Places((), 2, {"a", "b", "c"})


def test_a_larger_set_keeps_its_members_and_one_that_is_too_small_for_them_none() -> None:
    memory = {"members": ["a", "b"]}
    larger, smaller, elastic = Synchronous(workers=3), Synchronous(workers=1), Synchronous()

    for policy in (larger, smaller, elastic):
        policy.recall(memory)

    assert (larger.memory(), smaller.memory(), elastic.memory()) == (memory, {"members": []}, {})


def test_what_another_policy_remembered_is_no_hindrance() -> None:
    policy = Synchronous(workers=2)

    policy.recall({"clocks": {"a": 3}})

    assert policy.memory() == {"members": []}


def test_who_has_left_is_no_member_that_is_remembered() -> None:
    world = World(Synchronous(workers=2), "a", "b")
    world.push("a")
    world.push("b")

    world.depart("a", left=True)
    world.depart("b", left=False)

    assert world.policy.memory() == {"members": ["b"]}


@pytest.mark.parametrize(
    ("policy", "is_repeatable"),
    [
        (Synchronous(workers=2), True),
        (Synchronous(workers=2, quorum=1), False),
        (Synchronous(workers=2, quorum=1, grace=1.0), False),
        (Synchronous(), False),
        (Asynchronous(), False),
        (Chain([Staleness(max_staleness=1), Synchronous(workers=2)]), True),
        (Chain([Staleness(max_staleness=1), Synchronous()]), False),
    ],
)
def test_only_a_fixed_set_without_quorum_makes_the_same_versions_again(policy: Policy, is_repeatable: bool) -> None:
    assert policy.is_repeatable is is_repeatable


def test_a_chain_remembers_what_its_links_do() -> None:
    chain = Chain([Staleness(max_staleness=1), Synchronous(workers=2)])

    chain.recall({"members": ["a"]})

    assert chain.memory() == {"members": ["a"]}
