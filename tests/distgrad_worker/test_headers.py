"""What is packed once and what each gradient adds is one msgpack map, whatever the values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad import gradient_messages, wire
from distgrad.errors import ConfigError, MalformedMessage
from distgrad.wire import INLINE_BYTES, State
from distgrad_worker.headers import Header, checked_details

NUMBERS = st.integers(1, 2**63 - 1)


def parsed(frames: list[Any]) -> wire.Gradient:
    parts = [bytes(frame) for frame in frames[1:]]
    return gradient_messages.parse_gradient(wire.unpack(frames[0]), parts, sum(len(part) for part in parts))


@given(
    worker=st.text("abc-é", min_size=1, max_size=128),
    number=NUMBERS,
    attempt=st.integers(1, 2**40),
    fingerprint=st.integers(0, 2**64 - 1),
    base=st.none() | st.builds(State, st.text(max_size=20), st.integers(0, 2**40), st.integers(0, 2**40)),
    loss=st.none() | st.floats(allow_nan=False),
    examples=st.integers(0, 2**40),
    cursor=st.none() | st.binary(max_size=80) | st.text(max_size=80),
    parts=st.lists(st.binary(max_size=40), max_size=3),
)
def test_a_header_comes_out_as_it_went_in(
    worker: str,
    number: int,
    attempt: int,
    fingerprint: int,
    base: State | None,
    loss: float | None,
    examples: int,
    cursor: bytes | str | None,
    parts: list[bytes],
) -> None:
    header = Header(worker, fingerprint, base)
    header.address("one:1", attempt)

    gradient = parsed(header.frames(number, checked_details(loss, examples, cursor), parts))

    assert (gradient.worker, gradient.number, gradient.attempt) == (worker, number, attempt)
    assert (gradient.session, gradient.fingerprint, gradient.base) == ("one:1", fingerprint, base)
    assert (gradient.loss, gradient.examples, gradient.cursor) == (loss, examples, cursor)
    assert (list(gradient.parts), gradient.size) == (parts, sum(len(part) for part in parts))


def test_a_new_attempt_is_seen_by_what_was_packed_before() -> None:
    header = Header("w", 7, None)
    for session, attempt in (("one:1", 1), ("one:1", 2), ("two:1", 2)):
        header.address(session, attempt)
        gradient = parsed(header.frames(1, {}, []))
        assert (gradient.session, gradient.attempt) == (session, attempt)


@pytest.mark.parametrize(("size", "frames"), [(0, 1), (INLINE_BYTES, 1), (INLINE_BYTES + 1, 2)])
def test_only_a_small_payload_of_one_part_travels_in_the_header(size: int, frames: int) -> None:
    header = Header("w", 7, None)
    header.address("one:1", 1)
    # The largest of everything else still leaves the header below its limit.
    details = checked_details(1.5, 2**62, "é" * 4096)

    message = header.frames(1, details, [bytes(size)])

    assert len(message) == frames
    assert len(message[0]) <= wire.MAX_HEADER_BYTES
    assert parsed(message).size == size
    assert len(header.frames(1, {}, [b"a", b"b"])) == 3


def test_a_payload_in_the_header_and_one_behind_it_are_no_gradient() -> None:
    header = Header("w", 7, None)
    header.address("one:1", 1)
    fields = wire.unpack(header.frames(1, {}, [b"abcd"])[0])

    with pytest.raises(MalformedMessage):
        gradient_messages.parse_gradient(fields, [b"efgh"], 4)
    for payload in ("text", 5, [b"abcd"]):
        with pytest.raises(MalformedMessage):
            gradient_messages.parse_gradient({**fields, "payload": payload}, [], 0)


@pytest.mark.parametrize(
    ("loss", "examples", "cursor"),
    [
        *((None, examples, None) for examples in (-1, 2**63, 2.5, float("nan"), float("inf"), "3", None, [1])),
        *((loss, 1, None) for loss in ("low", [0.5, 0.5], np.zeros(2))),
        *((None, 1, cursor) for cursor in (bytes(5000), 7)),
    ],
)
def test_impossible_details_are_refused_at_the_call(loss: Any, examples: Any, cursor: Any) -> None:
    with pytest.raises(ConfigError):
        checked_details(loss, examples, cursor)


def test_numbers_of_any_kind_are_taken() -> None:
    details = checked_details(np.float32(0.5), np.int64(32), None)  # type: ignore[arg-type]
    assert details == {"loss": 0.5, "examples": 32}
    assert checked_details(None, 32.0, None) == {"examples": 32}  # type: ignore[arg-type]
