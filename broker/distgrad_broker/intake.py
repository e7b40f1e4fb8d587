"""A gradient comes in: it is accepted into the queue, or dropped as if it had never come (PROTOCOL 4, 7, 9).

Every gradient takes this path; it makes no object and builds no reply unless somebody waits for one.
"""

from __future__ import annotations

from distgrad.durable.books import LIVE
from distgrad.wire import Gradient
from distgrad_broker import leasing, pulls
from distgrad_broker.members import Member
from distgrad_broker.settling import answer_heartbeat, end_vain_repetition, use_up_ahead
from distgrad_broker.shared_slots import is_known
from distgrad_broker.state import CoreState


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
    if number <= member.accepted:
        member.repeated += 1
        state.dropped["repeated"] += 1
        return
    if not is_known(gradient):
        _miss(state, member, "slot", now)
        return
    if state.is_closing or state.is_destroyed:
        # Before a gap is looked for: whoever sends again at once would soon give up, and its numbers come to nothing.
        member.dropped += 1
        state.dropped["closing"] += 1
        return
    if number != member.accepted + 1:
        if member.is_early:
            state.dropped["early"] += 1  # as the one before it
            return
        _miss(state, member, "gap", now)
        return
    member.is_early = False
    if state.repeatable and _is_early(state, gradient) and not end_vain_repetition(state, member, now):
        member.is_early = True
        member.dropped += 1
        state.dropped["early"] += 1
        return
    if member.queued_bytes + gradient.charge > member.committed:
        _miss(state, member, "uncovered", now)
        return
    if member.ahead and number in member.ahead:
        # Decided on before a restart, ahead of those that were lost with it.
        member.accepted = number
        member.repeated += 1
        state.dropped["repeated"] += 1
        use_up_ahead(state, member)
        return
    member.accepted = number
    if state.leases:
        leasing.end(state, member.worker)
    member.queued_bytes += gradient.charge
    member.received_bytes += gradient.size
    if gradient.cursor is not None:
        member.cursor = gradient.cursor
    state.queued_bytes += gradient.charge
    state.received_bytes += gradient.size
    state.queue.append(gradient)
    if state.records is not None:
        state.records.gradient(gradient)
    if gradient.asks is not None:
        pulls.ask_again(state, member, gradient, now)


def _is_early(state: CoreState, gradient: Gradient) -> bool:
    """Tell whether a gradient was computed on a version that a crash took back, and that has not come again yet.

    It is not held: what is held has grants, and those who are missing in the step that comes first may need them.
    """
    base = gradient.base
    return (
        base is not None
        and base.generation == state.generation
        and base.version > state.versions.version
        and base.incarnation in state.repeatable
    )


def _miss(state: CoreState, member: Member, reason: str, now: float) -> None:
    """Note that a number is missing, once for each attempt, and tell the worker at once."""
    member.dropped += 1
    state.dropped[reason] += 1
    if not member.missing:
        member.missing = True
        if member.state == LIVE:
            answer_heartbeat(state, member)
