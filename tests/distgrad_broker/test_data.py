"""The data folder opened: settings of this start against those in force, going back, and what cannot be used."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from distgrad.rules import SGD, Adam
from support.durable_kit import DurableKit

CHECKPOINT, NONE = "checkpoint", "none"


def applied(*numbers: int, **config: Any) -> DurableKit:
    kit = DurableKit(**config)
    kit.greet()
    for number in numbers:
        kit.push(number, cursor=f"c{number}")
        kit.work()
        kit.write()
    return kit


# Settings


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_was_configured_stays_in_force_as_long_as_the_start_is_the_same(checkpointed: bool) -> None:
    config: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0}
    kit = DurableKit(**config)
    settings = {"mode": "ascent", "lr": 0.25, "policy": "sync", "workers": 3, "reduction": "sum"}
    assert kit.written("configure", settings=settings)["ok"]
    if checkpointed:
        kit.checkpoint()

    for incarnation in ("two", "three"):
        kit = kit.crash(incarnation, **config)
        assert (kit.holder.mode, kit.holder.rule) == ("ascent", SGD(lr=0.25))
        assert (kit.state.policy.name, kit.state.policy.settings()["workers"]) == ("sync", 3)
        assert kit.state.weighing.reduction == "sum"
        kit.write()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"mode": "ascent"}, ("ascent", SGD(lr=0.25), "sync", "sum")),
        ({"lr": 0.5}, ("descent", SGD(lr=0.5), "sync", "sum")),
        ({"optimizer": "adam", "lr": 0.5}, ("descent", Adam(lr=0.5), "sync", "sum")),
        ({"policy": "bounded"}, ("descent", SGD(lr=0.25), "bounded", "sum")),
        ({"max_staleness": 3}, ("descent", SGD(lr=0.25), "async", "sum")),
        ({"weigh_by_examples": True}, ("descent", SGD(lr=0.25), "sync", "mean")),
    ],
)
def test_a_setting_that_is_started_with_otherwise_than_before_wins_and_the_others_stay(
    changed: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    first: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0}
    kit = DurableKit(**first)
    settings = {"lr": 0.25, "policy": "sync", "workers": 3, "reduction": "sum"}
    kit.written("configure", settings=settings)

    again = kit.crash(**{**first, **changed})

    found = (again.holder.mode, again.holder.rule, again.state.policy.name, again.state.weighing.reduction)
    assert found == expected
    again.write()
    third = again.crash("three", **{**first, **changed})
    assert (third.holder.mode, third.holder.rule, third.state.policy.name) == expected[:3], "and stays in force"


def test_going_back_to_the_first_settings_is_a_change_as_well() -> None:
    kit = DurableKit(optimizer="sgd", lr=1.0)
    kit.write()
    kit = kit.crash("two", optimizer="sgd", lr=0.5)
    kit.write()

    assert kit.crash("three", optimizer="sgd", lr=1.0).holder.rule == SGD(lr=1.0)


def test_a_new_learning_rate_keeps_the_rules_state_and_another_rule_begins_anew() -> None:
    kit = applied(1, 2, optimizer="adam", lr=0.5)

    slower = kit.crash(optimizer="adam", lr=0.25)
    other = kit.crash(optimizer="sgd", lr=0.25)

    assert (slower.holder.steps, other.holder.steps, other.holder.state) == (2, 0, {})
    assert slower.holder.version == other.holder.version == 2


def test_what_has_changed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    kit = applied(1)
    with caplog.at_level(logging.INFO, "distgrad_broker"):
        kit.crash("two")
        assert "other settings" not in caplog.text
        kit.crash("two", mode="ascent", reduction="sum")

    assert "started with other settings than before changed=mode,weighing" in caplog.text


def test_updates_before_a_change_are_repeated_by_what_was_in_force_then() -> None:
    kit = applied(1, optimizer="sgd", lr=0.5)

    again = kit.crash("two", optimizer="sgd", lr=0.25)
    again.greet(session=kit.sessions["w"], lowest=2)
    again.push(2)
    again.work()
    again.write()

    assert again.total == again.crash("three", optimizer="sgd", lr=9.0).total == -6.0


def test_durability_can_be_changed_from_start_to_start() -> None:
    kit = applied(1)
    for number, (incarnation, durability) in enumerate(
        [("two", CHECKPOINT), ("three", NONE), ("four", "journal"), ("five", CHECKPOINT)], 2
    ):
        session = kit.sessions["w"]
        kit = kit.crash(incarnation, durability=durability)
        greet = kit.hello if durability == NONE else kit.greet
        assert greet(session=session, lowest=number)["accepted"] == number - 1
        kit.push(number)
        kit.work()
        kit.checkpoint()
        assert kit.member().settled == number

    assert kit.crash("six").total == -40.0


def test_a_policy_that_needs_more_room_than_there_is_is_refused_at_the_start() -> None:
    kit = DurableKit(policy="sync")
    for worker in "abcd":
        kit.greet(worker)

    with pytest.raises(Exception, match="must hold 4 gradient") as caught:
        kit.crash(policy="sync", queue_bytes=2048)
    assert "raise it to at least 4096" in str(caught.value)
