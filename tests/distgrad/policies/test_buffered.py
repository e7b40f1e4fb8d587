"""Every so many gradients are one update."""

from __future__ import annotations

from distgrad.policies import (
    Buffered,
)
from support.policy_world import World


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
