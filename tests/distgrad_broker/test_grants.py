"""The budget is never exceeded, and nobody waits for ever."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad.durable.books import LIVE, SILENT
from distgrad.policies import Places
from distgrad_broker.grants import Grants
from distgrad_broker.members import Member


def people(count: int) -> list[Member]:
    return [Member(f"w{index}", None, False) for index in range(count)]


def test_room_for_all_is_shared_equally() -> None:
    grants, table = Grants(9000), people(3)
    grants.resize(9000, 2000)  # too large for a reserve: a fourth share has not room for two

    assert grants.rebalance(table) == table
    assert [member.promised for member in table] == [3000] * 3
    assert grants.committed_bytes(table) == 9000
    assert not grants.uses_turns


def test_where_there_is_plenty_one_more_share_is_kept_in_reserve() -> None:
    for budget, share in ((8192, 2048), (8191, 2730)):  # room for two gradients in each of four shares, or just not
        grants, table = Grants(budget), people(3)
        grants.resize(budget, 1024)
        grants.rebalance(table)

        assert [member.promised for member in table] == [share] * 3


def test_a_newcomer_gets_room_at_once_although_the_other_never_echoes() -> None:
    grants, table = Grants(12_000), people(2)
    grants.resize(12_000, 1024)
    grants.rebalance(table[:1])
    assert table[0].committed == 6000

    assert grants.rebalance(table) == table

    assert [member.promised for member in table] == [4000, 4000]
    assert [member.committed for member in table] == [6000, 4000]
    assert not grants.uses_turns


def test_without_a_reserve_a_newcomer_gets_its_share_only_when_the_others_have_echoed_theirs() -> None:
    grants, table = Grants(7999), people(2)
    grants.resize(7999, 2000)
    grants.rebalance(table[:1])

    grants.rebalance(table)
    assert [member.committed for member in table] == [7999, 0]
    first = table[0]
    first.queued_bytes = 2000
    grants.echo(first, first.grant_seq - 1, held=0, want=0, sent=0)
    assert first.committed == 7999, "an echo of an older grant says nothing"
    grants.echo(first, first.grant_seq, held=5999, want=0, sent=0)
    grants.rebalance(table)

    assert [member.committed for member in table] == [5999, 2000]
    assert [member.promised for member in table] == [3999, 2000]


def test_a_worker_cannot_grant_itself_anything() -> None:
    grants, table = Grants(12_000), people(2)
    grants.resize(12_000, 1024)
    grants.rebalance(table)

    grants.echo(table[0], table[0].grant_seq, held=2**62, want=0, sent=0)

    assert table[0].committed == 4000


def test_what_is_queued_stays_covered_whatever_its_worker_says() -> None:
    grants, table = Grants(8000), people(1)
    grants.resize(8000, 1024)
    grants.rebalance(table)
    (member,) = table
    member.queued_bytes = 5000
    grants.withdraw(member)
    assert (member.promised, member.committed) == (0, 5000)

    grants.echo(member, member.grant_seq, held=0, want=0, sent=0)

    assert member.committed == 5000


def want(grants: Grants, member: Member, sent: int = 0) -> None:
    grants.echo(member, member.grant_seq, member.promised, 1024, sent)


def test_turns_are_served_in_the_order_in_which_they_were_asked_for() -> None:
    grants, table = Grants(2048), people(4)
    grants.resize(2048, 1024)
    grants.rebalance(table)
    assert grants.uses_turns
    for index in (2, 0, 3):
        want(grants, table[index])
        grants.rebalance(table)
    assert [member.promised for member in table] == [1024, 0, 1024, 0]
    assert grants.waiting_for_turn == 1

    table[0].queued_bytes = 1024
    table[0].queued_bytes = 0
    assert grants.settle(table[0])
    grants.echo(table[0], table[0].grant_seq, held=0, want=1024, sent=1)
    grants.rebalance(table)

    assert [member.promised for member in table] == [0, 0, 1024, 1024]
    assert grants.waiting_for_turn == 1


def test_waiting_for_a_turn_is_news_once() -> None:
    grants, table = Grants(1024), people(2)
    grants.resize(1024, 1024)
    grants.rebalance(table)
    for member in table:
        assert grants.echo(member, member.grant_seq, held=0, want=1024, sent=0)
        grants.rebalance(table)
    assert table[1].promised == 0

    assert not grants.echo(table[1], table[1].grant_seq, held=0, want=1024, sent=0)
    grants.rebalance(table, Places({"w1"}, 0))
    assert grants.echo(table[1], table[1].grant_seq, held=0, want=1024, sent=0), "unless places are kept"


def test_a_turn_that_is_not_used_goes_back() -> None:
    grants, table = Grants(1024), people(2)
    grants.resize(1024, 1024)
    grants.rebalance(table)
    want(grants, table[0])
    want(grants, table[1])
    grants.rebalance(table)
    assert table[0].promised == 1024

    grants.echo(table[0], table[0].grant_seq, held=1024, want=0, sent=0)  # the push was interrupted
    grants.echo(table[0], table[0].grant_seq, held=0, want=0, sent=0)  # and this is known
    grants.rebalance(table)

    assert table[1].promised == 1024


def test_whoever_no_longer_wants_a_turn_leaves_the_line() -> None:
    grants, table = Grants(1024), people(3)
    grants.resize(1024, 1024)
    grants.rebalance(table)
    for member in table:
        want(grants, member)
    grants.rebalance(table)
    assert grants.waiting_for_turn == 2

    grants.echo(table[1], table[1].grant_seq, held=0, want=0, sent=0)

    assert grants.waiting_for_turn == 1


def test_who_lost_its_lease_leaves_the_line_and_gives_its_turn_back() -> None:
    grants, table = Grants(1024), people(3)
    grants.resize(1024, 1024)
    grants.rebalance(table)
    for member in table:
        want(grants, member)
    grants.rebalance(table)

    for member in table[:2]:
        member.state = SILENT
        grants.withdraw(member)
    grants.resize(1024, 600)
    grants.resize(1024, 1024)
    grants.rebalance(table)

    assert [member.promised for member in table] == [0, 0, 1024]


def test_what_a_silent_worker_has_queued_is_given_back_as_it_is_settled() -> None:
    grants, table = Grants(4096), people(1)
    grants.resize(4096, 1024)
    grants.rebalance(table)
    (member,) = table
    member.queued_bytes = 2048
    member.state = SILENT
    grants.withdraw(member)

    member.queued_bytes = 1024

    assert grants.settle(member)
    assert member.committed == 1024


def test_a_turn_for_smaller_gradients_is_taken_back_when_gradients_grow() -> None:
    """Regression: it was too small for its holder, and kept from all others for ever."""
    grants, table = Grants(2100), people(3)
    grants.resize(2100, 1024)
    grants.rebalance(table)
    want(grants, table[0])
    grants.rebalance(table)
    assert table[0].promised == 1024

    grants.resize(2100, 2000)
    grants.rebalance(table)
    grants.echo(table[0], table[0].grant_seq, held=0, want=2000, sent=0)
    grants.rebalance(table)

    assert table[0].promised == 2000


def test_turns_become_shares_again_when_workers_leave() -> None:
    grants, table = Grants(2048), people(3)
    grants.resize(2048, 1024)
    grants.rebalance(table)
    want(grants, table[0])
    grants.rebalance(table)

    grants.withdraw(table[2])
    table[2].state = SILENT
    grants.rebalance(table)

    assert not grants.uses_turns
    assert [member.promised for member in table] == [1024, 1024, 0]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["echo", "old echo", "fill", "settle", "silence", "return", "resize"]),
        st.integers(0, 3),
        st.integers(0, 5000),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([1024, 2500, 4096, 100_000]), ACTIONS)
def test_commitments_stay_within_the_budget_and_cover_what_is_queued(
    budget: int, actions: list[tuple[str, int, int]]
) -> None:
    grants, table = Grants(budget), people(4)
    grants.resize(budget, 1024)
    grants.rebalance(table)
    for action, who, amount in actions:
        member = table[who]
        if action in ("echo", "old echo"):
            member.state = LIVE  # who says something is back, before it is listened to
        if action == "echo":
            grants.echo(member, member.grant_seq, amount, amount % 2 * 1024, amount % 3)
        elif action == "old echo":
            grants.echo(member, member.grant_seq - 1, amount, 1024, 0)
        elif action == "fill":
            member.queued_bytes += min(1024, member.committed - member.queued_bytes)
        elif action == "settle" and member.queued_bytes:
            member.queued_bytes = 0
            grants.settle(member)
        elif action == "silence":
            member.state = SILENT
            grants.withdraw(member)
        elif action == "return":
            member.state = LIVE
        elif action == "resize":
            grants.resize(budget, 1024 if amount % 2 else min(budget, 2000))
        grants.rebalance(table)

        assert grants.committed_bytes(table) <= budget
        assert all(max(m.queued_bytes, m.promised) <= m.committed for m in table)
