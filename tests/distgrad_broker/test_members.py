"""Sessions, leases and who may come back."""

from __future__ import annotations

import pytest

from distgrad.durable.books import LEFT, LIVE, SILENT
from distgrad_broker.members import PAST_NONCES, Members, parse_session
from distgrad_broker.requests import RequestError

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
