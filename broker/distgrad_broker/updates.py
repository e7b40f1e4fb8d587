"""From the queue into the parameters: what the policy says of each gradient, one at a time or a step at once.

The core knows no policy by name. It shows the policy every gradient in order of acceptance; what is to be held stays
here (`CoreState.held`) and unsettled until the policy gives it out as part of a step, or it is cleared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

from distgrad.durable.replay import APPLIED
from distgrad.errors import GradientRefused
from distgrad.policies import Action, Held, Offered
from distgrad.wire import Gradient
from distgrad_broker import pulls
from distgrad_broker.members import Member
from distgrad_broker.runs import apply_run
from distgrad_broker.settling import (
    MAX_COUNT,
    ask_for_early,
    end_repetition,
    end_vain_repetition,
    note_staleness,
    settle,
)
from distgrad_broker.state import CoreState


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
    return bool(state.queue) and is_updating(state)


def work(state: CoreState, now: float, limit: int = 1) -> None:
    """Decide on gradients at the head of the queue, until somebody must be told of one.

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
        if limit > 1 and (n_applied := apply_run(state, limit)):
            limit -= n_applied
            if state.pulls:
                pulls.answer_all(state, now)
            continue
        limit -= 1
        gradient = state.queue.popleft()
        _judge(state, gradient, state.members.of(gradient), now)
        if state.drain_left:
            state.drain_left -= 1
            if not state.drain_left:
                end_drain(state)


def advance(state: CoreState, now: float) -> None:
    """Apply the steps that are complete.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    now : float
        Seconds on the shell's clock.
    """
    while state.held and is_updating(state):
        step = state.policy.complete(state.situation(now))
        if not step:
            return
        _apply_step(state, step, now)


def is_updating(state: CoreState) -> bool:
    """Tell whether parameters may change now.

    Parameters
    ----------
    state : CoreState
        The core's memory.

    Returns
    -------
    bool
        False while the updater is stopped, or there are no parameters.
    """
    return (state.is_running or state.drain_left > 0) and state.versions.layout is not None


def _judge(state: CoreState, gradient: Gradient, member: Member, now: float) -> None:
    """Do with one gradient what the policy says."""
    staleness: int | None = None
    base = gradient.base
    if base is not None and base.generation == state.generation:
        if base.incarnation == state.incarnation:
            staleness = state.versions.version - base.version
            if staleness < 0:
                _refuse_future(state, gradient, member, base.version)
                if state.pulls:
                    pulls.answer_all(state, now)
                return
        elif state.lineage.survives(base) or base.incarnation in state.repeatable:
            # It has survived, or was taken back by a crash and has come again by now (`intake` waits for that).
            staleness = state.versions.version - base.version
    if state.applies_at_once:
        _apply_one(state, gradient, member, staleness, 1.0)
    else:
        member.judged = gradient.number
        decision = state.policy.offer(gradient, staleness, state.situation(now))
        if decision.action is Action.APPLY:
            (weight,) = state.weighing.weights([Held(gradient, decision.factor)])
            _apply_one(state, gradient, member, staleness, weight)
        elif decision.action is Action.HOLD:
            _hold(state, Held(gradient, decision.factor), member, staleness, now)
        elif decision.action is Action.SUPERSEDE:
            member.superseded += 1
            settle(state, gradient, member, "superseded")
        else:
            settle(state, gradient, member, "refused", GradientRefused(decision.reason, decision.message))
        if member.is_early:
            end_vain_repetition(state, member, now)
    if state.pulls:
        pulls.answer_all(state, now)


def _refuse_future(state: CoreState, gradient: Gradient, member: Member, version: int) -> None:
    message = f"computed on version {version}, but this is {state.versions.version}; pull before the push"
    settle(state, gradient, member, "refused", GradientRefused("from_the_future", message))


def _apply_one(state: CoreState, gradient: Gradient, member: Member, staleness: int | None, weight: float) -> None:
    version = state.versions.version
    try:
        if weight == 1.0:
            state.versions.apply(gradient)
        else:
            state.versions.apply_sum([gradient], [weight])
    except GradientRefused as refusal:
        settle(state, gradient, member, "refused", refusal)
        return
    if state.records is not None:
        weights = None if weight == 1.0 else [weight]
        state.records.decided([APPLIED, [[gradient.worker, gradient.number]], weights], version)
    _count(gradient, member)
    if staleness is not None:
        note_staleness(state, member, staleness)
    settle(state, gradient, member, "applied")


def _hold(state: CoreState, held: Held[Gradient], member: Member, staleness: int | None, now: float) -> None:
    """Keep a gradient for its step, if it is good as far as the sum would not tell."""
    gradient = held.gradient
    try:
        state.versions.check(gradient)
    except GradientRefused as refusal:
        state.policy.withdrawn(gradient)
        settle(state, gradient, member, "refused", refusal)
    else:
        if staleness is not None:
            note_staleness(state, member, staleness)
        state.held.append(held)
    advance(state, now)


