"""Whatever arrives on either channel, the broker goes on: it counts, it answers where it can, it changes nothing."""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from distgrad import Admin
from distgrad.errors import GradientRefused
from distgrad.layout import Layout
from distgrad_broker import Broker
from distgrad_broker.operations import OPERATIONS
from distgrad_worker import Worker

START = {"deep": [np.zeros(3, np.float32), np.zeros(2, np.float64)], "w": np.zeros((2, 2), np.float32)}
LAYOUT = Layout.of(START)
FLOATS = np.arange(7, dtype="<f4").tobytes()
DOUBLES = np.arange(2, dtype="<f8").tobytes()
CODES = {"malformed", "unknown_op", "invalid", "restarted", "unknown_worker", "no_parameters", "revoked", "fenced"}

JUNK: dict[str, list[bytes]] = {
    "nothing": [b""],
    "nothing twice": [b"", b""],
    "noise": [bytes(range(256))],
    "text": [b"GET / HTTP/1.1\r\n\r\n"],
    "not a map": [msgpack.packb([1, 2])],
    "a number": [msgpack.packb(7)],
    "a map and more": [msgpack.packb({"v": 1}) + b"\x00"],
    "cut short": [msgpack.packb({"v": 1, "op": "status"})[:-3]],
    "a map with a number as key": [msgpack.packb({"v": 1, 5: 6})],
    "a map with a map as key": [b"\x82\xa1v\x01\x80\x01"],
    "bad text": [b"\x81\xa1v\xa2\xff\xfe"],
    "an extension type": [msgpack.packb({"v": 1, "op": msgpack.ExtType(5, b"xyz")})],
    "a time stamp": [b"\x82\xa1v\x01\xa2op\xd7\xff" + bytes(8)],
    "a claim of 4 G entries": [b"\xdf\xff\xff\xff\xff"],
    "a claim of 4 GB": [b"\x81\xa1v\xc6\xff\xff\xff\xff"],
    "deep arrays": [b"\x91" * 60_000],
    "deep maps": [b"\x81\xa1v" * 20_000 + b"\x01"],
    "oversized": [msgpack.packb({"v": 1, "op": "status", "x": bytes(70_000)})],
    "very oversized": [bytes(4_000_000)],
    "another version": [msgpack.packb({"v": 2, "op": "status", "kind": "gradient"})],
    "a version that is true": [msgpack.packb({"v": True, "op": "status"})],
    "no version": [msgpack.packb({"op": "status"})],
    "neither request nor gradient": [msgpack.packb({"v": 1})],
    "thousands of frames": [bytes(10)] * 5_000,
}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker(parameters=START, queue_bytes=1 << 20) as running:
        yield running


@pytest.fixture
def admin(broker: Broker) -> Iterator[Admin]:
    with Admin(broker.address, timeout=20) as connected:
        yield connected


class Peer:
    """Sends any frames it likes: a DEALER for control, which adds nothing to them, and a PUSH for gradients."""

    def __init__(self, broker: Broker) -> None:
        self._context = zmq.Context()
        self.control = self._context.socket(zmq.DEALER)
        self.gradients = self._context.socket(zmq.PUSH)
        for socket, endpoint in ((self.control, broker.address), (self.gradients, broker.gradients)):
            socket.linger = 0
            socket.connect(endpoint)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def ask(self, op: object, *frames: bytes, **keys: Any) -> dict[str, Any]:
        return self.ask_raw(msgpack.packb({"v": 1, "op": op, **keys}), *frames)

    def ask_raw(self, *frames: bytes) -> dict[str, Any]:
        self.control.send_multipart([b"", *frames])
        assert self.control.poll(20_000), "no answer"
        empty, header, *_ = self.control.recv_multipart()
        assert empty == b""
        return dict(msgpack.unpackb(header))


@pytest.fixture
def peer(broker: Broker) -> Iterator[Peer]:
    with Peer(broker) as connected:
        yield connected


