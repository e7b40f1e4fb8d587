"""A gradient's life in the core: accept or drop, judge, apply, settle, and tell its worker.

This is the path that every gradient takes; it makes no object and builds no reply unless somebody waits for one.
"""

from __future__ import annotations

import logging
from collections import deque
from itertools import islice
from typing import Any

from distgrad.errors import GradientRefused
from distgrad.wire import Gradient
from distgrad_broker import pulls
from distgrad_broker.members import LIVE, Member
from distgrad_broker.policy import Verdict
from distgrad_broker.state import CoreState, Waiter

# A header holds 64 KiB, and a leaf's path may be long: this many refusals are told at a time, each cut to this length.
REFUSALS_A_REPLY = 16
MAX_REFUSAL_CHARACTERS = 400
# What peers sum up must still fit in a header's integers.
MAX_COUNT = 2**63 - 1


def accept(state: CoreState, gradient: Gradient, now: float) -> None:
    """Take a gradient into the queue if it is the next of its worker, else drop it (PROTOCOL 4, 7, 9).

    Parameters
    ----------
    state : CoreState
        The core's memory.
    gradient : Gradient
        From the wire; its header was checked, its payload was not.
    now : float
        Seconds on the shell's clock.
    """
    member = state.members.get(gradient.worker)
    if member is None:
        state.dropped["unknown_worker"] += 1
        return
    if gradient.session != member.session or gradient.user != member.user:
        state.dropped["fenced"] += 1
        return
    if gradient.attempt != member.attempt:
        if gradient.attempt < member.attempt:
            member.dropped += 1
            state.dropped["old_attempt"] += 1
            return
        member.attempt = gradient.attempt
        member.missing = False
    number = gradient.number
    if number != member.accepted + 1:
        if number <= member.accepted:
            member.repeated += 1
            state.dropped["repeated"] += 1
        else:
            _miss(state, member, "gap", now)
        return
    if state.is_closing or state.is_destroyed:
        member.dropped += 1
        state.dropped["closing"] += 1
        return
    if member.queued_bytes + gradient.charge > member.committed:
        _miss(state, member, "uncovered", now)
        return
    member.accepted = number
    member.queued_bytes += gradient.charge
    member.received_bytes += gradient.size
    if gradient.cursor is not None:
        member.cursor = gradient.cursor
    state.queued_bytes += gradient.charge
    state.queue.append(gradient)


def has_work(state: CoreState) -> bool:
    """Tell whether a gradient can be settled now.

    Parameters
    ----------
    state : CoreState
        The core's memory.

    Returns
    -------
    bool
        Whether `work` would do something.
    """
    return bool(state.queue) and (state.is_running or state.drain_left > 0) and state.versions.layout is not None


def work(state: CoreState, now: float, limit: int = 1) -> None:
    """Settle gradients at the head of the queue, until somebody must be told of one.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    now : float
        Seconds on the shell's clock.
    limit : int
        How many at most.
    """
    while limit > 0 and not state.effects and has_work(state):
        limit -= 1
        gradient = state.queue.popleft()
        member = state.members.get(gradient.worker)
        assert member is not None  # a member with something queued is never forgotten
        _judge(state, gradient, member, now)
        if state.drain_left:
            state.drain_left -= 1
            if not state.drain_left:
                end_drain(state)


def _judge(state: CoreState, gradient: Gradient, member: Member, now: float) -> None:
    """Do with one gradient what the policy says."""
    staleness: int | None = None
    base = gradient.base
    if base is not None and base.generation == state.generation and base.incarnation == state.incarnation:
        staleness = state.versions.version - base.version
    if state.policy.judge(gradient, staleness) is Verdict.SUPERSEDE:
        member.superseded += 1
        settle(state, gradient, member, "superseded", now)
        return
    try:
        state.versions.apply(gradient)
    except GradientRefused as refusal:
        _refuse(state, gradient, member, refusal)
        settle(state, gradient, member, "refused", now)
        return
    member.applied += 1
    member.examples = min(member.examples + gradient.examples, MAX_COUNT)
    if gradient.loss is not None:
        member.loss = gradient.loss
    if staleness is not None and staleness > 0:
        member.staleness_sum += staleness
        if staleness > member.staleness_max:
            member.staleness_max = staleness
    settle(state, gradient, member, "applied", now)
    if state.pulls:
        pulls.answer_all(state, now)


