"""Offers of first parameters: one is asked to send them, the others wait, and nobody waits for one who went away."""

from __future__ import annotations

from typing import Any

import pytest

from distgrad_broker.offers import MAX_WAIT_S, SEND_WITHIN_S
from support.core_kit import LAYOUT, Kit, frames_of

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def answers(kit: Kit, *envelopes: bytes) -> list[bool | None]:
    """Tell what each was told, None if it waits."""
    replies = [kit.replies_to(envelope) for envelope in envelopes]
    assert all(len(reply) <= 1 for reply in replies)
    return [reply[0].header["wanted"] if reply else None for reply in replies]


def offer(kit: Kit, client: bytes, number: int = 1, wait_s: float = MAX_WAIT_S, size: int = 0) -> bytes:
    return kit.send("offer", client=client, id=number, wait_s=wait_s, bytes=size)


def test_the_first_is_asked_to_send_and_the_others_hear_when_parameters_are_set() -> None:
    kit = Kit(None)
    first, second, third = offer(kit, A), offer(kit, B), offer(kit, C)
    assert answers(kit, first, second, third) == [True, None, None]

    kit.ask("set", frames_of(LAYOUT), client=A, id=2, if_absent=True)

    assert answers(kit, second, third) == [False, False]
    assert kit.replies_to(second)[0].header["fingerprint"] == LAYOUT.fingerprint


def test_where_there_are_parameters_none_are_wanted() -> None:
    kit = Kit()

    assert answers(kit, offer(kit, A)) == [False]


def test_whoever_does_not_wait_is_answered_at_once() -> None:
    kit = Kit(None)
    offer(kit, A)

    assert answers(kit, offer(kit, B, wait_s=0)) == [False]


def test_the_one_that_was_asked_is_asked_again_when_it_repeats() -> None:
    kit = Kit(None)

    assert answers(kit, offer(kit, A), offer(kit, A, 2)) == [True, True]


@pytest.mark.parametrize("size", [0, 3_000_000])
def test_another_is_asked_if_the_first_does_not_send(size: int) -> None:
    kit = Kit(None)
    offer(kit, A, size=size)
    kit.now += SEND_WITHIN_S + size / 1e6 - 1
    waiting = offer(kit, B)
    assert answers(kit, waiting) == [None]

    kit.wait(1)

    assert answers(kit, waiting) == [False]
    assert answers(kit, offer(kit, B, 2)) == [True]


def test_a_wait_ends_in_time_and_a_repeat_replaces_it() -> None:
    kit = Kit(None)
    offer(kit, A, size=100_000_000)
    former, latter = offer(kit, B), offer(kit, B, 2)

    kit.wait(MAX_WAIT_S)

    assert answers(kit, former, latter) == [None, False]


def test_parameters_that_were_taken_away_can_be_offered_anew() -> None:
    kit = Kit()
    kit.ask("set", client=A, id=1, absent=True)

    assert answers(kit, offer(kit, B)) == [True]


@pytest.mark.parametrize("keys", [{"bytes": -1}, {"bytes": "many"}, {"wait_s": -1.0}])
def test_an_impossible_offer_is_malformed(keys: dict[str, Any]) -> None:
    assert Kit(None).ask("offer", **keys)["error"] == "malformed"


def test_who_waits_is_answered_when_the_broker_is_destroyed() -> None:
    kit = Kit(None)
    offer(kit, A)
    waiting = offer(kit, B)

    kit.ask("destroy")

    assert answers(kit, waiting) == [False]
