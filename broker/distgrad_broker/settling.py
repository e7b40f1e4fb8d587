"""What became of a gradient, and telling its worker: the end of the way that `intake` begins.

A worker's numbers are *decided* on in its order. A policy may decide on a later number while an earlier one is held for
a step: what was decided then waits in `Member.ahead` until all before it is decided. Without a data folder what is
decided is *settled*; with one it is settled when the disk has it (PROTOCOL 2), and waits in `CoreState.unsettled`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

from distgrad.durable.replay import OUTCOMES
from distgrad.errors import GradientRefused
from distgrad.wire import ASK_S, Gradient
from distgrad_broker.members import Member
from distgrad_broker.state import CoreState
from distgrad_broker.waiting import Waiter

# A header holds 64 KiB, and a leaf's path may be long: this many refusals are told at a time, each cut to this length.
REFUSALS_A_REPLY = 16
MAX_REFUSAL_CHARACTERS = 400
# Heartbeats of all workers together where nobody waits: one takes a tenth of a millisecond on each side.
ASKS_A_SECOND = 500
# What peers sum up must still fit in a header's integers.
MAX_COUNT = 2**63 - 1


def settle(
    state: CoreState, gradient: Gradient, member: Member, outcome: str, refusal: GradientRefused | None = None
) -> None:
    """Note what became of a gradient, once all of its worker before it is decided on.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    gradient : Gradient
        In no queue any more.
    member : Member
        Whose it was.
    outcome : str
        ``applied``, ``superseded``, ``refused`` or ``cleared``.
    refusal : GradientRefused, optional
        Why it was refused.
    """
    records = state.records
    if records is not None and outcome != "applied":  # that is noted by the step, with its weights
        decision: list[Any] = [OUTCOMES.index(outcome), gradient.worker, gradient.number]
        records.decided(decision if refusal is None else decision + refusal_values(refusal), state.versions.version)
    state.outcomes[outcome] += 1
    if refusal is not None:
        _count_refusal(state, member, gradient.number, refusal)
    if gradient.number != member.decided + 1:
        member.ahead[gradient.number] = (gradient.charge, outcome, refusal, gradient.cursor)
        return
    _use_up(state, member, gradient.charge, outcome, refusal, gradient.cursor)
    if member.ahead:
        use_up_ahead(state, member)


def settle_applied(state: CoreState, gradients: Sequence[Gradient], member: Member) -> None:
    """Note that a member's next gradients were applied, where nothing has to wait: no disk, no earlier number.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    gradients : sequence of Gradient
        In no queue any more; at least one.
    member : Member
        Whose they were.
    """
    count = len(gradients)
    state.outcomes["applied"] += count
    member.decided += count
    for gradient in gradients:
        if gradient.cursor is not None:
            member.decided_cursor = gradient.cursor
    _settle(state, member, sum([gradient.charge for gradient in gradients]), None, count)


def note_staleness(state: CoreState, member: Member, staleness: int, count: int = 1) -> None:
    """Count how stale a gradient was, or several that were computed on the same version.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Whose it was.
    staleness : int
        Updates between its base and the version that it was applied to; of several, the first one's. The others follow.
    count : int
        How many.
    """
    for one in range(staleness, staleness + count):
        state.staleness[one.bit_length()] += 1
    total = count * staleness + count * (count - 1) // 2
    last = staleness + count - 1
    state.staleness_sum += total
    member.staleness = last
    member.staleness_sum += total
    if last > member.staleness_max:
        member.staleness_max = last


def use_up_ahead(state: CoreState, member: Member) -> None:
    """Give those numbers their turn that were decided on before one ahead of them.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Whose.
    """
    # Not beyond what is accepted: after a restart it may have to come once more.
    while member.decided < member.accepted:
        following = member.ahead.pop(member.decided + 1, None)
        if following is None:
            return
        _use_up(state, member, *following)


def refusal_values(refusal: GradientRefused) -> list[Any]:
    """Give what is kept and told of a refusal.

    Parameters
    ----------
    refusal : GradientRefused
        Why.

    Returns
    -------
    list
        Reason, leaf and message, of bounded length.
    """
    leaf = None if refusal.leaf is None else refusal.leaf[:MAX_REFUSAL_CHARACTERS]
    return [refusal.reason, leaf, refusal.message[:MAX_REFUSAL_CHARACTERS]]


def _use_up(
    state: CoreState,
    member: Member,
    charge: int,
    outcome: str,
    refusal: GradientRefused | None,
    cursor: bytes | str | None,
) -> None:
    """Use up a member's next number; the one place where this happens."""
    member.decided += 1
    if cursor is not None:
        member.decided_cursor = cursor
    mark = state.mark()
    if mark is None:
        _settle(state, member, charge, refusal)
    else:
        state.unsettled.append((mark, member, charge, refusal))


