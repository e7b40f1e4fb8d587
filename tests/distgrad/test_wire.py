"""Headers: bounded, checked, and never believed."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad import gradient_messages, wire
from distgrad.errors import MalformedMessage, WrongProtocol

HEADER: dict[str, Any] = {
    **{"v": 1, "kind": "gradient", "worker": "w", "session": "one:1", "attempt": 1, "number": 1, "base": ["one", 0, 3]},
    **{"fingerprint": 7, "encoding": "raw", "examples": 2, "loss": 0.5, "cursor": b"here"},
}
ODD_BASES: list[Any] = [1, [], ["one", 0], ["one", 0, 0, 0], [b"one", 0, 0], ["one", True, 0], {}]


def parse(**keys: Any) -> wire.Gradient:
    header = {key: value for key, value in {**HEADER, **keys}.items() if value is not ...}
    return gradient_messages.parse_gradient(wire.unpack(wire.pack(header)), [b"1234"], 4, "key")


def test_a_header_comes_back_as_it_was_packed() -> None:
    header = {"v": 1, "text": "é", "bytes": b"\x00", "none": None, "list": [1, -1, 2**63], "map": {"a": 1.5}}

    assert wire.unpack(wire.pack(header)) == header
    assert wire.unpack(memoryview(wire.pack(header))) == header


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (msgpack.packb({"v": 1})[:-1], "not msgpack"),
        (msgpack.packb({"v": 1}) + b"\x00", "not msgpack"),
        (b"\x91" * 60_000, "not msgpack"),
        (b"\x81" * 60_000, "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),
        (b"\xdf\xff\xff\xff\xff", "not msgpack"),
        (b"\x81\x80\x01", "not msgpack"),
        (b"\x81\xa1\xff\x01", "not msgpack"),
        (b"\x81\x01\x01", "not msgpack"),
        (msgpack.packb([1]), "a map, got list"),
        (msgpack.packb(7), "a map, got int"),
        (msgpack.packb(None), "a map, got NoneType"),
        (bytes(wire.MAX_HEADER_BYTES + 1), "at most 65536 bytes, got 65537"),
    ],
)
def test_what_is_no_header_is_malformed(frame: bytes, message: str) -> None:
    with pytest.raises(MalformedMessage, match=message):
        wire.unpack(frame)


@pytest.mark.parametrize("version", [0, 2, None, "1", True, 1.0, [1], ...])
def test_another_protocol_version_is_named(version: Any) -> None:
    frame = wire.pack({} if version is ... else {"v": version})

    with pytest.raises(WrongProtocol, match="protocol version must be 1"):
        wire.unpack(frame)


def test_a_long_odd_version_is_cut_in_the_message() -> None:
    with pytest.raises(WrongProtocol) as caught:
        wire.unpack(wire.pack({"v": "x" * 10_000}))
    assert len(str(caught.value)) < 200


def test_a_gradients_header_is_read() -> None:
    gradient = parse()

    assert (gradient.worker, gradient.session, gradient.attempt, gradient.number) == ("w", "one:1", 1, 1)
    assert gradient.base == wire.State("one", 0, 3)
    assert (gradient.fingerprint, gradient.encoding, gradient.examples) == (7, "raw", 2)
    assert (gradient.loss, gradient.cursor, gradient.user) == (0.5, b"here", "key")
    assert (gradient.size, gradient.charge, list(gradient.parts)) == (4, wire.MIN_CHARGE_BYTES, [b"1234"])


def test_what_may_be_left_out_has_a_default() -> None:
    gradient = parse(base=..., encoding=..., examples=..., loss=..., cursor=...)

    assert (gradient.base, gradient.encoding, gradient.examples) == (None, "raw", 1)
    assert (gradient.loss, gradient.cursor) == (None, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("kind", value) for value in (..., None, "hello", b"gradient")],
        *[("worker", value) for value in (..., None, "", "x" * 129, b"w", 1, ["w"])],
        *[("session", value) for value in (..., None, 1, b"one:1")],
        *[("attempt", value) for value in (..., None, 0, -1, 1.0, True, "1")],
        *[("number", value) for value in (..., None, 0, -1, 2**63, 1.0, True, "1")],
        *[("fingerprint", value) for value in (..., None, 1.0, "7", True)],
        *[("encoding", value) for value in (None, 1, b"raw")],
        *[("examples", value) for value in (None, -1, 2**63, 1.0, True, "1")],
        *[("loss", value) for value in ("low", True, [1.0])],
        *[("cursor", value) for value in (1, True, [b"x"])],
        *[("asks", value) for value in (-1, 2**63, 1.0, True, "1")],
        ("cursor", b"x" * 4097),
        ("cursor", "x" * 4097),
        *[("base", value) for value in ODD_BASES],
    ],
)
def test_a_gradient_with_a_missing_or_impossible_value_is_malformed(key: str, value: Any) -> None:
    with pytest.raises(MalformedMessage):
        parse(**{key: value})


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 3, -(2**63)])
def test_any_number_is_a_loss(loss: float) -> None:
    assert parse(loss=loss).loss is not None


@pytest.mark.parametrize(("size", "charged"), [(0, 1024), (1024, 1024), (1025, 1025), (10**12, 10**12)])
def test_a_gradient_is_charged_its_payload_and_at_least_1024_bytes(size: int, charged: int) -> None:
    assert wire.charge(size) == charged
    assert gradient_messages.parse_gradient(dict(HEADER), [], size).charge == charged


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((int, value) for value in (0, 7, 2**63 - 1)),
        *((float, value) for value in (0.0, 1, 2.5, float("inf"))),
        *((str, value) for value in ("", "text")),
        *((bytes, value) for value in (b"", b"x")),
        *((bool, value) for value in (True, False)),
        (dict, {}),
        (list, []),
    ],
)
def test_a_field_of_the_right_type_is_given_back(kind: type, value: Any) -> None:
    assert wire.field({"key": value}, "key", kind) == value


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "'key' must be an integer, got True"),
        (int, 1.0, "an integer"),
        (int, "1", "an integer"),
        (float, "1", "a number"),
        (float, True, "a number"),
        (str, b"text", "text, got"),
        (bytes, "text", "bytes, got"),
        (bool, 1, "true or false"),
        (dict, [], "a map, got"),
        (int, -1, "at least 0"),
        (float, float("nan"), "at least 0"),
        (int, 2**63, "fit in 63 bits"),
        (str, None, "text, got None"),
    ],
)
def test_a_field_of_another_type_or_range_is_named(kind: type, value: Any, message: str) -> None:
    with pytest.raises(MalformedMessage, match=message):
        wire.field({"key": value}, "key", kind, low=0 if kind in (int, float) else None)


def test_a_missing_field_is_its_default_or_an_error() -> None:
    assert wire.field({}, "key", int, 3) == 3
    assert wire.field({"key": None}, "key", int, 3) == 3
    assert wire.field({"key": 0}, "key", int, 3) == 0
    with pytest.raises(MalformedMessage, match="'key'"):
        wire.field({}, "key", int)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
def test_no_frame_makes_unpack_fail_otherwise_than_by_saying_so(frame: bytes) -> None:
    try:
        header = wire.unpack(frame)
    except MalformedMessage:
        return
    assert header["v"] == 1


PLAIN = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1)),
        *(st.floats(), st.text(max_size=6), st.binary(max_size=6)),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(list(HEADER)), PLAIN, max_size=4), st.booleans())
def test_no_header_makes_a_gradient_that_breaks_what_is_promised(odd: dict[str, Any], is_whole: bool) -> None:
    header = {**(HEADER if is_whole else {}), **odd}
    try:
        gradient = gradient_messages.parse_gradient(header, [b"x"], 1)
    except MalformedMessage:
        return

    assert isinstance(gradient.worker, str)
    assert 0 < len(gradient.worker) <= wire.MAX_ID_CHARACTERS
    assert gradient.number >= 1
    assert gradient.attempt >= 1
    assert gradient.examples >= 0
    assert gradient.cursor is None or len(gradient.cursor) <= wire.MAX_CURSOR_BYTES
    assert gradient.base is None or isinstance(gradient.base, wire.State)


@settings(max_examples=200, deadline=None)
@given(PLAIN, st.sampled_from([int, float, str, bytes, bool, dict]), st.sampled_from([None, 0, 1]))
def test_a_field_is_of_its_type_or_malformed(value: Any, kind: type, low: int | None) -> None:
    try:
        got = wire.field({"key": value}, "key", kind, low=low if kind in (int, float) else None)
    except MalformedMessage:
        return
    assert type(got) is kind or (kind is float and type(got) is int)
