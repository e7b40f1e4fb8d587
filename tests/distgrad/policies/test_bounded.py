"""Nobody runs far ahead of the slowest, and nobody stands still for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distgrad.policies import (
    Bounded,
)
from support.policy_world import World


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


def test_numbers_that_were_cleared_do_not_move_the_clock() -> None:
    world = World(Bounded(2), "a", "b")
    world.push("a")
    world.numbers["a"] += 50  # queued while the updater was stopped, and cleared

    world.push("a")
    world.push("b")

    assert world.may("a"), "it is one ahead, not fifty"
