"""Sessions, leases and who may come back."""

from __future__ import annotations

import pytest

from distgrad.durable.books import LEFT, LIVE, SILENT, Lineage
from distgrad.wire import State
from distgrad_broker.members import PAST_NONCES, Member, Members
from distgrad_broker.requests import RequestError
from distgrad_broker.sessions import parse_session

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def members(limit: int = 8) -> Members:
    return Members("two", limit, 30.0)


def test_the_same_process_gets_the_same_session() -> None:
    table = members()

    first, is_new = table.greet("w", A, None, None, False)
    session = first.session
    again, is_new_again = table.greet("w", A, session, None, False)

    assert (is_new, is_new_again) == (True, False)
    assert again is first
    assert again.session == session == "two:1"


def test_a_newer_process_supersedes_the_older_and_keeps_its_numbers() -> None:
    table = members()
    member, _ = table.greet("w", A, None, None, False)
    member.accepted, member.settled, member.attempt, member.missing = 7, 5, 3, True

    table.greet("w", B, None, None, False)

    assert member.session == "two:2"
    assert (member.accepted, member.settled) == (7, 5)
    assert (member.attempt, member.missing) == (0, False)
    with pytest.raises(RequestError, match="newer process") as caught:
        table.greet("w", A, "two:1", None, False)
    assert caught.value.code == "fenced"


def test_a_delayed_hello_of_a_superseded_process_is_fenced_although_it_names_no_session() -> None:
    table = members()
    nonces = [bytes([number]) * 16 for number in range(PAST_NONCES + 1)]
    for nonce in nonces:
        table.greet("w", nonce, None, None, False)

    for nonce in nonces[:-1]:
        with pytest.raises(RequestError, match="newer process"):
            table.greet("w", nonce, None, None, False)


def test_after_a_restart_the_older_of_two_sessions_is_fenced_whichever_comes_first() -> None:
    table = members()
    table.greet("w", B, "one:5", None, False)
    with pytest.raises(RequestError, match="newer process"):
        table.greet("w", A, "one:4", None, False)

    table = members()
    table.greet("w", A, "one:4", None, False)
    member, _ = table.greet("w", B, "one:5", None, False)
    assert member.nonce == B


def test_after_a_restart_a_process_from_before_does_not_supersede_one_that_came_after() -> None:
    table = members()
    table.greet("w", B, None, None, False)

    with pytest.raises(RequestError, match="newer process"):
        table.greet("w", A, "one:1", None, False)


def test_a_session_is_superseded_together_with_its_refusals() -> None:
    table = members()
    member, _ = table.greet("w", A, None, None, False)
    member.refusals.append((1, "layout", None, "of another layout"))

    table.greet("w", B, None, None, False)

    assert not member.refusals


def test_an_id_belongs_to_the_key_that_used_it_first() -> None:
    table = members()
    table.greet("w", A, None, "alice", False)

    with pytest.raises(RequestError, match="another key") as caught:
        table.greet("w", B, None, "mallory", False)
    assert caught.value.code == "forbidden"


def test_a_full_table_refuses_new_ids_only() -> None:
    table = members(limit=1)
    table.greet("w", A, None, None, False)

    with pytest.raises(RequestError, match="--max-workers") as caught:
        table.greet("v", B, None, None, False)
    assert caught.value.code == "too_many_workers"
    table.greet("w", C, None, None, False)


def test_a_generated_id_is_forgotten_when_it_leaves_and_a_chosen_one_is_kept() -> None:
    table = members()
    chosen, _ = table.greet("chosen", A, None, None, False)
    made, _ = table.greet("made", B, None, None, True)

    table.leave(chosen)
    table.leave(made)

    assert [member.worker for member in table] == ["chosen"]
    assert (chosen.state, chosen.session) == (LEFT, "")
    with pytest.raises(RequestError, match="newer process"):
        table.greet("chosen", A, None, None, False)  # its own hello, delayed
    assert table.greet("chosen", C, None, None, False) == (chosen, False)


def test_a_lease_does_not_count_the_time_in_which_the_loop_was_deaf() -> None:
    table = members()
    member, _ = table.greet("w", A, None, None, False)
    assert not table.renew(member, 100.0, 50.0)

    assert table.expire(145.0, 70.0) == []
    assert table.expire(150.0, 70.0) == [member]
    assert member.state == SILENT
    assert table.live() == []
    assert table.renew(member, 151.0, 70.0)
    assert member.state == LIVE
    assert table.expire(180.0, 70.0) == []


