"""Handing out parameters: `get` with its wait for news, and `range` for the rest of a large reply (PROTOCOL 14, 15)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distgrad.errors import MalformedMessage
from distgrad.wire import RANGE_PARTS, State, field, parse_state
from distgrad_broker.events import RequestReceived
from distgrad_broker.requests import RequestError
from distgrad_broker.state import CoreState, Waiter

MAX_WAIT_S = 5.0


class PullWait:
    """What a waiting pull asked for."""

    __slots__ = ("have", "newer_than")

    def __init__(self, newer_than: State | None, have: int | None) -> None:
        self.newer_than = newer_than
        self.have = have


def get(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Answer `get` now or let it wait for a newer version.

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
        ``no_parameters``.
    MalformedMessage
        If a key has an impossible value.
    """
    header = request.header
    newer_than = header.get("newer_than")
    have: int | None = header.get("have")
    if have is not None and type(have) is not int:
        raise MalformedMessage(f"'have' must be a fingerprint or nil, got {have!r:.40}")
    wait_s = min(field(header, "wait_s", float, 0.0, low=0), MAX_WAIT_S)
    wanted = PullWait(None if newer_than is None else parse_state(newer_than), have)
    if state.versions.layout is None:
        raise RequestError("no_parameters", "no parameters were set yet; use set, or initialize from a worker")
    if _is_news(state, wanted):
        _serve(state, waiter, wanted, now)
    elif wait_s <= 0:
        state.answer(waiter, {"unchanged": True, "parts": 0, "first": 0, "token": None, "layout": False})
    else:
        waiter.deadline = now + wait_s
        waiter.data = wanted
        key = waiter.client or waiter.envelope
        former = state.pulls.pop(key, None)
        if former is not None:
            former.is_done = True  # a repeat replaces it: nobody listens for the former reply any more
        state.pulls[key] = waiter
        state.wait(waiter, lambda late, _: _give_up(state, key, late))


def read_range(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Answer `range`: the parts from one index on, of a version held under a token.

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
        ``revoked`` if the version is not held any more.
    MalformedMessage
        If a key has an impossible value.
    """
    token: str = field(request.header, "token", str)
    first: int = field(request.header, "first", int, low=0)
    found = state.versions.read(token, first, now)
    if found is None:
        raise RequestError("revoked", "the snapshot behind this token is gone; get again")
    parts, n_parts = found
    state.answer(waiter, {"parts": n_parts, "first": first}, parts)


def answer_all(state: CoreState, now: float) -> None:
    """Answer the pulls that wait for what has just happened.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    now : float
        Seconds on the shell's clock.
    """
    for key, waiter in list(state.pulls.items()):
        if state.versions.layout is None:
            del state.pulls[key]
            state.fail(waiter, RequestError("no_parameters", "the parameters were taken away"))
        elif _is_news(state, waiter.data):
            del state.pulls[key]
            _serve(state, waiter, waiter.data, now)


def _is_news(state: CoreState, wanted: PullWait) -> bool:
    known = wanted.newer_than
    if known is None or known.incarnation != state.incarnation or known.generation != state.generation:
        return True
    return state.versions.version > known.version


def _serve(state: CoreState, waiter: Waiter, wanted: PullWait, now: float) -> None:
    layout = state.versions.layout
    assert layout is not None  # both callers have looked
    token, parts, n_parts = state.versions.open(now)
    sends_layout = wanted.have != layout.fingerprint
    frames: Sequence[Any] = [layout.to_frame(), *parts] if sends_layout else parts
    fields = {"unchanged": False, "parts": n_parts, "first": 0, "token": token, "layout": sends_layout}
    assert len(parts) <= RANGE_PARTS
    state.answer(waiter, fields, frames)


def _give_up(state: CoreState, key: Any, waiter: Waiter) -> None:
    if state.pulls.get(key) is waiter:
        del state.pulls[key]
    state.answer(waiter, {"unchanged": True, "parts": 0, "first": 0, "token": None, "layout": False})