def _apply_step(state: CoreState, step: Sequence[Offered], now: float) -> None:
    found = {id(held.gradient): held for held in state.held}
    taken = [found.pop(id(gradient)) for gradient in step]
    state.held = list(found.values())
    gradients = [held.gradient for held in taken]
    weights = state.weighing.weights(taken)
    outcome, trouble = "applied", None
    version, was_each_checked = state.versions.version, state.versions.checks_each
    try:
        state.versions.apply_sum(gradients, weights)
    except GradientRefused as refusal:
        if not was_each_checked:
            # Offered once more, each is: what is bad of them is refused then, and what is good held again.
            state.held = [*taken, *state.held]
            requeue_held(state)
            return
        # Each is good by itself, but their sum is too large.
        outcome, trouble = "refused", refusal
    if trouble is None and state.records is not None:
        names = [[gradient.worker, gradient.number] for gradient in gradients]
        state.records.decided([APPLIED, names, weights], version)
    for gradient in gradients:
        member = state.members.of(gradient)
        if trouble is None:
            _count(gradient, member)
        settle(state, gradient, member, outcome, trouble)
    if state.repeatable:
        ask_for_early(state)
    if state.pulls:
        pulls.answer_all(state, now)


def _count(gradient: Gradient, member: Member) -> None:
    member.applied += 1
    member.examples = min(member.examples + gradient.examples, MAX_COUNT)
    if gradient.loss is not None:
        member.loss = gradient.loss


def clear_queue(state: CoreState) -> int:
    """Settle as cleared all that is accepted at this moment.

    Parameters
    ----------
    state : CoreState
        The core's memory.

    Returns
    -------
    int
        How many there were.
    """
    requeue_held(state)
    cleared = len(state.queue)
    for _ in range(cleared):
        gradient = state.queue.popleft()
        member = state.members.of(gradient)
        member.cleared += 1
        settle(state, gradient, member, "cleared")
    end_drain(state)
    if cleared:
        end_repetition(state)
    return cleared


def requeue_held(state: CoreState) -> None:
    """Put what is held back to the head of the queue: it will be offered again, perhaps to another policy.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    """
    state.policy.reset()
    held, state.held = state.held, []
    for gradient, _ in held:
        member = state.members.of(gradient)
        member.judged = min(member.judged, gradient.number - 1)
    state.queue.extendleft(gradient for gradient, _ in reversed(held))
    if state.drain_left:
        state.drain_left += len(held)


def drop_queued(state: CoreState, member: Member) -> None:
    """Settle as superseded what one member has in the queue or held.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Whose numbers begin anew elsewhere.
    """
    if member.decided == member.accepted:
        return
    kept_back: list[Held[Gradient]] = []
    for held in state.held:
        gradient = held.gradient
        if gradient.worker == member.worker:
            state.policy.withdrawn(gradient)
            member.superseded += 1
            settle(state, gradient, member, "superseded")
        else:
            kept_back.append(held)
    state.held = kept_back
    draining = state.drain_left
    for place, gradient in enumerate(state.queue):
        if gradient.worker == member.worker:
            state.drain_left -= place < draining
            member.superseded += 1
            settle(state, gradient, member, "superseded")
    state.queue = deque(gradient for gradient in state.queue if gradient.worker != member.worker)
    if draining and not state.drain_left:
        end_drain(state)


def forget_undecided(state: CoreState, member: Member) -> None:
    """Take back that a member's gradients were accepted: its next process begins behind those that are decided on.

    Those that an earlier broker's journal has stay: whoever was told of them does not send them again.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Whose process has a successor.
    """
    accepted, cursor = member.kept_place
    if any(_is_behind(held.gradient, member, accepted) for held in state.held):
        # The others are offered again: the policy must not take the worker for one that has taken part.
        requeue_held(state)
    draining = state.drain_left
    for place, gradient in enumerate(state.queue):
        if _is_behind(gradient, member, accepted):
            state.drain_left -= place < draining
            _take_back(state, member, gradient)
    state.queue = deque(gradient for gradient in state.queue if not _is_behind(gradient, member, accepted))
    _take_back_decisions(state, member, accepted)
    member.accepted, member.cursor = accepted, cursor
    member.judged = min(member.judged, accepted)
    if draining and not state.drain_left:
        end_drain(state)


def _is_behind(gradient: Gradient, member: Member, number: int) -> bool:
    return gradient.worker == member.worker and gradient.number > number


def _take_back_decisions(state: CoreState, member: Member, accepted: int) -> None:
    """Forget what was decided ahead of a gradient that is taken back: the numbers will be another process's."""
    for number, (charge, outcome, refusal, _) in list(member.ahead.items()):
        if number <= accepted or outcome == "applied":
            continue  # kept; or by a policy that does not keep a worker's order: it is in the parameters
        del member.ahead[number]
        member.queued_bytes -= charge
        state.queued_bytes -= charge
        state.outcomes[outcome] -= 1
        member.superseded -= outcome == "superseded"
        if refusal is not None:
            member.refused -= 1
            state.refused[refusal.reason] -= 1


def _take_back(state: CoreState, member: Member, gradient: Gradient) -> None:
    member.queued_bytes -= gradient.charge
    state.queued_bytes -= gradient.charge


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
        fields = {"changed": waiter.data, "drained": True}
        if state.records is None:
            state.answer(waiter, fields)
        else:
            state.records.when_durable(partial(state.answer, waiter, fields))