def test_who_is_silent_does_not_become_silent_again() -> None:
    table = members()
    member, _ = table.greet("w", A, None, None, False)
    table.renew(member, 0.0, 0.0)

    assert table.expire(31.0, 0.0) == [member]
    assert table.expire(62.0, 0.0) == []


@pytest.mark.parametrize(
    ("text", "session"),
    [
        ("one:12", ("one", 12)),
        (None, None),
        ("", None),
        ("one", None),
        ("one:", None),
        ("one:-1", None),
        ("one:\u0663", None),
        ("one:" + "9" * 19, None),
        (":1", ("", 1)),
    ],
)
def test_a_session_name_is_read_or_is_none(text: str | None, session: tuple[str, int] | None) -> None:
    assert parse_session(text) == session


def test_a_description_has_means_and_never_a_negative_age() -> None:
    member, _ = members().greet("w", A, None, "alice", False)
    member.applied, member.staleness_sum, member.last_seen = 4, 6, 10.0

    told = member.describe(9.0)

    assert (told["staleness_mean"], told["last_seen_s"], told["user"]) == (1.5, 0.0, "alice")


# With brokers before this one that are known


def recovered(origin: tuple[str, int] | None = ("one", 5), *, nonce: bytes = b"") -> Members:
    """Make a table of the third broker, with a member that the first one knew."""
    table = Members("three", 8, 30.0)
    table.lineage = Lineage([State("one", 0, 10), State("two", 0, 20)])
    member = Member("w", None, False)
    member.origin, member.nonce = origin, nonce
    table.add(member)
    return table


@pytest.mark.parametrize(
    ("stored", "presented", "is_fenced"),
    [
        (("one", 5), "one:5", False),  # the newest
        (("one", 5), "one:4", True),
        (("one", 5), "one:6", False),
        (("two", 1), "one:9", True),  # however high it counted
        (("two", 1), "two:1", False),
        (("one", 9), "two:1", False),  # issued, and lost with a crash
        (("one", 5), None, False),  # a new process
    ],
)
def test_a_session_of_any_earlier_broker_is_fenced_if_it_is_older_than_the_stored_one(
    stored: tuple[str, int], presented: str | None, is_fenced: bool
) -> None:
    table = recovered(stored)

    if is_fenced:
        with pytest.raises(RequestError, match="newer process"):
            table.greet("w", A, presented, None, False)
    else:
        member, is_new = table.greet("w", A, presented, None, False)
        assert (member.session, is_new) == ("three:1", False)


def test_who_came_in_is_the_one_that_others_are_compared_with() -> None:
    table = recovered(("one", 5))
    table.greet("w", A, "one:5", None, False)
    with pytest.raises(RequestError):
        table.greet("w", B, "one:4", None, False)

    table.greet("w", C, "two:1", None, False)

    with pytest.raises(RequestError):
        table.greet("w", A, "one:5", None, False)


def test_a_process_that_an_earlier_broker_knew_keeps_its_refusals_and_its_place() -> None:
    table = recovered(("two", 7), nonce=A)
    member = table.get("w")
    assert member is not None
    member.refusals.append((3, "not_finite", None, "nan"))

    table.greet("w", A, None, None, False)  # it never heard of its last session

    assert member.session == "three:1"
    assert [refusal[0] for refusal in member.refusals] == [3]
    with pytest.raises(RequestError):
        table.greet("w", B, "two:6", None, False)


def test_a_process_that_an_earlier_broker_knew_is_superseded_by_a_new_one_for_good() -> None:
    table = recovered(("two", 7), nonce=A)
    member = table.get("w")
    assert member is not None
    member.refusals.append((3, "not_finite", None, "nan"))

    table.greet("w", B, None, None, False)

    assert list(member.refusals) == []
    for session in (None, "two:7"):
        with pytest.raises(RequestError, match="newer process"):
            table.greet("w", A, session, None, False)


def test_a_member_put_back_counts_as_live_if_it_was() -> None:
    table = recovered()
    assert table.live_ids == {"w"}
    silent = Member("x", None, False)
    silent.state = SILENT

    table.add(silent)

    assert table.live_ids == {"w"}
    assert len(table) == 2


def test_a_goodbye_keeps_the_process_out_and_a_new_one_gets_in() -> None:
    table = recovered(("two", 7))
    member, _ = table.greet("w", A, "two:7", None, False)

    table.leave(member)

    with pytest.raises(RequestError, match="newer process"):
        table.greet("w", A, None, None, False)
    assert table.greet("w", B, None, None, False)[0].session == "three:2"
