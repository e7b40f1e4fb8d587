"""What each operation of the control channel means, and which role may ask for it.

An operation gets the request and a waiter. It answers the waiter, now or later, or raises `RequestError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from distgrad.arrays import lasting_empty
from distgrad.codec import fill
from distgrad.durable.books import LEFT, LIVE
from distgrad.errors import ConfigError, GradientRefused, MalformedMessage
from distgrad.layout import Layout
from distgrad.wire import MAX_FRAME_BYTES, MAX_ID_CHARACTERS, field
from distgrad_broker import checkpoints, membership, offers, policy_change, pulls, settling, updates
from distgrad_broker.bookkeeping import note_settings
from distgrad_broker.events import RequestReceived, SaveEnded, SaveParameters, Shutdown
from distgrad_broker.members import Member
from distgrad_broker.report import describe, policy_settings
from distgrad_broker.requests import ADMIN, ANY, READ, WORKER, RequestError
from distgrad_broker.state import CHECKPOINT, CoreState, Waiter

MAX_HEARTBEAT_WAIT_S = 0.05
MAX_DRAIN_WAIT_S = 5.0
# Each takes up to 1.5 KB of the 64 KiB of a header: an id may have 128 characters of 4 bytes.
WORKERS_A_REPLY = 32
# Long enough for the replies and for those who ask once more to be told.
DESTROY_LINGER_S = 5.0

Handler = Callable[[CoreState, RequestReceived, Waiter, float], None]


class Operation(NamedTuple):
    """One operation: who may ask, whether it changes something, and what it does."""

    roles: frozenset[str]
    is_mutating: bool
    handle: Handler


def _hello(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Issue a session to a worker's process (PROTOCOL 4-6)."""
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
        state.fail(late, RequestError("fenced", f"a newer process runs as worker {worker!r:.80}; this one must end"))
    is_new_session = member.session != former_session
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
        "cursor": member.cursor,
        "gradients": state.settings.gradients,
        "lease_s": state.members.lease_s,
        "queue_bytes": state.grants.budget_bytes,
        "grant": member.promised,
        "grant_seq": member.grant_seq,
        "durability": state.durability,
    }
    frames = [] if layout is None else [layout.to_frame()]
    if state.durability == CHECKPOINT and is_new_session and member.settled < member.accepted:
        # Its predecessor's gradients: what it is told of them must not be taken back.
        checkpoints.when_written(state, lambda _: state.answer_when_durable(waiter, fields, frames, now=now))
        return
    state.answer_when_durable(waiter, fields, frames, now=now)


