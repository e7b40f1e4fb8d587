"""What became of a gradient, and telling its worker: the end of the way that `intake` begins.

A worker's numbers are settled in its order. A policy may decide on a later number while an earlier one is held for a
step: what was decided then waits in `Member.decided` until all before it is settled.
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

from distgrad.errors import GradientRefused
from distgrad.wire import Gradient
from distgrad_broker.members import Member
from distgrad_broker.state import CoreState, Waiter

# A header holds 64 KiB, and a leaf's path may be long: this many refusals are told at a time, each cut to this length.
REFUSALS_A_REPLY = 16
MAX_REFUSAL_CHARACTERS = 400


def settle(
    state: CoreState, gradient: Gradient, member: Member, outcome: str, refusal: GradientRefused | None = None
) -> None:
    """Settle a gradient, or note what became of it until all of its worker before it is settled.

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
    if gradient.number != member.settled + 1:
        member.decided[gradient.number] = (gradient.charge, outcome, refusal)
        return
    _use_up(state, member, gradient.charge, outcome, refusal)
    while member.decided:
        following = member.decided.pop(member.settled + 1, None)
        if following is None:
            return
        _use_up(state, member, *following)


def _use_up(state: CoreState, member: Member, charge: int, outcome: str, refusal: GradientRefused | None) -> None:
    """Use up a member's next number; the one place where this happens."""
    member.settled += 1
    member.queued_bytes -= charge
    state.queued_bytes -= charge
    state.outcomes[outcome] += 1
    if refusal is not None:
        _note_refusal(state, member, refusal)
    if state.grants.settle(member):
        rebalance(state)
    waiter = member.waiting
    if waiter is not None:
        waiter.data.left_bytes -= charge
        if refusal is not None or member.settled >= waiter.data.until or waiter.data.left_bytes <= 0:
            answer_heartbeat(state, member)


def _note_refusal(state: CoreState, member: Member, refusal: GradientRefused) -> None:
    """Keep the reason of the number just settled until its worker has heard it."""
    number = member.settled
    leaf = None if refusal.leaf is None else refusal.leaf[:MAX_REFUSAL_CHARACTERS]
    member.refusals.append((number, refusal.reason, leaf, refusal.message[:MAX_REFUSAL_CHARACTERS]))
    if member.refused == 0:
        state.log(
            logging.WARNING,
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
        "superseded": member.superseded,
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