def settle(state: CoreState, gradient: Gradient, member: Member, outcome: str, now: float) -> None:
    """Note what became of a gradient; the one place where a number is used up.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    gradient : Gradient
        Taken from the queue.
    member : Member
        Whose it was.
    outcome : str
        ``applied``, ``superseded``, ``refused`` or ``cleared``.
    now : float
        Seconds on the shell's clock.
    """
    assert gradient.number == member.settled + 1  # order of a worker is order of acceptance is order of settling
    member.settled = gradient.number
    member.queued_bytes -= gradient.charge
    state.queued_bytes -= gradient.charge
    state.outcomes[outcome] += 1
    if state.grants.settle(member):
        rebalance(state)
    waiter = member.waiting
    if waiter is not None:
        waiter.data.left_bytes -= gradient.charge
        if outcome == "refused" or member.settled >= waiter.data.until or waiter.data.left_bytes <= 0:
            answer_heartbeat(state, member)


class HeartbeatWait:
    """What a waiting heartbeat is to be answered for.

    Parameters
    ----------
    until : int
        The number whose settling somebody waits for.
    left_bytes : int
        How much is settled at most before the worker hears of it, so that it can send more.
    """

    __slots__ = ("left_bytes", "until")

    def __init__(self, until: int, left_bytes: int) -> None:
        self.until = until
        self.left_bytes = left_bytes


def heartbeat_fields(member: Member) -> dict[str, Any]:
    """Build the keys of a heartbeat's reply.

    Parameters
    ----------
    member : Member
        Who asked.

    Returns
    -------
    dict
        As in ``docs/wire.md``.
    """
    # What is told as settled is forgotten here, so no further than to where the refusals are told as well.
    untold = member.refusals[REFUSALS_A_REPLY][0] if len(member.refusals) > REFUSALS_A_REPLY else 0
    return {
        "accepted": member.accepted,
        "settled": untold - 1 if untold else member.settled,
        "attempt": member.attempt,
        "resend": member.missing,
        "grant": member.promised,
        "grant_seq": member.grant_seq,
        "refused": [list(refusal) for refusal in islice(member.refusals, REFUSALS_A_REPLY)],
    }


def answer_heartbeat(state: CoreState, member: Member) -> None:
    """Answer the member's waiting heartbeat, if there is one.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Who waits.
    """
    waiter: Waiter | None = member.waiting
    if waiter is not None:
        member.waiting = None
        state.answer(waiter, heartbeat_fields(member))


def rebalance(state: CoreState) -> None:
    """Give out free grants and tell those whose grant changed.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    """
    for member in state.grants.rebalance(state.members):
        answer_heartbeat(state, member)


def clear_queue(state: CoreState, now: float) -> int:
    """Settle as cleared all that is accepted at this moment.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    now : float
        Seconds on the shell's clock.

    Returns
    -------
    int
        How many there were.
    """
    cleared = len(state.queue)
    for _ in range(cleared):
        gradient = state.queue.popleft()
        member = state.members.get(gradient.worker)
        assert member is not None  # a member with something queued is never forgotten
        member.cleared += 1
        settle(state, gradient, member, "cleared", now)
    end_drain(state)
    return cleared


def drop_queued(state: CoreState, member: Member, now: float) -> None:
    """Settle as superseded what one member has in the queue.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Whose numbers begin anew elsewhere.
    now : float
        Seconds on the shell's clock.
    """
    if member.settled == member.accepted:
        return
    draining = state.drain_left
    for place, gradient in enumerate(state.queue):
        if gradient.worker == member.worker:
            state.drain_left -= place < draining
            member.superseded += 1
            settle(state, gradient, member, "superseded", now)
    state.queue = deque(gradient for gradient in state.queue if gradient.worker != member.worker)
    if draining and not state.drain_left:
        end_drain(state)


def end_drain(state: CoreState) -> None:
    """Tell those who wait for a draining stop that it is done.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    """
    state.drain_left = 0
    waiters = list(state.drains.values())
    state.drains.clear()
    for waiter in waiters:
        state.answer(waiter, {"changed": waiter.data, "drained": True})


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
        state.log(logging.WARNING, "worker silent", worker=member.worker, accepted=member.accepted)
    if lapsed:
        rebalance(state)


def _miss(state: CoreState, member: Member, reason: str, now: float) -> None:
    """Note that a number is missing, once for each attempt, and tell the worker at once."""
    member.dropped += 1
    state.dropped[reason] += 1
    if not member.missing:
        member.missing = True
        if member.state == LIVE:
            answer_heartbeat(state, member)


def _refuse(state: CoreState, gradient: Gradient, member: Member, refusal: GradientRefused) -> None:
    member.refused += 1
    state.refused[refusal.reason] += 1
    leaf = None if refusal.leaf is None else refusal.leaf[:MAX_REFUSAL_CHARACTERS]
    member.refusals.append((gradient.number, refusal.reason, leaf, refusal.message[:MAX_REFUSAL_CHARACTERS]))
    if member.refused == 1:
        state.log(
            logging.WARNING,
            "gradient refused",
            worker=member.worker,
            number=gradient.number,
            reason=refusal.reason,
            leaf=refusal.leaf,
        )