def _heartbeat(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Renew a lease, take in what the worker says of its window, and tell what is settled (PROTOCOL 8-11)."""
    header = request.header
    member = _member_of(state, request)
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
    member.sent, member.known = sent, settled
    while member.refusals and member.refusals[0][0] <= settled:
        member.refusals.popleft()
    member.waiting = None  # a newer heartbeat replaces one that still waits
    if state.grants.echo(member, grant_seq, held, want, sent) or is_back:
        settling.rebalance(state)
    if is_back:
        membership.came(state, member, now)
        if state.records is not None:
            state.records.add("back", worker=member.worker)
    if state.durability == CHECKPOINT and member.settled < member.decided:
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
        state.answer(waiter, settling.heartbeat_fields(member))
        return
    waiter.deadline = now + wait_s
    waiter.data = settling.HeartbeatWait(until or 2**63, max(1, member.committed // 4))
    member.waiting = waiter

    def give_up(late: Waiter, _: float) -> None:
        if member.waiting is late:
            settling.answer_heartbeat(state, member)
        else:
            late.is_done = True

    state.wait(waiter, give_up)


def _leave(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Let a worker go that has nothing unsettled (PROTOCOL 16)."""
    member = _member_of(state, request)
    if member.queued_bytes or member.settled != member.accepted:
        raise RequestError("invalid", f"{member.accepted - member.settled} gradient(s) are not settled; flush first")
    state.grants.withdraw(member)
    state.members.leave(member)
    settling.rebalance(state)
    membership.went(state, member, now, left=True)
    state.log(logging.INFO, "worker left", worker=member.worker, settled=member.settled)
    if state.records is not None:
        state.records.add("left", worker=member.worker, memory=state.policy.memory())
    state.answer_when_durable(waiter, {}, now=now)


def _set_parameters(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Replace the parameters, or take them away; a worker may only offer the first ones (PROTOCOL 16)."""
    header, frames = request.header, request.frames
    if_absent: bool = field(header, "if_absent", bool, False)
    absent: bool = field(header, "absent", bool, False)
    if request.role not in (None, ADMIN) and (not if_absent or absent):
        raise RequestError("forbidden", "a worker's key may set parameters only with if_absent; use an admin key")
    if if_absent and state.versions.layout is not None:
        state.answer(waiter, {"changed": False})
        return
    if absent:
        changed = state.versions.layout is not None
        state.versions.clear()
        if state.records is not None:
            state.records.add("absent", generation=state.generation + 1)
    else:
        if not frames or len(frames[0]) > MAX_FRAME_BYTES:
            raise MalformedMessage("set needs a layout frame of at most 4 MiB, then the parts")
        layout = Layout.from_frame(frames[0])
        expected = layout.parameter_bytes
        size = sum(len(frame) for frame in frames[1:])
        if size != expected:
            raise MalformedMessage(f"parameters of this layout have {expected} bytes, got {size}")
        state.check_budget(layout.gradient_bytes)
        arenas = [lasting_empty(arena.size, arena.dtype) for arena in layout.arenas]
        try:
            fill(layout, frames[1:], arenas)
        except GradientRefused as refusal:
            raise MalformedMessage(refusal.message) from refusal
        state.resize_budget(layout.gradient_bytes)
        state.versions.set(layout, arenas)
        if state.records is not None:
            keys = {"generation": state.generation + 1, "version": state.versions.version}
            # The frames themselves: the arenas may be written to before the disk has them.
            state.records.add("set", frames[1:], layout=bytes(frames[0]), **keys)
        changed = True
        offers.end(state)
    state.generation += 1
    updates.requeue_held(state)
    state.log(logging.INFO, "parameters set" if not absent else "parameters removed", generation=state.generation)
    if absent and state.drain_left:
        updates.end_drain(state)  # without parameters nothing more can be applied
    settling.rebalance(state)
    _tell_everybody(state, now)
    state.answer_when_durable(waiter, {"changed": changed}, now=now)


def _start(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Let the updater run."""
    changed = not state.is_running
    state.is_running = True
    updates.end_drain(state)  # whoever waits for a stop is overruled
    if changed:
        state.log(logging.INFO, "updater started", queued=len(state.queue))
        updates.advance(state, now)
        _tell_everybody(state, now)
        if state.records is not None:
            state.records.add("running", running=True)
    state.answer_when_durable(waiter, {"changed": changed}, now=now)


def _stop(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Stop the updater, after what is accepted now if asked to drain (PROTOCOL 16)."""
    drain: bool = field(request.header, "drain", bool, False)
    wait_s = min(field(request.header, "wait_s", float, MAX_DRAIN_WAIT_S, low=0), MAX_DRAIN_WAIT_S)
    changed = state.is_running
    state.is_running = False
    if changed:
        state.drain_left = len(state.queue) if drain and state.versions.layout is not None else 0
        state.log(logging.INFO, "updater stopped", queued=len(state.queue), draining=state.drain_left)
        _tell_everybody(state, now)
        if state.records is not None:
            state.records.add("running", running=False)
    elif not drain:
        updates.end_drain(state)
    if not (drain and state.drain_left):
        state.answer_when_durable(waiter, {"changed": changed, "drained": True}, now=now)
        return
    waiter.data = changed
    waiter.deadline = now + wait_s
    key = waiter.client or waiter.envelope
    replaced = state.drains.pop(key, None)
    if replaced is not None:
        replaced.is_done = True  # its client has given it up and asks anew
    state.drains[key] = waiter

    def give_up(late: Waiter, _: float) -> None:
        del state.drains[key]
        state.answer(late, {"changed": late.data, "drained": False})

    state.wait(waiter, give_up)


def _clear(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Settle as cleared what is accepted at this moment (PROTOCOL 16)."""
    cleared = updates.clear_queue(state)
    state.log(logging.INFO, "queue cleared", cleared=cleared)
    if cleared and state.durability == CHECKPOINT:
        # Nothing else tells a broker that comes after this one that they must not count.
        checkpoints.when_written(state, lambda error: _end_clear(state, waiter, cleared, error))
        return
    state.answer_when_durable(waiter, {"cleared": cleared}, now=now)


def _end_clear(state: CoreState, waiter: Waiter, cleared: int, error: str | None) -> None:
    if error is None:
        state.answer(waiter, {"cleared": cleared})
    else:
        state.fail(waiter, RequestError("failed", f"{cleared} gradients were cleared, but it is not on disk: {error}"))


def _configure(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Change the mode, numbers of the rule, or the policy; all of it or nothing."""
    settings = {str(name): value for name, value in field(request.header, "settings", dict).items()}
    holder = state.versions.holder
    former_mode = holder.mode
    try:
        change = policy_change.prepare(state, settings)
        if "mode" in settings:
            holder.set_mode(settings.pop("mode"))
        if settings:
            holder.set_rule_numbers(**settings)
    except (ConfigError, TypeError) as error:
        holder.set_mode(former_mode)
        raise RequestError("invalid", str(error)) from error
    if change is not None:
        policy_change.carry_out(state, change, now)
    rule = holder.rule
    in_force = {"mode": holder.mode, "optimizer": rule.name if rule else None, **(rule.settings() if rule else {})}
    in_force |= policy_settings(state)
    state.log(logging.INFO, "configured", **in_force)
    if state.records is not None:
        note_settings(state, state.records)
    state.answer_when_durable(waiter, {"settings": in_force}, now=now)


def _status(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Tell how the broker does."""
    state.answer(waiter, {"status": describe(state, now)})


def _workers(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Tell of every worker that is known, so many at a time that a header holds them."""
    first: int = field(request.header, "first", int, 0, low=0)
    last = first + WORKERS_A_REPLY
    told = [member.describe(now) for member in islice(state.members, first, last)]
    state.answer(waiter, {"workers": told, "next": last if last < len(state.members) else None})


def _save(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Have the file thread write the parameters: to the file that the broker was started with, or a checkpoint."""
    if state.settings.save_path is None and state.settings.data is None:
        raise RequestError(
            "invalid", "the broker was started without --save FILE and --data DIR, so it has no place to write to"
        )
    if state.versions.layout is None:
        raise RequestError("no_parameters", "no parameters were set yet")
    if state.settings.data is not None:
        checkpoints.want(state, is_urgent=True)
    if state.settings.save_path is None:
        checkpoints.when_written(state, lambda error: _end_checkpoint(state, waiter, error))
        return
    if state.saves:
        raise RequestError("failed", "another save is under way; try again when it has ended")
    token, layout, arenas, version = state.versions.pin(now)
    state.saves_asked += 1
    state.saves[state.saves_asked] = (token, waiter)
    state.effects.append(SaveParameters(state.saves_asked, layout, arenas, version))


def _end_checkpoint(state: CoreState, waiter: Waiter, error: str | None) -> None:
    if error is None:
        state.answer(waiter, {"path": state.checkpoints.path})
    else:
        state.fail(waiter, RequestError("failed", f"cannot write a checkpoint: {error}"))


def end_save(state: CoreState, event: SaveEnded) -> None:
    """Tell who asked for a save what became of it.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    event : SaveEnded
        From the file thread.
    """
    token, waiter = state.saves.pop(event.ticket)
    state.versions.release(token)
    if event.error is None:
        state.log(logging.INFO, "parameters saved", path=event.path)
        state.answer(waiter, {"path": event.path})
    else:
        state.log(logging.ERROR, "save failed", path=event.path, error=event.error)
        state.fail(waiter, RequestError("failed", f"cannot save to {event.path}: {event.error}"))


def _destroy(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Stop for good: forget queue and parameters, and end the process."""
    updates.clear_queue(state)
    state.is_running = False
    state.is_destroyed = True
    state.generation += 1
    state.versions.clear()
    state.log(logging.INFO, "destroyed", version=state.versions.version)
    offers.end(state)
    _tell_everybody(state, now)
    if state.records is not None:
        state.records.add("destroyed", generation=state.generation)
    state.answer_when_durable(waiter, {}, now=now)
    state.effects.append(Shutdown(DESTROY_LINGER_S))


OPERATIONS: dict[str, Operation] = {
    "hello": Operation(frozenset({WORKER}), False, _hello),
    "heartbeat": Operation(frozenset({WORKER}), False, _heartbeat),
    "leave": Operation(frozenset({WORKER}), True, _leave),
    "get": Operation(ANY, False, pulls.get),
    "range": Operation(ANY, False, pulls.read_range),
    "set": Operation(frozenset({ADMIN, WORKER}), True, _set_parameters),
    "offer": Operation(frozenset({ADMIN, WORKER}), False, offers.offer),
    "start": Operation(frozenset({ADMIN}), True, _start),
    "stop": Operation(frozenset({ADMIN}), True, _stop),
    "clear": Operation(frozenset({ADMIN}), True, _clear),
    "configure": Operation(frozenset({ADMIN}), True, _configure),
    "status": Operation(ANY, False, _status),
    "workers": Operation(frozenset({ADMIN, READ}), False, _workers),
    "save": Operation(frozenset({ADMIN}), True, _save),
    "destroy": Operation(frozenset({ADMIN}), True, _destroy),
}


def _adopt(state: CoreState, member: Member, settled: int, now: float) -> None:
    """Go on with the numbers of a process that knew an earlier incarnation (PROTOCOL 6)."""
    if settled != member.accepted:
        updates.drop_queued(state, member)
        member.accepted = member.settled = settled
        member.adopted = True
        if member.state == LIVE:
            state.policy.joined(member.worker, state.situation(now))  # its numbers mean something else now


def _member_of(state: CoreState, request: RequestReceived) -> Member:
    """Find the member that a request speaks for; its session must be the current one (PROTOCOL 4)."""
    worker: str = field(request.header, "worker", str)
    session: str = field(request.header, "session", str)
    member = state.members.get(worker)
    if member is None or member.state == LEFT or session.partition(":")[0] != state.incarnation:
        raise RequestError("unknown_worker", f"no session of worker {worker!r:.80} here; say hello")
    if member.user != request.user:
        raise RequestError("forbidden", f"worker id {worker!r:.80} belongs to another key")
    if session != member.session:
        raise RequestError("fenced", f"a newer process runs as worker {worker!r:.80}; this one must end")
    return member


def _tell_everybody(state: CoreState, now: float) -> None:
    """Answer all who wait: what they know of the parameters or of the updater is out of date."""
    for member in state.members:
        settling.answer_heartbeat(state, member)
    pulls.answer_all(state, now)
