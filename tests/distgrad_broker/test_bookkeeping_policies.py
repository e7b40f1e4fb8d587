"""Tests of `distgrad_broker.bookkeeping`: what policies remember, and states that a former broker had shown."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from distgrad.wire import State
from support.core_kit import LAYOUT, frames_of
from support.durable_kit import SYNC, DurableKit, applied, step, stepped

CHECKPOINT, NONE = "checkpoint", "none"


# Policies


def test_the_members_of_a_fixed_set_are_remembered() -> None:
    for checkpointed in (False, True):
        kit = stepped(1)
        if checkpointed:
            kit.checkpoint()

        again = kit.crash(**SYNC)

        assert again.state.policy.memory() == {"members": ["a", "b"]}
        assert again.ask("status")["status"]["waits_for"] == ["a", "b"]


def test_who_has_left_a_fixed_set_is_forgotten() -> None:
    kit = stepped(1)
    kit.written("leave", worker="a", session=kit.sessions["a"])

    assert kit.crash(**SYNC).state.policy.memory() == {"members": ["b"]}


def test_the_members_of_a_step_that_time_has_closed_are_remembered() -> None:
    config: dict[str, Any] = {**SYNC, "quorum": 1, "grace": 0.5}
    kit = DurableKit(**config)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.write()
    kit.wait(0.6)
    assert kit.holder.version == 1
    kit.write()

    assert kit.crash(**config).state.policy.memory() == kit.state.policy.memory() == {"members": ["a"]}


def test_a_member_whose_gradient_was_cleared_is_remembered() -> None:
    kit = DurableKit(**SYNC)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.written("clear")

    assert kit.crash(**SYNC).state.policy.memory() == kit.state.policy.memory() == {"members": ["a"]}


def test_a_policy_that_was_named_anew_does_not_remember_the_former_ones_members() -> None:
    kit = stepped(1)
    kit.greet("c")
    kit.written("configure", settings={"policy": "sync", "workers": 2})
    kit.push(1, worker="c", base=list(kit.state.name))
    kit.work()
    kit.write()
    assert [held.gradient.worker for held in kit.state.held] == ["c"]

    again = kit.crash(**SYNC)
    again.work()

    assert [held.gradient.worker for held in again.state.held] == ["c"]


@pytest.mark.parametrize(("workers", "members"), [(2, ["a", "b"]), (3, ["a", "b"]), (1, [])])
def test_a_fixed_set_keeps_its_members_when_other_settings_change_as_long_as_it_has_room(
    workers: int, members: list[str]
) -> None:
    kit = stepped(1, workers_silent_after=10.0)
    kit.wait(11.0)
    kit.write()

    kit.written("configure", settings={"workers": workers, "quorum": 1, "grace": 0.5})

    assert kit.state.policy.memory() == {"members": members}
    assert kit.crash(**SYNC).state.policy.memory() == {"members": members}
    started = stepped(1).crash(policy="sync", workers=workers, quorum=1)
    assert started.state.policy.memory() == {"members": members}
    assert started.crash("three", policy="sync", workers=workers, quorum=1).state.policy.memory()["members"] == members


def test_members_of_a_set_that_was_not_fixed_in_between_are_forgotten_also_after_a_restart() -> None:
    kit = stepped(1).crash(policy="sync")
    kit.write()

    assert kit.crash("three", **SYNC).state.policy.memory() == {"members": []}


def test_an_elastic_step_waits_for_recovered_workers_until_their_leases_end() -> None:
    config: dict[str, Any] = {"policy": "sync", "workers_silent_after": 10.0}
    kit = DurableKit(**config)
    kit.greet("a")
    kit.greet("b")

    again = kit.crash(**config)
    again.greet("a", session=kit.sessions["a"])
    again.push(1, worker="a", base=["one", 0, 0])
    again.work()
    assert (again.holder.version, again.ask("status")["status"]["waits_for"]) == (0, ["b"])
    again.wait(6.0)
    again.beat("a")
    again.wait(6.0)

    assert again.holder.version == 1


def test_gradients_that_were_held_are_offered_to_the_policy_of_the_new_start() -> None:
    kit = DurableKit(**SYNC)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.write()

    again = kit.crash(policy="async")
    again.work()

    assert again.total == -8.0


def test_a_policy_configured_while_gradients_are_held_gets_them_also_after_a_restart() -> None:
    kit = DurableKit(**SYNC)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.written("configure", settings={"policy": "async"})

    again = kit.crash(**SYNC)

    assert (again.state.policy.name, len(again.state.queue)) == ("async", 1)
    again.work()
    assert again.total == -8.0


# States that were shown before


@pytest.mark.parametrize(
    ("config", "base", "outcome"),
    [
        ({}, ["one", 0, 1], "applied"),
        ({}, ["one", 0, 3], "applied"),
        ({}, ["never", 0, 1], "applied"),
        ({"max_staleness": 1}, ["one", 0, 2], "applied"),
        ({"max_staleness": 1}, ["one", 0, 1], "applied"),
        ({"max_staleness": 1}, ["one", 0, 0], "superseded"),
        ({"max_staleness": 1}, ["one", 0, 3], "superseded"),
        ({"max_staleness": 1}, ["never", 0, 2], "superseded"),
        ({"policy": "sync"}, ["one", 0, 2], "applied"),
        ({"policy": "sync"}, ["one", 0, 1], "superseded"),
        ({"policy": "sync"}, ["one", 0, 3], "superseded"),
        ({"policy": "sync"}, ["never", 0, 2], "superseded"),
        ({"policy": "sync", "workers": 1}, ["one", 0, 2], "applied"),
        ({"policy": "sync", "workers": 1}, ["one", 0, 1], "superseded"),
        ({"policy": "sync", "workers": 1}, ["never", 0, 2], "superseded"),
    ],
)
def test_what_a_gradient_was_computed_on_is_judged_by_how_much_of_it_has_survived(
    config: dict[str, Any], base: list[Any], outcome: str
) -> None:
    """The first broker had 2 updates on the disk, showed a third, and crashed."""
    kit = applied(1, 2, **config)
    kit.push(3, base=["one", 0, 2])
    kit.work()
    assert kit.state.name == State("one", 0, 3)

    again = kit.crash(**config)
    again.greet(session=kit.sessions["w"], lowest=3)
    again.push(3, base=base)
    again.work()
    again.write()

    assert again.member().settled == 3
    assert again.state.outcomes - Counter(applied=2) == {outcome: 1}


def test_staleness_counts_on_through_restarts() -> None:
    kit = applied(1, 2)
    again = kit.crash("two")
    again.greet(session=kit.sessions["w"], lowest=3)
    again.push(3, base=["two", 0, 2])
    again.work()
    again.write()

    third = again.crash("three")
    third.greet(session=again.sessions["w"], lowest=4)
    third.push(4, base=["one", 0, 1])
    third.push(5, base=["two", 0, 3])
    third.work(2)

    assert (third.member().staleness_sum, third.member().staleness_max) == (3, 2)


def test_a_version_beyond_the_present_one_of_the_same_broker_is_refused() -> None:
    kit = applied(1)
    kit.push(2, base=["one", 0, 2])
    kit.work()
    kit.write()

    assert kit.state.refused == {"from_the_future": 1}


def test_parameters_replaced_after_a_restart_are_no_state_that_was_shown_before() -> None:
    """The first broker showed its own new parameters, but a crash took them back before they were on the disk."""
    kit = stepped(1)
    kit.send("set", frames_of(LAYOUT, 5.0))
    assert kit.state.generation == 1

    again = kit.crash(**SYNC)
    again.greet("a", session=kit.sessions["a"], lowest=2)
    again.written("set", frames_of(LAYOUT, 100.0))
    again.push(2, worker="a", base=["one", 1, 1])
    again.work()
    again.write()

    assert again.state.outcomes["superseded"] == 1


def test_parameters_replaced_after_a_restart_are_none_either_after_one_more() -> None:
    kit = stepped(1)
    kit.send("set", frames_of(LAYOUT, 5.0))

    again = kit.crash(**SYNC)
    again.written("set", frames_of(LAYOUT, 100.0))
    third = again.crash("three", **SYNC)
    third.greet("a", session=kit.sessions["a"], lowest=2)
    third.push(2, worker="a", base=["one", 1, 1])
    third.work()
    third.write()

    assert third.state.outcomes["superseded"] == 1


def test_versions_of_parameters_that_were_replaced_behind_lost_steps_are_not_waited_for() -> None:
    """Regression, found by simulation: they never came again, and their workers waited for them for ever."""
    kit = stepped(2, durability=CHECKPOINT)
    kit.checkpoint()
    step(kit, 3)
    kit.written("set", frames_of(LAYOUT, 5.0))
    shown = list(kit.state.name)
    assert shown == ["one", 1, 3]

    again = kit.crash(**SYNC, durability=CHECKPOINT)
    assert again.state.name == State("two", 1, 2)
    for worker in ("a", "b"):
        again.greet(worker, session=kit.sessions[worker], lowest=3)
        again.push(3, worker=worker, base=["one", 0, 2])
        again.push(4, worker=worker, base=shown)
    again.work(4)

    assert again.state.outcomes["superseded"] == 4


@pytest.mark.parametrize("config", [{"optimizer": "adam"}, {"optimizer": "adam", "durability": CHECKPOINT}])
def test_who_took_part_in_the_open_step_with_a_bad_gradient_has_done_so_also_after_a_crash(
    config: dict[str, Any],
) -> None:
    """Regression: it was waited for again, but what it had sent next was held off until the step was made."""
    kit = stepped(2, **config)
    kit.push(3, worker="a", value=np.nan, base=list(kit.state.name))
    kit.work()
    kit.write()
    if "durability" in config:
        kit.checkpoint()

    again = kit.crash(**SYNC, **config)
    assert again.state.policy.step_memory() == {"spent": ["a"]}
    again.greet("b", session=kit.sessions["b"], lowest=3)
    again.push(3, worker="b", base=["one", 0, 2])
    again.work()

    assert again.holder.version == 3
    assert again.state.policy.step_memory() == {}
    again.write()
    if "durability" in config:
        again.checkpoint()
    assert again.crash(**SYNC, **config).state.policy.step_memory() == {}
