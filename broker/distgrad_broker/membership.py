"""Workers come and go: leases, what the policy is told of it, and whether there is room for one more.

What the policy must hold grows with the number of workers under some policies: who would make it exceed the budget is
refused when it comes (PROTOCOL 10).
"""

from __future__ import annotations

import logging

from distgrad.durable.books import LIVE
from distgrad.durable.records import Records
from distgrad_broker import pulls, sharing
from distgrad_broker.members import Member
from distgrad_broker.requests import RequestError
from distgrad_broker.sessions import parse_session, superseded
from distgrad_broker.settling import rebalance
from distgrad_broker.state import CoreState
from distgrad_broker.updates import advance


def check_room(state: CoreState, worker: str) -> None:
    """Refuse a worker with whom the policy would have to hold too much, or who could never have room for a gradient.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    worker : str
        Its id.

    Raises
    ------
    RequestError
        ``too_large``, with the budget that would do.
    """
    member = state.members.get(worker)
    if (member is not None and member.state == LIVE) or state.versions.layout is None:
        return
    budget, one = state.check_budget(state.versions.layout.gradient_bytes, workers=len(state.members.live_ids) + 1)
    named, others, among = state.policy.places()
    least = (len(named) + others + 1) * one
    members = named if among is None else among
    if members and (not others or among is not None) and worker not in members and least > budget:
        raise RequestError(
            "too_large",
            f"{worker!r:.80} is none of the workers of {state.policy.name}, and --queue-bytes {budget} has no room for "
            f"another's gradient: start it under the id of one of them, or raise it to at least {least}",
        )


def came(state: CoreState, member: Member, now: float) -> None:
    """Note that a worker has joined, or is back after its lease had ended.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Who; live again.
    now : float
        Seconds on the shell's clock.
    """
    state.policy.joined(member.worker, state.situation(now))
    _look_again(state, now)


def went(state: CoreState, member: Member, now: float, *, left: bool) -> None:
    """Note that a worker is gone, after its grant was withdrawn; `rebalance` afterwards.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Who; not live any more.
    now : float
        Seconds on the shell's clock.
    left : bool
        Whether it said goodbye.
    """
    state.policy.departed(member.worker, left=left)
    _look_again(state, now)


def note_session(records: Records, member: Member) -> None:
    """Note the session that a member was just issued for the journal (PROTOCOL 5).

    Parameters
    ----------
    records : Records
        Where to.
    member : Member
        Whose.
    """
    issued = parse_session(member.session)
    assert issued is not None  # it is one of ours
    records.add(
        "session",
        worker=member.worker,
        user=member.user,
        generated=member.generated,
        incarnation=issued[0],
        counter=issued[1],
        nonce=member.nonce,
        nonces=list(member.past_nonces),
    )


def expire_leases(state: CoreState, now: float) -> None:
    """End the leases that ran out (PROTOCOL 20).

    Parameters
    ----------
    state : CoreState
        The core's memory.
    now : float
        Seconds on the shell's clock.
    """
    lapsed = state.members.expire(now, state.busy_s)
    for member in lapsed:
        state.grants.withdraw(member)
        sharing.forget(state, member)
        if state.records is not None:
            state.records.add("silent", worker=member.worker)
        state.log(logging.WARNING, "worker silent", worker=member.worker, accepted=member.accepted)
    for member in lapsed:
        went(state, member, now, left=False)
    if lapsed:
        rebalance(state)


def evict(state: CoreState, member: Member, now: float) -> None:
    """End a worker's process: it is fenced, its lease ends, and what was accepted from it still counts.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Who; its id may be used by a new process.
    now : float
        Seconds on the shell's clock.
    """
    was_live, late = member.state == LIVE, member.waiting
    state.members.evict(member)
    if late is not None:
        state.fail(late, RequestError("fenced", superseded(member.worker)))
    state.grants.withdraw(member)
    sharing.forget(state, member)
    if state.records is not None:
        note_session(state.records, member)
        state.records.add("silent", worker=member.worker)
    state.log(logging.WARNING, "worker evicted", worker=member.worker, accepted=member.accepted)
    if was_live:
        went(state, member, now, left=False)
    rebalance(state)


def _look_again(state: CoreState, now: float) -> None:
    """See what waited for this worker alone."""
    advance(state, now)
    if state.pulls and state.policy.gates_pulls:
        pulls.answer_all(state, now)
