"""When a checkpoint is written, and what happens when one ended. The file thread does the writing.

The loop pauses for a copy of the optimizer's state; the parameters are a version that is held like a reader's. With
``durability checkpoint`` what is decided is settled when a checkpoint has it, so one is also due when somebody waits:
for a flush, or for room in the window (PROTOCOL 2; a window smaller than the interval would wait for ever).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from distgrad.arrays import lasting_empty
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.checkpoint_state import pack_state
from distgrad.durable.disk_events import CheckpointEnded, WriteCheckpoint
from distgrad.layout import Layout
from distgrad_broker import settling, updates
from distgrad_broker.bookkeeping import books_of
from distgrad_broker.core_settings import CHECKPOINT, JOURNAL
from distgrad_broker.state import CoreState
from distgrad_broker.waiting import Waiter

# After one that could not be written the next is tried this much later, and twice as late after each that follows, up
# to a limit. It is lower while workers wait for one.
RETRY_S = 1.0
MAX_RETRY_S = 60.0
MAX_WAITED_RETRY_S = 4.0
# A broker that ends tries without these pauses, and gives up after so many.
MAX_FINAL_TRIES = 5


def want(state: CoreState, *, is_urgent: bool) -> None:
    """Ask for a checkpoint soon, because somebody waits for it.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    is_urgent : bool
        Whether somebody does; otherwise nothing is asked for.
    """
    if is_urgent:
        state.checkpoints.is_wanted = True


def when_written(state: CoreState, waiter: Waiter, call: Callable[[str | None], None], now: float) -> None:
    """Have a request answered when a checkpoint of what is there now has ended.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    waiter : Waiter
        Who waits; told after a few seconds that the disk does not take it.
    call : callable
        Called with the error, or None.
    now : float
        Seconds on the shell's clock.
    """
    checkpoints = state.checkpoints
    checkpoints.is_wanted = True
    waiting = (checkpoints.last + 1, call)
    checkpoints.waiting.append(waiting)

    def give_up() -> None:
        if waiting in checkpoints.waiting:
            checkpoints.waiting.remove(waiting)

    state.limit_disk_wait(waiter, give_up, now=now)


def look(state: CoreState, now: float) -> None:
    """Begin a checkpoint if one is due.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    now : float
        Seconds on the shell's clock.
    """
    checkpoints, data = state.checkpoints, state.settings.data
    if data is None or checkpoints.is_under_way or now < checkpoints.retry_at:
        return
    if state.is_closing:
        is_due = not updates.has_work(state) and _is_last_due(state)
        checkpoints.is_final |= is_due
    else:
        is_due = checkpoints.is_wanted or _is_due(state, now)
    if is_due:
        _begin(state, now)


def retry(state: CoreState) -> None:
    """Do not wait any longer after a checkpoint that could not be written: something has changed.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    """
    state.checkpoints.retry_at = 0.0
    state.checkpoints.failures = 0


def are_done(state: CoreState) -> bool:
    """Tell whether a broker that is closing has nothing more to write.

    Parameters
    ----------
    state : CoreState
        The core's memory; nothing waits to be applied.

    Returns
    -------
    bool
        True as well if the disk does not take it: workers then send it again, to the next broker.
    """
    checkpoints = state.checkpoints
    if state.settings.data is None:
        return True
    if checkpoints.is_under_way:
        return False
    if state.disk_trouble is not None:
        return True
    if checkpoints.error is not None and checkpoints.failures >= MAX_FINAL_TRIES:
        return True
    return not state.unsettled and not _is_last_due(state)


def end(state: CoreState, event: CheckpointEnded, now: float) -> None:
    """Take note of what became of a checkpoint.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    event : CheckpointEnded
        From the file thread.
    now : float
        Seconds on the shell's clock.
    """
    checkpoints = state.checkpoints
    checkpoints.is_under_way = False
    checkpoints.ended_at = now
    if checkpoints.token is not None:
        state.versions.release(checkpoints.token)
        checkpoints.token = None
    if event.error is None:
        checkpoints.path, checkpoints.written_version = event.path, checkpoints.version
        checkpoints.written_at, checkpoints.error, checkpoints.failures = now, None, 0
        state.log(
            logging.INFO,
            "checkpoint written",
            path=event.path,
            version=checkpoints.version,
            seconds=round(now - checkpoints.begun_at, 3),
        )
        if state.durability == CHECKPOINT:
            settling.settle_durable(state, event.ticket)
    else:
        if event.error != checkpoints.error:
            state.log(logging.ERROR, "checkpoint failed, and is tried again", path=event.path, error=event.error)
        checkpoints.retry_at = now + _pause(state)
        checkpoints.error = event.error
        checkpoints.failures += 1
        checkpoints.generation = -1  # so that what it was to cover still counts as a change
        checkpoints.is_final = False
        checkpoints.is_wanted = True
    due = [call for ticket, call in checkpoints.waiting if ticket <= event.ticket]
    checkpoints.waiting = [waiting for waiting in checkpoints.waiting if waiting[0] > event.ticket]
    for call in due:
        call(event.error)


def _is_due(state: CoreState, now: float) -> bool:
    checkpoints, data = state.checkpoints, state.settings.data
    assert data is not None  # the caller has looked
    if data.every_updates is not None and state.versions.version - checkpoints.version >= data.every_updates:
        return True
    journal_bytes = 0 if state.records is None else state.records.bytes - checkpoints.bytes
    if data.every_bytes is not None and journal_bytes >= data.every_bytes:
        return True
    return data.every_s is not None and now - checkpoints.begun_at >= data.every_s and _has_changed(state)


def _pause(state: CoreState) -> float:
    """Give how long to wait after one more that failed."""
    if state.is_closing:
        return RETRY_S
    limit = MAX_WAITED_RETRY_S if state.unsettled and state.durability == CHECKPOINT else MAX_RETRY_S
    return min(RETRY_S * 2.0 ** min(state.checkpoints.failures, 10), limit)


def _is_last_due(state: CoreState) -> bool:
    """Tell whether a broker that is closing has what only one more checkpoint can keep."""
    if not state.checkpoints.is_final:
        return _has_changed(state)
    # Records go on until the end, and steps may, as their members leave. Where there is a journal it has them.
    return state.durability != JOURNAL and (bool(state.unsettled) or _have_parameters_changed(state))


def _have_parameters_changed(state: CoreState) -> bool:
    checkpoints = state.checkpoints
    return (state.versions.version, state.generation) != (checkpoints.version, checkpoints.generation)


def _has_changed(state: CoreState) -> bool:
    sequence = state.checkpoints.sequence
    return _have_parameters_changed(state) or (state.records is not None and state.records.sequence != sequence)


def _begin(state: CoreState, now: float) -> None:
    checkpoints, versions, records = state.checkpoints, state.versions, state.records
    checkpoints.is_under_way, checkpoints.is_wanted = True, False
    checkpoints.last += 1
    checkpoints.begun_at = now
    checkpoints.version, checkpoints.generation = versions.version, state.generation
    if records is None:
        checkpoints.sequence += 1
    else:
        checkpoints.sequence, checkpoints.bytes = records.sequence, records.bytes
    layout: Layout | None = None
    arenas: list[Any] = []
    if versions.layout is not None:
        checkpoints.token, layout, arenas, _ = versions.pin(now)
    slots = {slot: [_copy(array) for array in arrays] for slot, arrays in versions.holder.state.items()}
    first_needed = _first_needed(state)
    content = pack_state(versions.holder, books_of(state), first_needed)
    checkpoint = Checkpoint(checkpoints.sequence, versions.version, content, layout, arenas, slots)
    state.effects.append(WriteCheckpoint(checkpoints.last, checkpoint, first_needed))


def _first_needed(state: CoreState) -> int:
    """Give the oldest record that a recovery needs: of a gradient that is queued or held, else the next one."""
    first = state.checkpoints.sequence + 1
    if state.records is not None:
        # The oldest come first, and those that have a record before those that have none.
        waiting = [*(held.gradient for held in state.held[:1]), *([state.queue[0]] if state.queue else [])]
        first = min([first, *(gradient.sequence for gradient in waiting if gradient.sequence)])
    return first


def _copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    copy = lasting_empty(array.size, array.dtype)
    np.copyto(copy, array)
    return copy
