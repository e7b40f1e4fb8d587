"""What a replay remembers of the policy, and whether versions come again that a crash took back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distgrad.durable.replay import APPLIED, CLEARED, REFUSED, SUPERSEDED
from distgrad.rules import SGD
from support.player import LAYOUT, NOTHING, Player, payload_of


def configured(player: Player, **keys: Any) -> None:
    told: dict[str, Any] = {"mode": "descent", "rule": None, "policy": ["sync", {"workers": 2}], "weighing": {}}
    player.record("configured", NOTHING, **{**told, **keys})


def test_a_policys_memory_is_what_it_last_noted_and_another_policy_begins_without_any() -> None:
    player = Player()
    configured(player)
    player.record("remembered", memory={"members": ["v"]})

    player.record("remembered", memory={"members": ["w"]})
    configured(player)
    assert player.books.policy_memory == {"members": ["w"]}
    configured(player, policy=["sync", {"workers": 3}])
    assert player.books.policy_memory == {"members": ["w"]}
    configured(player, policy=["bounded", {"bound": 3}])

    assert player.books.policy_memory == {}


def test_what_a_policy_remembers_of_the_open_step_comes_with_the_decisions_that_made_it_so() -> None:
    player = Player()
    configured(player)
    player.session()
    for number in (1, 2, 3):
        player.gradient(number)

    player.decided([REFUSED, "w", 1, "not_finite", "a", "it holds nan"], step={"spent": ["w"]})
    player.decided([SUPERSEDED, "w", 2])
    assert player.books.policy_step == {"spent": ["w"]}
    player.decided([APPLIED, [("w", 3)], None], step={})

    assert player.books.policy_step == {}


@pytest.mark.parametrize(
    "happen",
    [
        lambda player: replaced(player),
        lambda player: player.record("absent", generation=1),
        lambda player: configured(player, policy=["sync", {"workers": 3}]),
    ],
)
def test_another_step_has_nothing_of_what_was_remembered_of_one(happen: Callable[[Player], None]) -> None:
    player = Player()
    configured(player)
    player.session()
    player.gradient(1)
    player.decided([REFUSED, "w", 1, "not_finite", "a", "it holds nan"], step={"spent": ["w"]})

    happen(player)

    assert player.books.policy_step == {}


def replaced(player: Player) -> None:
    payload = payload_of(LAYOUT, 1.0, trained_only=False)
    player.record("set", payload, layout=LAYOUT.to_frame(), generation=1, version=0)


@pytest.mark.parametrize(
    "happen",
    [
        replaced,
        lambda player: player.record("absent", generation=1),
        lambda player: configured(player, mode="ascent"),
        lambda player: configured(player, rule=["sgd", SGD(lr=0.5).settings()]),
        lambda player: configured(player, weighing={"reduction": "sum"}),
        lambda player: configured(player, policy=["sync", {"workers": 3}]),
        lambda player: player.decided([CLEARED, "w", 1]),
    ],
)
def test_versions_come_again_as_long_as_nothing_happens_but_gradients(happen: Callable[[Player], None]) -> None:
    player = Player()
    player.began("one")
    configured(player)
    player.session()
    player.gradient(1)
    player.began("two")
    configured(player)
    assert player.books.repeatable == ["one"]

    happen(player)

    assert player.books.repeatable == []
    player.began("three")
    assert player.books.repeatable == ["two"]


@pytest.mark.parametrize(("version", "is_forked"), [(0, False), (3, True), (None, False)])
def test_versions_do_not_come_again_if_what_changed_them_was_behind_lost_updates(
    version: int | None, is_forked: bool
) -> None:
    player = Player()
    player.began("one")
    configured(player)
    keys = {} if version is None else {"version": version}

    configured(player, rule=["sgd", {"lr": 0.5}], **keys)
    configured(player, rule=["sgd", {"lr": 0.25}], version=0)

    assert player.replay.is_forked is is_forked
    player.began("two")
    assert player.books.repeatable == ([] if is_forked else ["one"])
    assert player.replay.is_forked is False
