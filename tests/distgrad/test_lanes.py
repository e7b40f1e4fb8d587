"""Tests of `distgrad.lanes`, over real sockets of the kernel."""

from __future__ import annotations

import errno
import gc
import os
import socket
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad import lanes
from distgrad.lanes import MAX_BYTES, Lane

if sys.platform != "linux":
    pytest.skip("lanes are on Linux only", allow_module_level=True)

BUFFER = memoryview(bytearray(MAX_BYTES))


def pair() -> tuple[Lane, Lane]:
    """Make both ends of a lane."""
    name = lanes.new_name()
    listener = lanes.listen(name)
    assert listener is not None
    with listener:
        near = lanes.connect(name)
        far = lanes.accept(listener)
    assert near is not None
    assert far is not None
    return near, far


def taken(lane: Lane) -> list[bytes] | None:
    frames = lane.receive(BUFFER)
    return None if frames is None else [bytes(frame) for frame in frames]


@settings(deadline=None)
@given(st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=20), min_size=1, max_size=5))
def test_messages_come_as_they_were_sent_and_in_order(messages: list[list[bytes]]) -> None:
    near, far = pair()
    for message in messages:
        assert near.send(message)
    assert [taken(far) for _ in messages] == messages
    assert taken(far) is None
    assert far.is_open


def test_the_longest_message_passes_and_a_longer_one_is_left_to_the_other_way() -> None:
    near, far = pair()
    longest = bytes(MAX_BYTES - 1 - 4)
    assert not near.send([longest + b"x"])
    assert near.is_open
    assert near.send([memoryview(longest)])
    assert taken(far) == [longest]


def test_a_message_of_too_many_frames_is_left_to_the_other_way() -> None:
    near, far = pair()
    assert near.send([b"x"] * 255)
    assert not near.send([b"x"] * 256)
    assert near.is_open
    assert taken(far) == [b"x"] * 255


@pytest.mark.parametrize("number", [errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM])
def test_a_system_without_room_for_a_message_does_not_end_the_lane(number: int) -> None:
    near, far = pair()

    class Crowded:
        def sendmsg(self, _frames: object) -> None:
            raise OSError(number, "no room")

    near._peer, peer = Crowded(), near._peer  # type: ignore[assignment]
    assert not near.send([b"x"])
    assert near.is_open
    near._peer = peer
    assert near.send([b"y"])
    assert taken(far) == [b"y"]


def test_any_other_error_ends_it_for_both() -> None:
    near, far = pair()

    class Broken:
        def __init__(self, peer: socket.socket) -> None:
            self.shutdown = peer.shutdown

        def sendmsg(self, _frames: object) -> None:
            raise OSError(errno.EIO, "broken")

    near._peer = Broken(near._peer)  # type: ignore[assignment]
    assert not near.send([b"x"])
    assert not near.is_open
    assert taken(far) is None
    assert not far.is_open


def test_a_full_lane_takes_nothing_more_and_loses_nothing() -> None:
    near, far = pair()
    sent = 0
    while near.send([b"%d" % sent, bytes(50_000)]):
        sent += 1
    assert sent >= 2
    assert near.is_open
    assert [taken(far) for _ in range(sent)] == [[b"%d" % index, bytes(50_000)] for index in range(sent)]
    assert near.send([b"again"])
    assert taken(far) == [b"again"]


def test_both_ends_find_out_that_it_has_ended() -> None:
    near, far = pair()
    near.send([b"last"])
    near.end()
    assert taken(far) == [b"last"]
    assert taken(far) is None
    assert not far.is_open
    assert not far.send([b"late"])
    assert taken(near) is None


def test_an_end_that_is_gone_is_found_by_sending() -> None:
    near, far = pair()
    del far
    gc.collect()
    assert not near.send([b"x"])
    assert near.is_open is False


def test_the_descriptor_goes_with_the_last_who_has_it() -> None:
    near, far = pair()
    fd = far.fd
    os.fstat(fd)
    del far
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    near.end()


@pytest.mark.parametrize("junk", [b"", b"\x01", b"\x01\x05\0\0\0four", b"\x01\x02\0\0\0four", b"\xff" * 9])
def test_what_is_no_message_of_ours_has_no_frames(junk: bytes) -> None:
    near, far = pair()
    near._peer.send(junk)
    assert not taken(far)
    # An empty message cannot be told from the end.
    assert far.is_open == bool(junk)


@pytest.mark.parametrize("name", [None, 5, "", "x" * 31, "../" + "x" * 29, "x" * 32, b"x" * 32])
def test_what_is_no_name_of_a_lane_leads_nowhere(name: object) -> None:
    assert lanes.connect(name) is None


def test_a_peer_of_another_user_is_refused_by_either_side(monkeypatch: pytest.MonkeyPatch) -> None:
    name = lanes.new_name()
    listener = lanes.listen(name)
    assert listener is not None
    with listener, monkeypatch.context() as patch:
        near = lanes.connect(name)
        assert near is not None
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert lanes.accept(listener) is None
        assert lanes.connect(name) is None
        assert taken(near) is None
        assert not near.is_open


def test_a_name_is_taken_once() -> None:
    name = lanes.new_name()
    listener = lanes.listen(name)
    assert listener is not None
    with listener:
        assert lanes.listen(name) is None
        assert lanes.accept(listener) is None
    assert lanes.connect(name) is None


def test_elsewhere_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    name = lanes.new_name()
    listener = lanes.listen(name)
    assert listener is not None
    with listener:
        monkeypatch.setattr(sys, "platform", "darwin")
        assert lanes.listen(lanes.new_name()) is None
        assert lanes.connect(name) is None


def test_without_a_descriptor_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    name = lanes.new_name()
    listener = lanes.listen(name)
    assert listener is not None

    def no_socket(*_: object) -> None:
        raise OSError(24, "too many open files")

    with listener:
        monkeypatch.setattr(socket, "socket", no_socket)
        assert lanes.connect(name) is None
        assert lanes.listen(lanes.new_name()) is None


def test_a_client_that_hung_up_at_once_is_no_trouble() -> None:
    name = lanes.new_name()
    listener = lanes.listen(name)
    assert listener is not None
    with listener:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect("\0distgrad-" + name)
        lane = lanes.accept(listener)
        assert lane is None or taken(lane) is None
