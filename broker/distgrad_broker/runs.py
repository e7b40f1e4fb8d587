"""Small gradients of one worker that lie next to each other in the queue, applied with what they share done once.

It means what `updates` means gradient by gradient, for the case that fast workers make the usual one: the policy
applies at once, nothing is journaled, nobody reads versions in ranges. Each gradient still makes a version of its own.
"""

from __future__ import annotations

from itertools import islice

from distgrad.wire import INLINE_BYTES, Gradient
from distgrad_broker.settling import MAX_COUNT, note_staleness, settle_applied
from distgrad_broker.state import CoreState


def apply_run(state: CoreState, limit: int) -> int:
    """Apply gradients from the head of the queue, up to the first that has to be looked at by itself.

    Parameters
    ----------
    state : CoreState
        The core's memory; something is queued, and updates may be made.
    limit : int
        How many at most.

    Returns
    -------
    int
        How many were applied and settled; 0 if this is not the usual case.
    """
    queue = state.queue
    first = queue[0]
    base = first.base
    if not state.applies_at_once or state.records is not None or state.drain_left or first.size > INLINE_BYTES:
        return 0
    staleness: int | None = None
    if base is not None:
        staleness = state.versions.version - base.version
        if base.incarnation != state.incarnation or base.generation != state.generation or staleness < 0:
            return 0
    worker = first.worker
    member = state.members.of(first)
    if member.ahead:
        return 0
    if member.waiting is not None and member.waiting.data.until > member.settled:
        # Somebody waits for that number, and is told before anything else is done.
        limit = min(limit, member.waiting.data.until - member.settled)
    run: list[Gradient] = []
    for gradient in islice(queue, limit):
        # Those that came in one message have one base, the same object.
        if gradient.base is not base or gradient.worker != worker:
            break
        run.append(gradient)
    if len(run) == 1:
        return 0
    n_applied = state.versions.apply_run(run)
    if n_applied == 0:
        return 0
    del run[n_applied:]
    for gradient in run:
        queue.popleft()
        member.examples += gradient.examples
        if gradient.loss is not None:
            member.loss = gradient.loss
    member.examples = min(member.examples, MAX_COUNT)
    member.applied += n_applied
    if staleness is not None:
        note_staleness(state, member, staleness, n_applied)
    settle_applied(state, run, member)
    return n_applied
