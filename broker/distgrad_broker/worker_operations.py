"""The operations of workers: `hello`, `heartbeat` and `leave`."""

from __future__ import annotations

import logging
from typing import Any

from distgrad.durable.books import LIVE
from distgrad.wire import MAX_ID_CHARACTERS, field
from distgrad_broker import checkpoints, leasing, membership, settling, sharing, updates
from distgrad_broker.callers import member_of
from distgrad_broker.core_settings import CHECKPOINT
from distgrad_broker.events import RequestReceived
from distgrad_broker.members import Member
from distgrad_broker.requests import RequestError
from distgrad_broker.sessions import superseded
from distgrad_broker.state import CoreState
from distgrad_broker.waiting import Waiter

MAX_HEARTBEAT_WAIT_S = 0.05


def hello(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Issue a session to a worker's process (PROTOCOL 4-6).

    Parameters
    ----------
    state : CoreState
        The core's memory.
    request : RequestReceived
        As it came.
    waiter : Waiter
        To answer.
    now : float
        Seconds on the shell's clock.

    Raises
    ------
    RequestError
        If the worker is not taken: ``fenced``, ``forbidden``, ``too_many_workers``, ``history_lost``, …
    MalformedMessage
        If a key is missing or has an impossible value.
    """
    header = request.header
    worker: str = field(header, "worker", str)
    nonce: bytes = field(header, "nonce", bytes)
    lowest: int = field(header, "lowest", int, 0, low=0)
    previous: str | None = field(header, "session", str, None)
    generated: bool = field(header, "generated", bool, False)
    if not 0 < len(worker) <= MAX_ID_CHARACTERS or not worker.isprintable():
        raise RequestError("invalid", f"a worker id has 1 to {MAX_ID_CHARACTERS} printable characters")
    if not 8 <= len(nonce) <= 64:
        raise RequestError("invalid", f"a nonce has 8 to 64 bytes, got {len(nonce)}")
    if state.is_closing:
        raise RequestError("failed", "the broker is shutting down")
    membership.check_room(state, worker)
    former = state.members.get(worker)
    former_session, late = ("", None) if former is None else (former.session, former.waiting)
    member, is_new = state.members.greet(worker, nonce, previous, request.user, generated)
    if late is not None and member.session != former_session:
        state.fail(late, RequestError("fenced", superseded(worker)))
    is_new_session = member.session != former_session
    if is_new_session:
        sharing.forget(state, member)
    if is_new_session and state.records is not None:
        if state.durability == CHECKPOINT:
            updates.forget_undecided(state, member)
        membership.note_session(state.records, member)
    if lowest > member.accepted + 1 and state.records is not None:
        raise RequestError(
            "history_lost",
            f"{worker!r:.80} had gradients up to {lowest - 1} settled, but the data folder knows of {member.accepted}: "
            "it is not the one that they were settled in, or was taken back to an older version",
        )
    if is_new_session and state.records is None and (lowest > member.accepted + 1 or (lowest and member.origin)):
        # Nothing was kept on disk: what an earlier incarnation settled is known to the worker alone. What came before
        # it under its id since the restart can only be from a process that it had superseded.
        _adopt(state, member, lowest - 1, now)
    elif lowest > member.accepted + 1:
        raise RequestError(
            "invalid", f"the window begins at {lowest}, but number {member.accepted + 1} of {worker!r:.80} never came"
        )
    was_silent = state.members.renew(member, now, state.busy_s)
    if was_silent and not is_new_session and state.records is not None:
        state.records.add("back", worker=worker)
    settling.rebalance(state)
    if is_new or was_silent:
        membership.came(state, member, now)
        state.log(logging.INFO, "worker joined" if is_new else "worker is back", worker=worker, session=member.session)
    layout = state.versions.layout
    fields = {
        "session": member.session,
        "accepted": member.accepted,
        "settled": member.settled,
        "queued": member.queued_bytes,
        "adopted": member.adopted,
        "kept": None if state.settings.data is None else member.adopted_behind if member.adopted else member.accepted,
        "cursor": member.cursor,
        "gradients": state.settings.gradients,
        "host": state.settings.host,
        "lane": state.settings.lane,
        "lease_s": state.members.lease_s,
        "queue_bytes": state.grants.budget_bytes,
        "grant": member.promised,
        "grant_seq": member.grant_seq,
        "durability": state.durability,
    }
    frames = [] if layout is None else [layout.to_frame()]
    if (
        state.durability == CHECKPOINT
        and previous != member.session
        and max(member.settled, member.kept) < member.accepted
    ):
        # Its predecessor's gradients: what it is told of them must not be taken back. Those that are kept will not be.
        checkpoints.when_written(
            state, waiter, lambda error: _end_hello(state, waiter, fields, frames, error, now), now
        )
        return
    state.answer_when_durable(waiter, fields, frames, now=now)


def _end_hello(
    state: CoreState, waiter: Waiter, fields: dict[str, Any], frames: list[bytes], error: str | None, now: float
) -> None:
    if error is None:
        state.answer_when_durable(waiter, fields, frames, now=now)
    else:
        state.fail(waiter, RequestError("failed", f"what was done before is not on the disk yet: {error}"))


def heartbeat(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Renew a lease, take in what the worker says of its window, and tell what is settled (PROTOCOL 8-11).

    Parameters
    ----------
    state : CoreState
        The core's memory.
    request : RequestReceived
        As it came.
    waiter : Waiter
        To answer.
    now : float
        Seconds on the shell's clock.

    Raises
    ------
    RequestError
        If the session is not the current one: ``unknown_worker``, ``fenced``, ``forbidden``.
    MalformedMessage
        If a key is missing or has an impossible value.
    """
    header = request.header
    member = member_of(state, request)
    attempt: int = field(header, "attempt", int, low=1)
    sent: int = field(header, "sent", int, low=0)
    settled: int = field(header, "settled", int, low=0)
    grant_seq: int = field(header, "grant_seq", int, low=0)
    held: int = field(header, "held", int, low=0)
    want: int = field(header, "want", int, 0, low=0)
    until: int = field(header, "until", int, 0, low=0)
    wait_s = min(field(header, "wait_s", float, 0.0, low=0), MAX_HEARTBEAT_WAIT_S)
    knows = header.get("fingerprint")
    membership.check_room(state, member.worker)
    if attempt > member.attempt:
        member.attempt = attempt
        member.missing = False
    is_back = state.members.renew(member, now, state.busy_s)
    if is_back:
        state.log(logging.INFO, "worker is back", worker=member.worker, session=member.session)
    if state.leases:
        leasing.renew(state, member.worker, now)
    member.sent, member.known = sent, settled
    while member.refusals and member.refusals[0][0] <= settled:
        member.refusals.popleft()
    member.waiting = None  # a newer heartbeat replaces one that still waits
    has_news = state.grants.echo(member, grant_seq, held, want, sent)
    if has_news or is_back or state.grants.have_changed(state.policy.places()):
        settling.rebalance(state)
    if is_back:
        membership.came(state, member, now)
        if state.records is not None:
            state.records.add("back", worker=member.worker)
    if state.durability == CHECKPOINT and state.unsettled:
        checkpoints.want(state, is_urgent=bool(want) or settled < until <= member.decided)
    if state.held and until > member.settled:
        state.policy.awaited(member.worker, state.situation(now))
    is_news = (
        member.missing
        or member.grant_seq != grant_seq
        or bool(member.refusals)
        or knows != state.fingerprint
        or (until and member.settled >= until)
    )
    if is_news or wait_s <= 0:
        state.answer(waiter, settling.heartbeat_fields(state, member))
        return
    waiter.deadline = now + wait_s
    waiter.data = settling.HeartbeatWait(until or 2**63, max(1, member.committed // 4))
    member.waiting = waiter

    def give_up(late: Waiter, _: float) -> None:
        if member.waiting is late:
            settling.answer_heartbeat(state, member)
        else:
            late.is_done = True

    state.deadlines.wait(waiter, give_up)


def leave(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Let a worker go that has nothing unsettled (PROTOCOL 16).

    Parameters
    ----------
    state : CoreState
        The core's memory.
    request : RequestReceived
        As it came.
    waiter : Waiter
        To answer.
    now : float
        Seconds on the shell's clock.

    Raises
    ------
    RequestError
        If the session is not the current one, or something is unsettled.
    MalformedMessage
        If a key is missing or has an impossible value.
    """
    member = member_of(state, request)
    if member.queued_bytes or member.settled != member.accepted:
        raise RequestError("invalid", f"{member.accepted - member.settled} gradient(s) are not settled; flush first")
    sharing.forget(state, member)
    state.grants.withdraw(member)
    state.members.leave(member)
    membership.went(state, member, now, left=True)
    settling.rebalance(state)  # only now: its place, too, is free
    state.log(logging.INFO, "worker left", worker=member.worker, settled=member.settled)
    if state.records is not None:
        state.records.add("left", worker=member.worker)
    state.answer_when_durable(waiter, {}, now=now)


def _adopt(state: CoreState, member: Member, settled: int, now: float) -> None:
    """Go on with the numbers of a process that knew an earlier incarnation (PROTOCOL 6)."""
    if settled != member.accepted:
        member.adopted_behind = member.decided
        updates.drop_queued(state, member)
        member.accepted = member.decided = member.settled = settled
        member.adopted = True
        if member.state == LIVE:
            state.policy.joined(member.worker, state.situation(now))  # its numbers mean something else now
