"""What is known beside the parameters: how far each worker has got, and which brokers there were."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.durable.books import LEFT, MAX_FORMER, Books, Lineage, MemberBook
from distgrad.wire import State


def through_a_file(books: Books) -> Books:
    return Books.from_map(msgpack.unpackb(msgpack.packb(books.to_map()), strict_map_key=False))


def test_decisions_in_order_move_the_last_decided_number_and_its_cursor() -> None:
    book = MemberBook("w", accepted=2)

    book.note(1, "applied", "one")
    book.note(2, "superseded", None)

    assert (book.decided, book.decided_cursor, book.ahead) == (2, "one", {})
    assert book.counts == Counter(applied=1, superseded=1)


def test_a_decision_ahead_of_its_turn_waits_for_those_before_it() -> None:
    book = MemberBook("w", accepted=5, decided=3)

    book.note(5, "refused", "five")
    assert (book.decided, book.decided_cursor, list(book.ahead)) == (3, None, [5])
    book.note(4, "applied", "four")

    assert (book.decided, book.decided_cursor, book.ahead) == (5, "five", {})


@given(st.permutations(range(1, 9)))
def test_whatever_their_order_decisions_end_at_the_last_number_and_its_cursor(order: list[int]) -> None:
    book = MemberBook("w", accepted=8)

    for number in order:
        book.note(number, "applied", f"c{number}")

    assert (book.decided, book.decided_cursor, book.ahead, book.counts["applied"]) == (8, "c8", {}, 8)


def test_a_decision_on_what_has_to_be_accepted_anew_waits_for_that() -> None:
    """Without a journal of gradients a restart knows what was decided ahead, and not what it was ahead of."""
    book = MemberBook("w", accepted=3, decided=3)

    book.note(4, "superseded", None)

    assert (book.decided, list(book.ahead)) == (3, [4])


def test_books_come_back_from_a_file_as_they_were() -> None:
    member = MemberBook(
        "w",
        user="alice",
        generated=True,
        state=LEFT,
        incarnation="one",
        counter=7,
        nonces=[b"n" * 16],
        accepted=9,
        decided=6,
        ahead={8: ("refused", "c8")},
        cursor=b"\xff\x00",
        decided_cursor="text",
        refusals=[[4, "not_finite", "w.0", "why"]],
        counts=Counter(applied=5, refused=1),
        examples=60,
        loss=0.5,
    )
    books = Books(
        incarnation="one",
        generation=3,
        is_running=False,
        is_destroyed=True,
        lineage=Lineage([State("zero", 1, 2)]),
        members={"w": member},
        outcomes=Counter(applied=5),
        refused=Counter(not_finite=1),
        policy=("sync", {"workers": 2, "quorum": None}),
        policy_memory={"members": ["w"]},
        weighing={"reduction": "sum"},
        settings={"mode": "descent", "rule": None},
    )

    found = through_a_file(books)

    back = found.members.pop("w")
    assert {**vars(back), "ahead": {8: list(back.ahead[8])}} == {**vars(member), "ahead": {8: ["refused", "c8"]}}
    assert type(back.counts) is type(found.outcomes) is Counter
    assert found.lineage.former == [State("zero", 1, 2)]
    books.members = {}
    assert {**vars(found), "lineage": None} == {**vars(books), "lineage": None}


def test_empty_books_come_back_empty() -> None:
    found = through_a_file(Books())

    assert (found.incarnation, found.policy, found.members, found.lineage.former) == ("", None, {}, [])
    assert found.is_running


def test_keys_of_a_later_version_are_left_out_and_missing_ones_have_their_defaults() -> None:
    member = {"worker": "w", "accepted": 4, "colour": "red"}

    found = Books.from_map({"incarnation": "one", "members": [member], "weather": "fine"})

    assert found.members["w"] == MemberBook("w", accepted=4)
    assert found.outcomes == Counter()


def test_writing_books_down_does_not_change_them() -> None:
    books = Books(members={"w": MemberBook("w", counts=Counter(applied=1))}, outcomes=Counter(applied=1))

    msgpack.packb(books.to_map())

    assert books.members["w"].counts == Counter(applied=1)
    assert type(books.outcomes) is Counter


LINEAGE = Lineage([State("one", 2, 10), State("two", 2, 15)])


@pytest.mark.parametrize(
    ("state", "survives"),
    [
        (State("one", 2, 10), True),
        (State("one", 2, 11), False),  # shown, then lost with the crash
        (State("one", 1, 99), True),  # before the parameters were replaced
        (State("one", 3, 0), False),  # they were replaced, and that was lost
        (State("two", 2, 15), True),
        (State("two", 2, 16), False),
        (State("never", 0, 0), False),
    ],
)
def test_a_state_survives_if_what_was_recovered_of_its_broker_goes_that_far(state: State, survives: bool) -> None:
    assert LINEAGE.survives(state) is survives


def test_incarnations_are_ranked_by_age() -> None:
    assert [LINEAGE.rank(name) for name in ("never", "one", "two")] == [-1, 0, 1]


def test_a_lineage_goes_on_without_changing_the_former_one() -> None:
    longer = LINEAGE.after(State("three", 2, 20))

    assert (longer.rank("three"), LINEAGE.rank("three")) == (2, -1)


def test_a_lineage_forgets_the_oldest() -> None:
    lineage = Lineage()
    for number in range(MAX_FORMER + 2):
        lineage = lineage.after(State(f"i{number}", 0, number))

    assert len(lineage.former) == MAX_FORMER
    assert (lineage.rank("i1"), lineage.rank("i2"), lineage.rank(f"i{MAX_FORMER + 1}")) == (-1, 0, MAX_FORMER - 1)


@pytest.mark.parametrize("policy", [None, ("async", {})])
def test_a_policy_comes_back_as_a_pair(policy: Any) -> None:
    assert through_a_file(Books(policy=policy)).policy == policy
