"""Between the core's memory and the books that outlive it: what a checkpoint holds, and how a broker goes on."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from distgrad.codec import encode
from distgrad.durable.books import LEFT, LIVE, Books, MemberBook, Recovered
from distgrad.durable.records import Records
from distgrad.errors import GradientRefused
from distgrad.policies import Policy
from distgrad.version import __version__
from distgrad.wire import State
from distgrad_broker.core_settings import CHECKPOINT, JOURNAL
from distgrad_broker.members import Member
from distgrad_broker.sessions import parse_session
from distgrad_broker.settling import refusal_values
from distgrad_broker.state import CoreState


def note_start(state: CoreState, records: Records, *, is_recovered: bool) -> None:
    """Note for the journal that this broker began, and by what it decides.

    Parameters
    ----------
    state : CoreState
        The core's memory, restored.
    records : Records
        Where to.
    is_recovered : bool
        Whether the parameters, if there are any, are from the data folder; else they are noted as well.
    """
    data = state.settings.data
    assert data is not None  # there is a journal only with a data folder
    records.add(
        "began",
        incarnation=state.incarnation,
        executor=state.versions.holder.executor,
        distgrad=__version__,
        settings=data.started_with,
        running=state.is_running,
        durability=state.durability,
    )
    note_settings(state, records)
    layout, storage = state.versions.layout, state.versions.holder.storage
    if layout is not None and storage is not None and not is_recovered:
        # Copied: updates write to the arenas before the disk has them.
        parts = [bytes(part) for part in encode(layout, storage.arenas, trained_only=False)]
        keys = {"generation": state.generation, "version": state.versions.version}
        records.add("set", parts, layout=layout.to_frame(), **keys)


def note_settings(state: CoreState, records: Records) -> None:
    """Note mode, rule, policy and weighing for the journal.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    records : Records
        Where to.
    """
    holder = state.versions.holder
    rule = holder.rule
    records.configured(
        mode=holder.mode,
        rule=None if rule is None else [rule.name, rule.settings()],
        policy=_named(state.policy),
        weighing=state.weighing.settings(),
        version=state.versions.version,
    )


def books_of(state: CoreState) -> Books:
    """Write down what a checkpoint needs of the core's memory, beside parameters and optimizer state.

    Parameters
    ----------
    state : CoreState
        The core's memory.

    Returns
    -------
    Books
        Values of their own.
    """
    data = state.settings.data
    untold = _untold_refusals(state)
    return Books(
        incarnation=state.incarnation,
        generation=state.generation,
        is_running=state.is_running,
        is_destroyed=state.is_destroyed,
        lineage=state.lineage,
        repeatable=list(state.repeatable),
        members={member.worker: _book(state, member, untold.get(member, [])) for member in state.members},
        durability=state.durability,
        outcomes=Counter(state.outcomes),
        refused=Counter(state.refused),
        policy=_named(state.policy),
        policy_memory=state.policy.memory(),
        policy_step=state.policy.step_memory(),
        weighing=state.weighing.settings(),
        settings={} if data is None else data.started_with,
    )


def restore(state: CoreState, recovered: Recovered, now: float) -> None:
    """Go on from what an earlier broker left behind.

    Parameters
    ----------
    state : CoreState
        New; its parameters are the recovered ones already.
    recovered : Recovered
        From the data folder.
    now : float
        Seconds on the shell's clock; recovered members get a full lease from here (PROTOCOL 20).
    """
    books = recovered.books
    if not books.incarnation:
        return
    last = State(books.incarnation, books.generation, state.versions.version)
    state.lineage = state.members.lineage = books.lineage.after(last)
    state.generation = books.generation
    if not books.is_destroyed and not state.settings.is_stopped:
        state.is_running = books.is_running
    state.outcomes.update(books.outcomes)
    state.refused.update(books.refused)
    for book in books.members.values():
        state.members.add(_member(state, book, now))
    for gradient in recovered.pending.values():
        member = state.members.of(gradient)
        member.queued_bytes += gradient.charge
        state.queued_bytes += gradient.charge
        state.queue.append(gradient)
    for member in state.members:
        member.committed = member.queued_bytes
    state.policy.recall({**books.policy_memory, **books.policy_step})
    if state.policy.is_repeatable:
        state.repeatable = books.repeatable if recovered.is_forked else [*books.repeatable, books.incarnation]
    situation = state.situation(now)
    for worker in sorted(state.members.live_ids):
        state.policy.joined(worker, situation)
    state.log(
        logging.INFO,
        "recovered",
        version=state.versions.version,
        generation=state.generation,
        workers=len(state.members),
        queued=len(state.queue),
        records=recovered.records,
        running=state.is_running,
    )


def _named(policy: Policy) -> tuple[str, dict[str, Any]]:
    return policy.name, policy.settings()


def _book(state: CoreState, member: Member, untold: list[list[Any]]) -> MemberBook:
    session = parse_session(member.session) or member.origin or ("", 0)
    # Without a journal of gradients what is queued here is not kept: its worker sends it again.
    accepted, cursor = (member.accepted, member.cursor) if state.durability == JOURNAL else member.kept_place
    return MemberBook(
        worker=member.worker,
        user=member.user,
        generated=member.generated,
        state=member.state,
        incarnation=session[0],
        counter=session[1],
        nonce=member.nonce,
        nonces=list(member.past_nonces),
        accepted=accepted,
        decided=member.decided,
        ahead={number: (outcome, cursor) for number, (_, outcome, _, cursor) in member.ahead.items()},
        cursor=cursor,
        decided_cursor=member.decided_cursor,
        refusals=[*map(list, member.refusals), *untold],
        counts=Counter(
            applied=member.applied,
            superseded=member.superseded,
            refused=member.refused,
            cleared=member.cleared,
        ),
        examples=member.examples,
        loss=member.loss,
    )


def _untold_refusals(state: CoreState) -> dict[Member, list[list[Any]]]:
    """List by member what was refused and is not told yet: the disk does not have it, or an earlier number is held."""
    untold: dict[Member, list[list[Any]]] = {}
    numbers: dict[Member, int] = {}
    for _, member, _, refusal in state.unsettled:
        numbers[member] = number = numbers.get(member, member.settled) + 1
        if refusal is not None:
            untold.setdefault(member, []).append([number, *refusal_values(refusal)])
    for member in state.members:
        for number, (_, _, refusal, _) in member.ahead.items():
            if refusal is not None:
                untold.setdefault(member, []).append([number, *refusal_values(refusal)])
    return untold


def _refusal(told: tuple[Any, ...] | None) -> GradientRefused | None:
    if told is None:
        return None
    _, reason, leaf, message = told
    return GradientRefused(reason, message, leaf=leaf)


def _member(state: CoreState, book: MemberBook, now: float) -> Member:
    member = Member(book.worker, book.user, book.generated)
    member.state = book.state
    member.origin = None if book.state == LEFT else (book.incarnation, book.counter)
    member.nonce = book.nonce
    member.past_nonces.extend(book.nonces)
    member.accepted = book.accepted
    member.decided = member.settled = member.judged = book.decided
    refusals = {refusal[0]: tuple(refusal) for refusal in book.refusals}
    member.refusals.extend(refusals[number] for number in sorted(refusals) if number <= book.decided)
    member.ahead = {
        number: (0, outcome, _refusal(refusals.get(number)), cursor) for number, (outcome, cursor) in book.ahead.items()
    }
    member.cursor, member.decided_cursor = book.cursor, book.decided_cursor
    if state.durability == CHECKPOINT:
        member.kept, member.kept_cursor = book.accepted, book.cursor
    member.applied = book.counts["applied"]
    member.superseded = book.counts["superseded"]
    member.refused = book.counts["refused"]
    member.cleared = book.counts["cleared"]
    member.examples = book.examples
    member.loss = book.loss
    member.last_seen = now
    member.expires = now - state.busy_s + state.members.lease_s if book.state == LIVE else 0.0
    return member