def wait_until(admin: Admin, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while not is_so(status := admin.status()):
        assert time.monotonic() < deadline, status
    return status


def check_it_still_trains(broker: Broker, admin: Admin) -> None:
    """Parameters are what they were, and a worker's gradient is applied as ever."""
    before = admin.get_model_parameters()
    np.testing.assert_array_equal(before["w"], START["w"])
    assert admin.status()["version"] == 0
    with Worker(broker.address) as worker:
        worker.push({"deep": [np.ones(3), np.ones(2)], "w": np.ones((2, 2))})
        worker.flush(timeout=20)
    assert admin.get_model_parameters()["w"].tolist() == [[-1, -1], [-1, -1]]


def test_junk_on_the_control_channel_is_answered_and_counted(broker: Broker, admin: Admin, peer: Peer) -> None:
    for frames in JUNK.values():
        reply = peer.ask_raw(*frames)
        assert reply["ok"] is False
        assert reply["error"] in ("malformed", "protocol", "unknown_op")
        assert reply["message"]

    assert sum(admin.status()["rejected"].values()) == len(JUNK)
    check_it_still_trains(broker, admin)


def test_another_protocol_version_is_told_so(peer: Peer) -> None:
    assert peer.ask_raw(msgpack.packb({"v": 2, "op": "status"}))["error"] == "protocol"


def test_an_unknown_operation_is_told_the_known_ones(peer: Peer) -> None:
    reply = peer.ask("frobnicate")

    assert reply["error"] == "unknown_op"
    assert all(op in reply["message"] for op in OPERATIONS)


def test_odd_envelopes_are_dropped_or_answered_and_the_channel_goes_on(
    broker: Broker, admin: Admin, peer: Peer
) -> None:
    status = msgpack.packb({"v": 1, "op": "status", "id": 1})
    for frames in ([status], [b"x"] * 3, [b"x"] * 1_000, [b"x"] * 20 + [b"", status], [bytes(4_000_000)] * 3):
        peer.control.send_multipart(frames)
    wait_until(admin, lambda told: told["rejected"].get("malformed") == 5)
    assert not peer.control.poll(0), "without an envelope there is no way back"

    for before in ([], [b"correlation"], [b"one", b"two", b"three"]):
        peer.control.send_multipart([*before, b"", status])
        assert peer.control.poll(20_000)
        *envelope, empty, header = peer.control.recv_multipart()
        assert [*envelope, empty] == [*before, b""]
        assert msgpack.unpackb(header)["ok"]
    check_it_still_trains(broker, admin)


def test_a_peer_that_asks_and_never_reads_does_not_hold_up_others(broker: Broker, admin: Admin, peer: Peer) -> None:
    peer.control.rcvhwm = 1
    status = msgpack.packb({"v": 1, "op": "status"})
    for _ in range(20_000):
        peer.control.send_multipart([b"", status])

    check_it_still_trains(broker, admin)


@pytest.mark.parametrize("op", sorted(set(OPERATIONS) - {"destroy"}))
def test_every_operation_answers_impossible_values(admin: Admin, peer: Peer, op: str) -> None:
    me = admin.status()["incarnation"]
    nonce = os.urandom(16)
    session = peer.ask("hello", worker="w", nonce=nonce)["session"]
    usual = {
        "worker": "w", "nonce": nonce, "session": session, "incarnation": me, "lowest": 0, "generated": False,
        "attempt": 1, "sent": 0, "settled": 0, "grant_seq": 0, "held": 0, "want": 0, "until": 0, "wait_s": 0.0,
        "fingerprint": 1, "newer_than": None, "have": None, "token": "s1", "first": 0, "if_absent": False,
        "drain": False, "settings": {}, "client": b"0123456789abcdef", "id": 1,
    }  # fmt: skip
    values: list[Any] = [
        None, -1, 2**64 - 1, -(2**63), 1.5, math.nan, math.inf, -math.inf, False, "", "x" * 5_000, "\0", b"", b"\xff",
        [], [[]], ["a", 1, 2], [1, 2, 3], ["a", 1, "b"], {}, {"mode": "x"}, {"mode": []}, {"lr": -1}, {"x": {}},
    ]  # fmt: skip
    serial = 1
    for key in (*usual, "op"):
        for value in values:
            serial += 1
            request = {**usual, "op": op, "id": serial, key: value}
            reply = peer.ask_raw(msgpack.packb({"v": 1, **request}), *([b"\x80", b"1234"] if op == "set" else []))
            assert reply["ok"] or reply["error"] in CODES, request

    assert admin.status()["has_parameters"]
    assert np.isfinite(admin.get_model_parameters()["w"]).all()


@pytest.mark.parametrize(
    "layout",
    [
        b"", b"\x80", b"\x91" * 50_000, msgpack.packb({"leaves": []}), bytes(100),
        msgpack.packb({"leaves": [["w", [2**62], "float64"]], "structure": 0}),
        msgpack.packb({"leaves": [["w", [2**31, 2**31, 2**31], "float64"]], "structure": 0}),
        msgpack.packb({"leaves": [["w", [-1], "float32"]], "structure": 0}),
        msgpack.packb({"leaves": [["w", [1], "object"]], "structure": 0}),
        msgpack.packb({"leaves": [["w", [1], "complex64"]], "structure": 0}),
        msgpack.packb({"leaves": [["w", [1], "float32"]], "structure": 5}),
        msgpack.packb({"leaves": [["w", [1], "float32"]], "structure": ["dict", [["w", ["list", []]]]]}),
        msgpack.packb({"leaves": [["w", [1], "float32"], ["w", [1], "float32"]], "structure": ["list", [0, 1]]}),
    ],
)  # fmt: skip
def test_impossible_layouts_are_refused_and_the_parameters_stay(
    broker: Broker, admin: Admin, peer: Peer, layout: bytes
) -> None:
    me = admin.status()["incarnation"]

    reply = peer.ask("set", layout, bytes(4), incarnation=me)

    assert reply["error"] in ("malformed", "too_large", "invalid")
    check_it_still_trains(broker, admin)


def test_junk_on_the_gradients_channel_is_dropped_and_counted(broker: Broker, admin: Admin, peer: Peer) -> None:
    for frames in JUNK.values():
        peer.gradients.send_multipart(frames)
        peer.gradients.send_multipart([*frames, FLOATS, DOUBLES])

    wait_until(admin, lambda status: sum(status["rejected"].values()) == 2 * len(JUNK))
    check_it_still_trains(broker, admin)


def test_impossible_values_in_a_gradients_header_are_dropped_and_counted(
    broker: Broker, admin: Admin, peer: Peer
) -> None:
    session = peer.ask("hello", worker="w", nonce=os.urandom(16))["session"]
    good = {
        "v": 1, "kind": "gradient", "worker": "w", "session": session, "attempt": 1, "number": 1,
        "fingerprint": LAYOUT.fingerprint, "base": None, "encoding": "raw", "examples": 1, "loss": None, "cursor": None,
    }  # fmt: skip
    bad: list[tuple[str, Any]] = [
        ("kind", "something"), ("kind", None), ("worker", ""), ("worker", "x" * 129), ("worker", 5), ("worker", None),
        ("session", 1), ("session", None), ("attempt", 0), ("attempt", "1"), ("attempt", True), ("number", 0),
        ("number", -1), ("number", 2**64 - 1), ("number", 1.0), ("fingerprint", None), ("fingerprint", "x"),
        ("base", "x"), ("base", [1, 2, 3]), ("base", ["a", 1]), ("encoding", None), ("encoding", 5), ("examples", -1),
        ("examples", 2**63), ("examples", "1"), ("loss", "x"), ("loss", []), ("cursor", 5), ("cursor", bytes(4097)),
    ]  # fmt: skip
    for key, value in bad:
        peer.gradients.send_multipart([msgpack.packb({**good, key: value}), FLOATS, DOUBLES])
    for stranger in ({"worker": "nobody"}, {"session": "other:1"}, {"session": ""}, {"number": 7}):
        peer.gradients.send_multipart([msgpack.packb({**good, **stranger}), FLOATS, DOUBLES])

    wait_until(admin, lambda status: status["rejected"].get("malformed") == len(bad))
    wait_until(admin, lambda status: sum(status["dropped"].values()) == 4)
    # Gives its grant back, which would otherwise be waited for until its lease ends.
    assert peer.ask("leave", worker="w", session=session, incarnation=admin.status()["incarnation"])["ok"]
    check_it_still_trains(broker, admin)


def test_bad_payloads_are_refused_whole_by_reason_and_the_workers_good_gradients_go_on(
    admin: Admin, peer: Peer
) -> None:
    told = peer.ask("hello", worker="w", nonce=os.urandom(16))
    mine = {"worker": "w", "session": told["session"], "attempt": 1}
    nan, infinite = struct.pack("<7f", *[0.0] * 6, math.nan), struct.pack("<2d", 0.0, -math.inf)
    cases: list[tuple[str, list[bytes], dict[str, Any]]] = [
        ("truncated", [FLOATS], {}),
        ("truncated", [], {}),
        ("truncated", [FLOATS, DOUBLES[:-1]], {}),
        ("too_large", [FLOATS, DOUBLES, b"x"], {}),
        ("too_large", [FLOATS, DOUBLES, DOUBLES], {}),
        ("malformed", [FLOATS[:5], FLOATS[5:], DOUBLES], {}),
        ("malformed", [FLOATS + DOUBLES], {}),
        ("malformed", [FLOATS[:24], FLOATS[24:] + DOUBLES], {}),
        ("not_finite", [nan, DOUBLES], {}),
        ("not_finite", [FLOATS, infinite], {}),
        ("layout", [FLOATS, DOUBLES], {"fingerprint": 1}),
        ("layout", [b"abc"], {"fingerprint": 2**63}),
        ("encoding", [FLOATS, DOUBLES], {"encoding": "zip"}),
    ]
    for number, (_, parts, changes) in enumerate(cases, 1):
        header = {"v": 1, "kind": "gradient", **mine, "number": number, "fingerprint": LAYOUT.fingerprint, **changes}
        peer.gradients.send_multipart([msgpack.packb(header), *parts])
    # Also without any part of a kilobyte, and cut in ways that wire.md allows.
    good = {"v": 1, "kind": "gradient", **mine, "number": len(cases) + 1, "fingerprint": LAYOUT.fingerprint}
    peer.gradients.send_multipart([msgpack.packb(good), FLOATS[:4], b"", FLOATS[4:], DOUBLES[:8], DOUBLES[8:]])

    beat = {"sent": len(cases) + 1, "settled": 0, "grant_seq": told["grant_seq"], "held": told["grant"]}
    status = wait_until(admin, lambda status: status["applied"] == 1)
    reply = peer.ask("heartbeat", **mine, **beat, fingerprint=LAYOUT.fingerprint)

    assert [(number, reason) for number, reason, _, _ in reply["refused"]] == [
        (number, reason) for number, (reason, _, _) in enumerate(cases, 1)
    ]
    leaves = {number: leaf for number, _, leaf, _ in reply["refused"]}
    assert (leaves[9], leaves[10]) == ("w", "deep.1")
    assert sum(status["refused"].values()) == len(cases)
    assert status["version"] == 1
    parameters = admin.get_model_parameters()
    assert parameters["deep"][0].tolist() == [0, -1, -2]
    assert parameters["w"].tolist() == [[-3, -4], [-5, -6]]
    assert parameters["deep"][1].tolist() == [0, -1]


def test_a_refusal_is_raised_by_the_next_call_whichever_it_is(broker: Broker) -> None:
    def bad() -> dict[str, Any]:
        return {"deep": [np.zeros(3), np.array([0.0, np.nan])], "w": np.zeros((2, 2))}

    def push_and_let_it_be_refused(worker: Worker) -> None:
        number = worker.push(bad())
        while worker.settled < number:
            pass

    with Worker(broker.address) as worker:
        calls: list[Callable[[], object]] = [
            lambda: worker.push(START), worker.pull, worker.flush, lambda: worker.initialize(START)
        ]  # fmt: skip
        for call in calls:
            push_and_let_it_be_refused(worker)
            with pytest.raises(GradientRefused, match="nan") as caught:
                call()
            assert (caught.value.reason, caught.value.leaf) == ("not_finite", "deep.1")
            assert caught.value.number == worker.settled
        worker.push({"deep": [np.ones(3), np.ones(2)], "w": np.ones((2, 2))})
        worker.flush()
        assert worker.pull().parameters["w"].tolist() == [[-1, -1], [-1, -1]]

    closing = Worker(broker.address)
    closing.push(bad())
    with pytest.raises(GradientRefused):
        closing.close()
    with Admin(broker.address) as admin:
        assert admin.status()["refused"] == {"not_finite": 5}
        assert admin.status()["version"] == 1
