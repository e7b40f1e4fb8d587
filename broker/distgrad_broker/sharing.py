"""The operation `share`: a worker on the broker's host tells of a slot that its gradients will lie in."""

from __future__ import annotations

from distgrad.shared_pages import Unavailable
from distgrad.wire import field
from distgrad_broker import leasing
from distgrad_broker.callers import member_of
from distgrad_broker.events import RequestReceived
from distgrad_broker.members import Member
from distgrad_broker.requests import RequestError
from distgrad_broker.state import CoreState
from distgrad_broker.waiting import Waiter


def share(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Answer `share`.

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
        ``unavailable`` if the broker cannot attach to the slot, ``crowded`` if one is as much as there is room for,
        ``no_parameters``, or if the session is not the current one.
    MalformedMessage
        If a key is missing or has an impossible value.
    """
    member = member_of(state, request)
    slot: int = field(request.header, "slot", int, low=0)
    layout, slots = state.versions.layout, state.slots
    if layout is None:
        raise RequestError("no_parameters", "no parameters were set yet; there is nothing to share")
    if slots is None or layout.fingerprint != request.header.get("fingerprint"):
        raise RequestError("unavailable" if slots is None else "layout", "no slot of this layout can be shared")
    if state.grants.uses_turns and slots.known(member.worker, member.session, layout) - {slot}:
        # Memory that is shared counts as the queue's, which has no room for a gradient of each worker as it is.
        raise RequestError("crowded", "the queue's bytes allow no second slot of a worker; use the first, or send")
    try:
        member.slots = slots.attach(member.worker, member.session, slot, request.header.get("address"), layout)
    except Unavailable as error:
        raise RequestError("unavailable", f"memory cannot be shared: {error}") from error
    state.answer(waiter, {"slots": member.slots})


def forget(state: CoreState, member: Member) -> None:
    """Let go of the slots and the lease of a worker that is gone, or whose session is over.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Whose they are.
    """
    member.slots = ()
    leasing.end(state, member.worker)
    if state.slots is not None:
        state.slots.forget(member.worker)
