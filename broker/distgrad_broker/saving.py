"""The operation `save`: parameters to a file, or a checkpoint."""

from __future__ import annotations

import logging

from distgrad_broker import checkpoints
from distgrad_broker.events import RequestReceived, SaveEnded, SaveParameters
from distgrad_broker.requests import RequestError
from distgrad_broker.state import CoreState
from distgrad_broker.waiting import Waiter


def save(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Have the file thread write the parameters: to the file that the broker was started with, or a checkpoint.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    request : RequestReceived
        As it came.
    waiter : Waiter
        To answer.
    now : float
        Seconds on the shell's clock.

    Raises
    ------
    RequestError
        If there are none, no place to write to, or another save is under way.
    """
    if state.settings.save_path is None and state.settings.data is None:
        raise RequestError(
            "invalid", "the broker was started without --save FILE and --data DIR, so it has no place to write to"
        )
    if state.versions.layout is None:
        raise RequestError("no_parameters", "no parameters were set yet")
    if state.settings.data is not None:
        checkpoints.want(state, is_urgent=True)
        checkpoints.retry(state)
    if state.settings.save_path is None:
        checkpoints.when_written(state, waiter, lambda error: _end_checkpoint(state, waiter, error), now)
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
