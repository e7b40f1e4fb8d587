"""Many workers offer the first parameters at once: one is asked to send them, the others wait for the outcome.

Without this every worker would send the whole model and the broker would throw all but one away, after having had
all of them in memory.
"""

from __future__ import annotations

from distgrad.wire import field
from distgrad_broker.events import RequestReceived
from distgrad_broker.state import CoreState
from distgrad_broker.waiting import Waiter

MAX_WAIT_S = 5.0
# Whoever was asked has this long to send, and a second more for each megabyte; then another one is asked.
SEND_WITHIN_S = 5.0
SLOW_BYTES_PER_S = 1e6


def offer(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Tell a client whether to send the parameters that it has; wait while another one was asked to.

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
    MalformedMessage
        If a key has an impossible value.
    """
    size: int = field(request.header, "bytes", int, 0, low=0)
    wait_s = min(field(request.header, "wait_s", float, 0.0, low=0), MAX_WAIT_S)
    key = waiter.client or waiter.envelope
    former = state.offers.pop(key, None)
    if former is not None:
        former.is_done = True  # a repeat replaces it
    if state.versions.layout is not None:
        state.answer(waiter, {"wanted": False})
    elif state.asked is None or state.asked[0] == key or now >= state.asked[1]:
        state.asked = (key, now + SEND_WITHIN_S + size / SLOW_BYTES_PER_S)
        state.answer(waiter, {"wanted": True})
    elif wait_s <= 0:
        state.answer(waiter, {"wanted": False})
    else:
        waiter.deadline = min(now + wait_s, state.asked[1])
        state.offers[key] = waiter

        def give_up(late: Waiter, _: float) -> None:
            state.offers.pop(key, None)
            state.answer(late, {"wanted": False})

        state.deadlines.wait(waiter, give_up)


def end(state: CoreState) -> None:
    """Tell those who wait that parameters were set.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    """
    state.asked = None
    waiters = list(state.offers.values())
    state.offers.clear()
    for waiter in waiters:
        state.answer(waiter, {"wanted": False})
