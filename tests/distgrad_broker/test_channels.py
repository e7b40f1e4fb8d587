"""Tests of `distgrad_broker.channels`; what hostile peers send is in the scenarios."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq

from distgrad import sockets
from distgrad.gradient_messages import stored_gradient
from distgrad.wire import Gradient, pack, unpack
from distgrad_broker.channels import COPY_BELOW_BYTES, ControlChannel, GradientChannel
from distgrad_broker.events import BadRequestReceived, MessageRejected, Reply, RequestReceived

HEADER = {"v": 1, "kind": "gradient", "worker": "w", "session": "s", "attempt": 1, "number": 1, "fingerprint": 5}


class Wire:
    """Both ends of both channels."""

    def __init__(self) -> None:
        self.context = sockets.open_context()
        self.control = sockets.control_server(self.context, "tcp://127.0.0.1:0")
        self.gradients = sockets.gradient_server(self.context, "tcp://127.0.0.1:0")
        self.asker = self.context.socket(zmq.DEALER)
        self.pusher = self.context.socket(zmq.PUSH)
        for socket, server in ((self.asker, self.control), (self.pusher, self.gradients)):
            socket.linger = 0
            socket.connect(server.endpoint)

    def close(self) -> None:
        for socket in (self.asker, self.pusher, self.control, self.gradients):
            socket.close()
        self.context.term()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def receive(channel: ControlChannel | GradientChannel) -> Any:
    assert channel.socket.poll(20_000)
    return channel.receive()


def test_without_anything_to_read_there_is_nothing(wire: Wire) -> None:
    assert GradientChannel(wire.gradients, None).receive() is None
    assert ControlChannel(wire.control, None).receive() is None


def receive_one(channel: GradientChannel) -> Gradient:
    (gradient,) = receive(channel)
    assert isinstance(gradient, Gradient)
    return gradient


def test_a_gradient_comes_with_its_parts_and_its_size(wire: Wire) -> None:
    channel = GradientChannel(wire.gradients, None)

    wire.pusher.send_multipart([pack(HEADER), b"12345678", b"", b"abcd"])

    gradient = receive_one(channel)
    assert [bytes(part) for part in gradient.parts] == [b"12345678", b"", b"abcd"]
    assert (gradient.worker, gradient.number, gradient.size, gradient.user) == ("w", 1, 12, None)


def test_small_and_large_payloads_may_alternate(wire: Wire) -> None:
    channel = GradientChannel(wire.gradients, None)
    for number in range(1, 9):
        part = bytes([number]) * (10 if number % 2 else COPY_BELOW_BYTES + 10)
        wire.pusher.send_multipart([pack({**HEADER, "number": number}), part, part])
        gradient = receive_one(channel)
        assert [bytes(one) for one in gradient.parts] == [part, part]
        assert gradient.size == 2 * len(part)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b"", b"x"], "malformed"),
        ([b"\xc1"], "malformed"),
        ([pack({"v": 1}), b"x"], "malformed"),
        ([pack({**HEADER, "v": 3}), b"x"], "protocol"),
        ([pack({**HEADER, "number": 0}), b"x"], "malformed"),
    ],
)
def test_what_is_no_gradient_is_rejected_whole_and_the_next_one_comes(
    wire: Wire, frames: list[bytes], reason: str
) -> None:
    channel = GradientChannel(wire.gradients, None)
    wire.pusher.send_multipart(frames)
    wire.pusher.send_multipart([pack(HEADER), b"abcd"])

    assert receive(channel) == MessageRejected(reason)
    assert receive_one(channel).number == 1


@pytest.mark.parametrize("keeps_frames", [False, True])
def test_several_gradients_come_in_one_message(wire: Wire, keeps_frames: bool) -> None:
    channel = GradientChannel(wire.gradients, None, keeps_frames=keeps_frames)

    wire.pusher.send_multipart([pack({**HEADER, "number": 5, "count": 2, "payload": b"abcdefgh"})])

    gradients = receive(channel)
    assert [(one.number, list(one.parts)) for one in gradients] == [(5, [b"abcd"]), (6, [b"efgh"])]
    if keeps_frames:
        # Each is kept as if it had come alone.
        kept = [stored_gradient(unpack(one.frame), b"") for one in gradients]
        assert [(one.number, list(one.parts)) for one in kept] == [(5, [b"abcd"]), (6, [b"efgh"])]


def test_with_keys_in_use_a_message_without_a_user_is_forbidden(wire: Wire) -> None:
    """It cannot happen behind CURVE; if it ever does, nothing is let in."""
    gradients = GradientChannel(wire.gradients, lambda user: "worker")
    control = ControlChannel(wire.control, lambda user: "admin")
    wire.pusher.send_multipart([pack(HEADER), b"abcd", b"efgh"])
    wire.asker.send_multipart([b"", pack({"v": 1, "op": "status"})])

    assert receive(gradients) == MessageRejected("forbidden")
    request = receive(control)
    assert (request.role, request.user) == ("", None)


def test_a_request_comes_with_its_envelope_and_its_reply_finds_the_way_back(wire: Wire) -> None:
    channel = ControlChannel(wire.control, None)
    wire.asker.send_multipart([b"correlation", b"", pack({"v": 1, "op": "status"}), b"frame"])

    request = receive(channel)

    assert isinstance(request, RequestReceived)
    assert request.envelope[1:] == (b"correlation", b"")
    assert request.header == {"v": 1, "op": "status"}
    assert [bytes(frame) for frame in request.frames] == [b"frame"]
    assert request.role is None
    channel.send(Reply(request.envelope, {"ok": True}, [b"answer"]))
    assert wire.asker.poll(20_000)
    assert wire.asker.recv_multipart() == [b"correlation", b"", msgpack.packb({"ok": True}), b"answer"]


def test_an_envelope_without_an_end_is_rejected(wire: Wire) -> None:
    channel = ControlChannel(wire.control, None)
    wire.asker.send_multipart([b"a"] * 3)
    wire.asker.send_multipart([b"a"] * 30 + [b""])

    assert receive(channel) == MessageRejected("malformed")
    assert receive(channel) == MessageRejected("malformed")


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b""], "malformed"),
        ([b"", b"\xc1"], "malformed"),
        ([b"", bytes(65 * 1024)], "malformed"),
        ([b"", pack({"v": 2})], "protocol"),
    ],
)
def test_what_is_no_request_can_still_be_answered(wire: Wire, frames: list[bytes], code: str) -> None:
    channel = ControlChannel(wire.control, None)
    wire.asker.send_multipart(frames)

    bad = receive(channel)

    assert isinstance(bad, BadRequestReceived)
    assert bad.code == code
    channel.send(Reply(bad.envelope, {"ok": False}))
    assert wire.asker.poll(20_000)


def test_a_reply_to_a_client_that_is_gone_is_dropped_and_counted(wire: Wire) -> None:
    channel = ControlChannel(wire.control, None)

    channel.send(Reply((b"nobody", b""), {"ok": True}))

    assert channel.dropped_replies == 1
