"""Several gradients in one message: the same gradients, and nobody waits for long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad import Reader, wire
from distgrad.errors import MalformedMessage
from distgrad.gradient_messages import parse_gradients, single_headers, stored_gradient
from distgrad.wire import INLINE_BYTES, MAX_HEADER_BYTES, MAX_TOGETHER, State
from distgrad_broker import Broker
from distgrad_worker import Worker
from distgrad_worker.bundles import BUNDLE_BYTES, HASTE_S, Pace, messages
from distgrad_worker.headers import Header, checked_details
from distgrad_worker.window import Window

ENTRIES = st.lists(
    st.tuples(
        st.integers(0, 1),  # which header
        st.sampled_from([0, 4, 1000, 4000, INLINE_BYTES, INLINE_BYTES + 4]),
        st.sampled_from([None, 0.5]),
        st.sampled_from([None, b"x" * 4096, "é" * 4096]),
        st.none() | st.integers(0, 2),
        st.sampled_from([None, None, None, 7]),  # what it asks for
    ),
    max_size=80,
)


def taken_apart(message: list[Any]) -> list[wire.Gradient]:
    parts = [bytes(part) for part in message[1:]]
    return list(parse_gradients(wire.unpack(message[0]), parts, sum(map(len, parts))))


def told(gradient: wire.Gradient) -> Any:
    own = (gradient.number, gradient.loss, gradient.cursor, gradient.examples, [bytes(part) for part in gradient.parts])
    common = (gradient.worker, gradient.session, gradient.attempt, gradient.fingerprint, gradient.encoding)
    return own, common, gradient.base, gradient.size, gradient.charge, gradient.user, gradient.slot, gradient.asks


@given(entries=ENTRIES, shared=st.sets(st.integers(0, 2)))
def test_messages_have_what_the_same_gradients_have_alone(entries: list[Any], shared: set[int]) -> None:
    window = Window(None)
    headers = [Header("w", 7, State("one", 0, 3)), Header("w", 8, None)]
    for header in headers:
        header.address("one:1", 2)
    alone = Window(None)
    for number, (header, size, loss, cursor, slot, asks) in enumerate(entries):
        payload = bytes([number % 256]) * size
        parts = [payload] if size else []
        for each in (window, alone):
            each.add(headers[header], checked_details(loss, 1 + number % 2, cursor), parts, 1024, slot, asks)

    made = messages(window.send(1 << 30), shared)

    assert [told(one) for message in made for one in taken_apart(message)] == [
        told(one) for entry in alone.send(1 << 30) for one in taken_apart(entry.frames(shared))
    ]
    assert all(len(message[0]) <= MAX_HEADER_BYTES for message in made)
    assert all(len(taken_apart(message)) <= MAX_TOGETHER for message in made)


def test_small_gradients_do_share_a_message() -> None:
    window, header = Window(None), Header("w", 7, None)
    header.address("one:1", 1)
    for _ in range(20):
        window.add(header, {}, [bytes(4000)], 4000)

    counts = [len(taken_apart(message)) for message in messages(window.send(1 << 30))]

    assert sum(counts) == 20
    assert len(counts) == 2


def test_what_came_with_others_is_kept_as_if_it_had_come_alone() -> None:
    header = Header("w", 7, State("one", 0, 3))
    header.address("one:1", 1)
    details: list[dict[str, Any]] = [{"loss": 0.5}, {}, {"examples": 3, "cursor": b"x", "loss": 1.0}, {"cursor": "y"}]
    message = header.bundle(5, details, [b"abcd", b"efgh", b"ijkl", b"mnop"])

    gradients = taken_apart(message)
    for gradient, frame in zip(gradients, single_headers(gradients), strict=True):
        kept = stored_gradient(wire.unpack(frame), b"")
        assert told(kept) == told(gradient)
        assert kept.is_inline


@pytest.mark.parametrize(
    "keys",
    [
        {"count": 0},
        {"count": MAX_TOGETHER + 1},
        {"count": True},
        {"count": "2"},
        {"count": 3},
        {"payload": None},
        {"payload": "text"},
        {"number": 2**63 - 1},
        {"number": "1"},
        {"each": [{}]},
        {"each": {}},
        {"each": [{}, 1]},
        {"each": [{}, {"examples": -1}]},
        {"each": [{"loss": "much"}, {}]},
        {"each": [{}, {"cursor": bytes(5000)}]},
        {"slot": 1},
        {"worker": ""},
    ],
)
def test_an_impossible_bundle_is_refused_whole(keys: dict[str, Any]) -> None:
    header = {"v": 1, "kind": "gradient", "worker": "w", "session": "s", "attempt": 1, "number": 1, "fingerprint": 5}
    header |= {"count": 2, "payload": b"abcdefgh"}
    assert len(parse_gradients(header, [], 0)) == 2

    with pytest.raises(MalformedMessage):
        parse_gradients({**header, **keys}, [], 0)
    with pytest.raises(MalformedMessage):
        parse_gradients(header, [b"more"], 4)


def test_only_what_is_small_and_comes_in_haste_waits_for_more() -> None:
    window, pace, header = Window(None), Pace(), Header("w", 7, None)

    def push(now: float, size: int = 4000) -> bool:
        window.add(header, {}, [bytes(size)], size)
        return pace.may_wait(window, size, now)

    assert not push(10.0)  # the first one for long
    assert not push(10.0)  # in haste, but nothing is on the way that news could come of
    window.send(1 << 30)
    assert push(10.0 + HASTE_S / 2)
    assert not push(10.0 + HASTE_S / 2, INLINE_BYTES + 1)
    assert not push(10.0 + 2 * HASTE_S)
    window.send(1 << 30)
    now, n_waiting = 10.0 + 2 * HASTE_S, 0
    while push(now):
        n_waiting += 1
    assert BUNDLE_BYTES - 2 * 4100 < (n_waiting + 1) * 4000 <= BUNDLE_BYTES


def test_the_rest_of_a_burst_is_applied_though_nobody_asks_for_it() -> None:
    with Broker() as broker, Reader(broker.address) as reader, Worker(broker.address) as worker:
        worker.initialize(np.zeros(10, np.float32))
        for _ in range(100):
            worker.push(np.ones(10, np.float32))

        assert any(snapshot.version == 100 for snapshot in reader.follow())


def test_who_pulls_sends_what_waits() -> None:
    with Broker() as broker, Worker(broker.address) as worker:
        worker.initialize(np.zeros(10, np.float32))
        for _ in range(37):
            worker.push(np.ones(10, np.float32))

        assert worker.pull(own=True).version == 37