def settle_durable(state: CoreState, mark: int) -> None:
    """Settle what was decided on up to a mark, now that the disk has it.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    mark : int
        As `CoreState.mark` gave it when it was decided.
    """
    unsettled = state.unsettled
    while unsettled and unsettled[0][0] <= mark:
        _settle(state, *unsettled.popleft()[1:])


def _settle(state: CoreState, member: Member, charge: int, refusal: GradientRefused | None, count: int = 1) -> None:
    """Acknowledge a member's next number, or several: it frees window and grant."""
    member.settled += count
    member.queued_bytes -= charge
    state.queued_bytes -= charge
    if refusal is not None:
        reason, leaf, message = refusal_values(refusal)
        member.refusals.append((member.settled, reason, leaf, message))
    if state.grants.settle(member):
        rebalance(state)
    waiter = member.waiting
    if waiter is not None:
        waiter.data.left_bytes -= charge
        if refusal is not None or member.settled >= waiter.data.until or waiter.data.left_bytes <= 0:
            answer_heartbeat(state, member)


def _count_refusal(state: CoreState, member: Member, number: int, refusal: GradientRefused) -> None:
    """Count a refusal, and log it, the first of a worker aloud; the worker is told when the number is settled."""
    state.log(
        logging.DEBUG if member.refused else logging.WARNING,
        "gradient refused",
        worker=member.worker,
        number=number,
        reason=refusal.reason,
        leaf=refusal.leaf,
    )
    member.refused += 1
    state.refused[refusal.reason] += 1


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


def ask_s(state: CoreState) -> float:
    """Tell how often a worker is to ask where nobody waits: many workers together no more than a broker has time for.

    Parameters
    ----------
    state : CoreState
        The core's memory.

    Returns
    -------
    float
        Seconds.
    """
    # No more rarely than leases allow; a broker that ends waits in proportion.
    return max(ASK_S, min(len(state.members.live_ids) / ASKS_A_SECOND, state.members.lease_s / 4))


def heartbeat_fields(state: CoreState, member: Member) -> dict[str, Any]:
    """Build the keys of a heartbeat's reply.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Who asked.

    Returns
    -------
    dict
        As in ``docs/wire.md``.
    """
    # What is told as settled is forgotten here, so no further than to where the refusals are told as well.
    untold = member.refusals[REFUSALS_A_REPLY][0] if len(member.refusals) > REFUSALS_A_REPLY else 0
    rare: dict[str, Any] = {"slots": list(member.slots)} if member.slots else {}
    if (pause_s := ask_s(state)) > ASK_S:
        rare["ask_s"] = pause_s
    return {
        "accepted": member.accepted,
        "settled": untold - 1 if untold else member.settled,
        "queued": member.queued_bytes,
        "superseded": member.superseded,
        "attempt": member.attempt,
        "resend": member.missing,
        "early": member.is_early,
        "grant": member.promised,
        "grant_seq": member.grant_seq,
        "refused": [list(refusal) for refusal in islice(member.refusals, REFUSALS_A_REPLY)],
        **rare,
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
        state.answer(waiter, heartbeat_fields(state, member))


def ask_for_early(state: CoreState) -> None:
    """Have those gradients sent again that came before the version that they were computed on.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    """
    for member in state.members:
        if member.is_early:
            member.is_early, member.missing = False, True
            answer_heartbeat(state, member)


def end_repetition(state: CoreState) -> None:
    """Note that what follows is not what an earlier broker's crash took back: its versions will not come again.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    """
    if state.repeatable:
        state.repeatable = []
        ask_for_early(state)


def end_vain_repetition(state: CoreState, member: Member, now: float) -> bool:
    """End the repetition if the open step waits for a worker of whom nothing comes before what is early.

    Then the version that this was computed on cannot come again: the step has no more of the worker to be made with. It
    happens where what was decided then is decided otherwise now, as people have changed settings in between.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Whose next gradient is early.
    now : float
        Seconds on the shell's clock.

    Returns
    -------
    bool
        Whether that was so.
    """
    if member.accepted != member.decided or member.worker not in state.policy.waits_for(state.situation(now)):
        return False
    state.log(logging.WARNING, "versions that a crash took back do not come again", worker=member.worker)
    end_repetition(state)
    return True


def rebalance(state: CoreState) -> None:
    """Give out free grants and tell those whose grant changed.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    """
    for member in state.grants.rebalance(state.members, state.policy.places()):
        answer_heartbeat(state, member)
