"""The core's memory: the budget, replies that are given once, and deadlines in order."""

from __future__ import annotations

import pytest

from distgrad_broker.events import Reply
from distgrad_broker.requests import RequestError
from distgrad_broker.state import DEFAULT_QUEUE_BYTES, CoreState
from distgrad_broker.waiting import Waiter
from support.core_kit import Kit


def state() -> CoreState:
    return Kit().state


def test_by_default_the_budget_is_two_gradients_and_no_less_than_256_mib() -> None:
    memory = state()

    memory.resize_budget(1000)
    assert memory.grants.budget_bytes == DEFAULT_QUEUE_BYTES == 256 << 20
    memory.resize_budget(DEFAULT_QUEUE_BYTES)
    assert memory.grants.budget_bytes == 2 * DEFAULT_QUEUE_BYTES


def test_a_given_budget_is_not_stretched() -> None:
    memory = Kit(queue_bytes=5000).state

    assert memory.check_budget(5000) == (5000, 5000)
    with pytest.raises(RequestError, match="raise it to at least 5001") as caught:
        memory.resize_budget(5001)
    assert caught.value.code == "too_large"
    assert memory.grants.budget_bytes == 5000


def test_a_reply_is_given_once() -> None:
    memory = state()
    waiter = Waiter((b"who", b""), 7, None, 0.0)

    memory.answer(waiter, {"first": True})
    memory.fail(waiter, RequestError("failed", "second"))

    (reply,) = memory.effects
    assert isinstance(reply, Reply)
    assert (reply.header["id"], reply.header["first"], reply.header["ok"]) == (7, True, True)


def test_an_error_tells_the_state_too() -> None:
    memory = state()

    header = memory.error_header(None, RequestError("invalid", "no", {"allowed": [1]}))

    told = {key: header[key] for key in ("ok", "error", "message", "detail", "incarnation", "running")}
    assert told == {
        **{"ok": False, "error": "invalid", "message": "no", "detail": {"allowed": [1]}},
        **{"incarnation": "one", "running": True},
    }


def test_deadlines_come_in_order_and_pass_over_those_who_were_answered() -> None:
    memory = state()
    waiters = [Waiter((b"%d" % index, b""), None, None, deadline) for index, deadline in enumerate((3.0, 1.0, 2.0))]
    for waiter in waiters:
        memory.deadlines.wait(waiter, lambda late, now: None)
    memory.answer(waiters[1], {})

    assert memory.deadlines.next() == 2.0
    assert memory.deadlines.due(1.9) == []
    assert memory.deadlines.due(3.0) == [waiters[2], waiters[0]]
    assert memory.deadlines.next() is None
