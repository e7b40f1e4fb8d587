"""What each operation of the control channel means, and which role may ask for it.

An operation gets the request and a waiter. It answers the waiter, now or later, or raises `RequestError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from distgrad.codec import fill
from distgrad.durable.books import LEFT
from distgrad.errors import ConfigError, GradientRefused, MalformedMessage
from distgrad.layout import Layout
from distgrad.wire import MAX_FRAME_BYTES, field
from distgrad_broker import (
    checkpoints,
    membership,
    offers,
    policy_change,
    pulls,
    saving,
    settling,
    sharing,
    updates,
    worker_operations,
)
from distgrad_broker.bookkeeping import note_settings
from distgrad_broker.core_settings import CHECKPOINT
from distgrad_broker.events import RequestReceived, Shutdown
from distgrad_broker.report import describe, policy_settings
from distgrad_broker.requests import ADMIN, ANY, READ, WORKER, RequestError
from distgrad_broker.state import CoreState
from distgrad_broker.waiting import Waiter

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
        arenas = [state.versions.empty(arena.size, arena.dtype) for arena in layout.arenas]
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
    settling.end_repetition(state)
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

    def give_up(late: Waiter, then: float) -> None:
        state.drains.pop(key, None)  # what was drained may still be on its way to the disk, and so may the stop
        state.answer_when_durable(late, {"changed": late.data, "drained": False}, now=then)

    state.deadlines.wait(waiter, give_up)


def _clear(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Settle as cleared what is accepted at this moment (PROTOCOL 16)."""
    cleared = updates.clear_queue(state)
    pulls.answer_all(state, now)
    state.log(logging.INFO, "queue cleared", cleared=cleared)
    if cleared and state.durability == CHECKPOINT:
        # Nothing else tells a broker that comes after this one that they must not count.
        checkpoints.when_written(state, waiter, lambda error: _end_clear(state, waiter, cleared, error), now)
        return
    state.answer_when_durable(waiter, {"cleared": cleared}, now=now)


def _end_clear(state: CoreState, waiter: Waiter, cleared: int, error: str | None) -> None:
    if error is None:
        state.answer(waiter, {"cleared": cleared})
    else:
        state.fail(waiter, RequestError("failed", f"{cleared} gradients were cleared, but it is not on disk: {error}"))


def _end_destroy(state: CoreState, waiter: Waiter, error: str | None) -> None:
    if error is None:
        state.answer(waiter, {})
    else:
        state.fail(waiter, RequestError("failed", f"destroyed, but the data folder does not know: {error}"))


def _configure(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Change the mode, numbers of the rule, or the policy; all of it or nothing."""
    settings = {str(name): value for name, value in field(request.header, "settings", dict).items()}
    holder = state.versions.holder
    former_mode, former = holder.mode, _in_force(state)
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
    in_force = _in_force(state)
    if in_force != former:
        # As a replay sees it: what is the same as before makes the same versions.
        settling.end_repetition(state)
    state.log(logging.INFO, "configured", **in_force)
    if state.records is not None:
        note_settings(state, state.records)
    state.answer_when_durable(waiter, {"settings": in_force}, now=now)


def _in_force(state: CoreState) -> dict[str, Any]:
    holder = state.versions.holder
    rule = holder.rule
    in_force = {"mode": holder.mode, "optimizer": rule.name if rule else None, **(rule.settings() if rule else {})}
    return in_force | policy_settings(state)


def _status(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Tell how the broker does."""
    state.answer(waiter, {"status": describe(state, now)})


def _workers(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Tell of every worker that is known, so many at a time that a header holds them."""
    first: int = field(request.header, "first", int, 0, low=0)
    last = first + WORKERS_A_REPLY
    told = [member.describe(now) for member in islice(state.members, first, last)]
    state.answer(waiter, {"workers": told, "next": last if last < len(state.members) else None})


def _evict(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Fence a worker's process and end its lease; its id is free for a new one."""
    worker: str = field(request.header, "worker", str)
    member = state.members.get(worker)
    if member is None or member.state == LEFT:
        known = f"worker {worker!r:.80} is gone already" if member else f"there is no worker {worker!r:.80}"
        raise RequestError("invalid", f"{known}; `workers` lists those that are known")
    membership.evict(state, member, now)
    state.answer_when_durable(waiter, {}, now=now)


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
    if state.records is None and state.settings.data is not None:
        # Nothing else tells a broker that comes after this one.
        checkpoints.when_written(state, waiter, lambda error: _end_destroy(state, waiter, error), now)
    else:
        state.answer_when_durable(waiter, {}, now=now)
    state.effects.append(Shutdown(DESTROY_LINGER_S))


OPERATIONS: dict[str, Operation] = {
    "hello": Operation(frozenset({WORKER}), False, worker_operations.hello),
    "heartbeat": Operation(frozenset({WORKER}), False, worker_operations.heartbeat),
    "share": Operation(frozenset({WORKER}), False, sharing.share),
    "leave": Operation(frozenset({WORKER}), True, worker_operations.leave),
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
    "evict": Operation(frozenset({ADMIN}), True, _evict),
    "save": Operation(frozenset({ADMIN}), True, saving.save),
    "destroy": Operation(frozenset({ADMIN}), True, _destroy),
}


def _tell_everybody(state: CoreState, now: float) -> None:
    """Answer all who wait: what they know of the parameters or of the updater is out of date."""
    for member in state.members:
        settling.answer_heartbeat(state, member)
    pulls.answer_all(state, now)
