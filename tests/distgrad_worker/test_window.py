"""Gradients that are not settled yet: numbers, bytes, resending, and what a former process left behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad.wire import MIN_CHARGE_BYTES, unpack
from distgrad_worker.headers import Header
from distgrad_worker.window import DEFAULT_LIMIT_BYTES, Window

UNLIMITED = 1 << 40


def header(fingerprint: int) -> Header:
    return Header("w", fingerprint, None)


def window(*charges: int, limit_bytes: int | None = None) -> Window:
    made = Window(limit_bytes)
    for charge in charges:
        made.add(header(1), {}, [b"payload"], charge)
    return made


def send(made: Window, grant: int = UNLIMITED) -> list[int]:
    return [entry.number for entry in made.send(grant)]


def test_numbers_are_given_in_order_from_one() -> None:
    made = window(1024, 1024, 1024)

    assert (len(made), made.lowest, made.last, made.kept_bytes) == (3, 1, 3, 3072)
    assert send(made) == [1, 2, 3]
    assert send(made) == []


def test_only_what_the_grant_covers_is_sent_and_settling_makes_room() -> None:
    made = window(1024, 1024, 2000)

    assert send(made, 2048) == [1, 2]
    assert (made.in_flight_bytes, made.unsent_charge) == (2048, 2000)
    assert made.settle(1) == 1
    assert send(made, 2048) == []
    made.settle(2)
    assert send(made, 2048) == [3]
    assert made.unsent_charge == 0


def test_a_rewind_sends_again_what_the_broker_does_not_have() -> None:
    made = window(1024, 1024, 1024)
    send(made)

    made.rewind(1)

    assert (made.sent, made.in_flight_bytes) == (1, 1024)
    assert send(made) == [2, 3]


def test_a_rewind_never_goes_behind_what_is_settled_or_beyond_what_was_numbered() -> None:
    made = window(1024, 1024)
    send(made)
    made.settle(1)

    made.rewind(0)
    assert made.sent == 1
    made.rewind(99)
    assert made.sent == 2


def test_what_is_settled_beyond_the_end_is_still_in_order() -> None:
    made = window(1024)

    made.settle(5)

    assert (made.settled, made.sent, made.last, len(made), made.lowest) == (5, 5, 5, 0, 0)
    assert made.add(header(1), {}, [], 1024).number == 6


@pytest.mark.parametrize(
    ("limit", "kept", "grant", "has_room"),
    [
        (None, 0, 1023, False),
        (None, 0, 1024, True),
        (None, 1, 2048, True),
        (None, 1, 2047, False),
        (10, 0, 4096, True),  # an empty window takes one of any size
        (10, 1, 4096, False),
        (2048, 1, 4096, True),
    ],
)
def test_room_is_limited_by_grant_and_window(limit: int | None, kept: int, grant: int, has_room: bool) -> None:
    assert window(*[1024] * kept, limit_bytes=limit).has_room(1024, grant) is has_room


def test_what_a_former_process_left_in_the_queue_counts_until_it_is_settled() -> None:
    made = Window(None)
    made.inherit(3, 5, 2048)
    made.add(header(1), {}, [], 1024)

    assert (made.settled, made.last, made.lowest, made.in_flight_bytes, made.kept_bytes) == (3, 6, 6, 2048, 3072)
    assert send(made, 3071) == []
    made.settle(4)
    assert made.in_flight_bytes == 2048
    made.settle(5)
    assert send(made, 3071) == [6]
    assert (made.in_flight_bytes, made.kept_bytes) == (1024, 1024)


def test_after_a_restart_nothing_of_a_former_process_is_in_the_queue() -> None:
    made = Window(None)
    made.inherit(3, 5, 2048)

    made.disown()

    assert (made.in_flight_bytes, made.kept_bytes) == (0, 0)
    made.settle(5)
    assert (made.in_flight_bytes, made.kept_bytes) == (0, 0)


def test_payloads_of_another_layout_that_were_not_sent_are_let_go_but_not_their_numbers() -> None:
    """Regression: a gradient larger than the grants of smaller parameters waited for ever."""
    made = window(5000, 5000, 5000)
    made.send(5000)

    made.give_up_payloads(fingerprint=1)
    assert made.kept_bytes == 15000
    made.give_up_payloads(fingerprint=2)

    assert (made.in_flight_bytes, made.kept_bytes) == (5000, 5000 + 2 * MIN_CHARGE_BYTES)
    made.settle(1)
    entries = made.send(2 * MIN_CHARGE_BYTES)
    assert [(entry.number, list(entry.parts)) for entry in entries] == [(2, []), (3, [])]


ACTIONS = st.sampled_from(["add", "send", "settle", "rewind", "give up", "disown"])
STEPS = st.lists(st.tuples(ACTIONS, st.integers(0, 6000)), max_size=50)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3), STEPS)
def test_bytes_are_those_of_the_entries_whatever_happens(inherited: int, steps: list[tuple[str, int]]) -> None:
    made = Window(None)
    made.inherit(2, 2 + inherited, 1024 * inherited)
    for action, amount in steps:
        if action == "add":
            made.add(header(amount % 2), {}, [b"x"], 1024 + amount)
        elif action == "send":
            grant = amount
            before = made.in_flight_bytes
            assert not made.send(grant) or made.in_flight_bytes <= grant or before > grant
        elif action == "settle":
            made.settle(min(made.settled + amount % 3, made.last))
        elif action == "rewind":
            made.rewind(amount % (made.last + 2))
        elif action == "give up":
            made.give_up_payloads(0)
        else:
            made.disown(amount % 4096)

        assert made.settled <= made.sent <= made.last
        rest = made._inherited_bytes
        assert made.kept_bytes == rest + sum(entry.charge for entry in made._entries)
        assert made.in_flight_bytes == rest + sum(entry.charge for entry in made._entries if entry.number <= made.sent)
        unsent = [entry.charge for entry in made._entries if entry.number > made.sent]
        assert made.unsent_charge == (unsent[0] if unsent else 0)
        assert [entry.number for entry in made._entries] == list(range(made.last - len(made) + 1, made.last + 1))


def test_what_waits_for_the_brokers_disk_is_kept_as_long_as_the_grant_allows() -> None:
    made = Window(None)
    made.add(header(1), {}, [b"payload"], DEFAULT_LIMIT_BYTES)
    assert not made.has_room(1024, UNLIMITED)

    made.keeps_all = True

    assert made.has_room(1024, UNLIMITED)
    assert made.has_room(1024, DEFAULT_LIMIT_BYTES + 1024)
    assert not made.has_room(1025, DEFAULT_LIMIT_BYTES + 1024), "and not beyond it"


def test_a_limit_that_the_user_named_holds_whatever_the_broker_does_with_its_disk() -> None:
    made = window(1024, limit_bytes=2048)

    made.keeps_all = True

    assert made.has_room(1024, UNLIMITED)
    assert not made.has_room(1025, UNLIMITED)


def test_a_gradient_that_is_sent_again_asks_for_its_pull_again() -> None:
    made = Window(None)
    common = header(1)
    common.address("one:1", 1)
    entry = made.add(common, {"loss": 0.5}, [b"payload"], 1024, None, 7)

    first, again = unpack(entry.frames()[0]), unpack(entry.frames()[0])

    assert first == again
    assert again["asks"] == 7
    assert again["loss"] == 0.5
