"""Tests of `distgrad_broker.local_lanes`, over real lanes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import zmq

from distgrad import lanes, sockets
from distgrad.wire import Gradient, pack, unpack
from distgrad_broker import local_lanes
from distgrad_broker.channels import ControlChannel, GradientChannel
from distgrad_broker.events import MessageRejected, Reply
from distgrad_broker.local_lanes import LocalLanes
from distgrad_broker.loop import Loop

if sys.platform != "linux":
    pytest.skip("lanes are on Linux only", allow_module_level=True)

GREETING = {"v": 1, "worker": "w", "session": "s"}
HEADER = {**GREETING, "kind": "gradient", "attempt": 1, "number": 1, "fingerprint": 5}
BUFFER = memoryview(bytearray(lanes.MAX_BYTES))


def users(worker: str, session: str) -> str | None:
    if (worker, session) == ("w", "s"):
        return "ann"
    raise KeyError(session)


class World:
    """A broker's lanes without the broker."""

    def __init__(self, role_of: Callable[[str], str | None] | None, keeps_frames: bool) -> None:
        self.context = sockets.open_context()
        self._socket = sockets.gradient_server(self.context, "tcp://127.0.0.1:0")
        self.name = lanes.new_name()
        self.channel = GradientChannel(self._socket, role_of, keeps_frames=keeps_frames)
        self.lanes = LocalLanes(self.name, self.channel, users)

    def open(self, greeting: dict[str, Any] = GREETING) -> lanes.Lane:
        lane = lanes.connect(self.name)
        assert lane is not None
        assert lane.send([pack(greeting)])
        return lane

    def receive(self) -> list[Any]:
        """Take all that there is; greetings tell nothing."""
        taken: list[Any] = []
        for _ in range(3):  # a connection, its first message, the others
            for message in self.lanes.receive():
                taken.extend([message] if isinstance(message, MessageRejected) else message)
        return taken

    def close(self) -> None:
        self.lanes.close()
        self._socket.close()
        self.context.term()


@contextmanager
def a_world(role_of: Callable[[str], str | None] | None = None, *, keeps_frames: bool = False) -> Iterator[World]:
    world = World(role_of, keeps_frames)
    try:
        yield world
    finally:
        world.close()


def has_ended(lane: lanes.Lane) -> bool:
    return lane.receive(BUFFER) is None and not lane.is_open


@pytest.mark.parametrize("keeps_frames", [False, True])
def test_a_gradient_comes_in_and_its_answer_goes_out(keeps_frames: bool) -> None:
    with a_world(keeps_frames=keeps_frames) as world:
        lane = world.open()
        assert lane.send([pack(HEADER), b"1234", b"56"])

        (gradient,) = world.receive()

        assert world.lanes.is_used
        assert ([*gradient.parts], gradient.size, gradient.user) == ([b"1234", b"56"], 6, "ann")
        assert not keeps_frames or gradient.frame == pack(HEADER)
        assert world.lanes.send(Reply((b"id",), {"id": 3}, [b"abc"], session="s"))
        frames = lane.receive(BUFFER)
        assert frames is not None
        assert [bytes(frame) for frame in frames] == [pack({"id": 3}), b"abc"]


def test_several_gradients_of_one_message_come_in_order() -> None:
    with a_world(keeps_frames=True) as world:
        lane = world.open()
        assert lane.send([pack({**HEADER, "count": 2, "payload": b"12345678"})])

        first, second = world.receive()

        assert (first.number, second.number) == (1, 2)
        assert unpack(second.frame)["payload"] == b"5678"


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        ({**GREETING, "session": "other"}, "forbidden"),
        ({**GREETING, "worker": "other"}, "forbidden"),
        ({"v": 1}, "malformed"),
        ({**GREETING, "session": 5}, "malformed"),
        ({**GREETING, "v": 2}, "protocol"),
    ],
)
def test_who_names_no_session_of_here_is_turned_away(greeting: dict[str, Any], reason: str) -> None:
    with a_world() as world:
        lane = world.open(greeting)
        lane.send([pack(HEADER)])

        assert world.receive() == [MessageRejected(reason)]
        assert has_ended(lane)
        assert not world.lanes.is_used


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([pack({**HEADER, "session": "other"})], "forbidden"),
        ([pack({**HEADER, "worker": "other"})], "forbidden"),
        ([pack({**HEADER, "number": 0})], "malformed"),
        ([b"noise"], "malformed"),
        ([pack({**HEADER, "v": 2})], "protocol"),
    ],
)
def test_what_is_no_gradient_of_the_session_ends_the_lane(frames: list[bytes], reason: str) -> None:
    with a_world() as world:
        lane = world.open()
        assert world.receive() == []
        lane.send(frames)
        lane.send([pack(HEADER)])

        assert world.receive() == [MessageRejected(reason)]
        assert has_ended(lane)


def test_a_message_that_is_cut_ends_the_lane() -> None:
    with a_world() as world:
        lane = world.open()
        lane._peer.send(b"\x01\xff\0\0\0x")

        assert world.receive() == [MessageRejected("malformed")]
        assert has_ended(lane)


def test_a_key_that_was_revoked_counts_for_lanes_too() -> None:
    roles = {"ann": "worker"}
    with a_world(roles.get) as world:
        lane = world.open()
        lane.send([pack(HEADER)])
        assert len(world.receive()) == 1

        roles["ann"] = "reader"
        lane.send([pack({**HEADER, "number": 2})])

        assert world.receive() == [MessageRejected("forbidden")]


def test_where_there_is_no_lane_a_reply_takes_the_other_way() -> None:
    reply = Reply((b"id",), {"id": 3}, session="s")
    with a_world() as world:
        assert not world.lanes.send(reply)
        lane = world.open()
        world.receive()
        assert not world.lanes.send(reply._replace(session=None))
        assert not world.lanes.send(reply._replace(frames=[bytes(lanes.MAX_BYTES)]))
        assert world.lanes.send(reply)
        del lane
        assert world.receive() == []
        assert not world.lanes.is_used
        assert not world.lanes.send(reply)


def test_the_later_lane_of_a_session_is_the_one_that_is_answered() -> None:
    reply = Reply((b"id",), {"id": 3}, session="s")
    with a_world() as world:
        former = world.open()
        world.receive()
        latter = world.open()
        world.receive()
        assert world.lanes.send(reply)
        assert latter.receive(BUFFER)
        del former
        world.receive()
        assert world.lanes.send(reply)


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_lanes, "MAX_LANES", 2)
    with a_world() as world:
        opened = [world.open() for _ in range(3)]
        for _ in opened:
            world.receive()
        assert [has_ended(lane) for lane in opened] == [False, False, True]


def test_without_descriptors_nobody_gets_a_lane_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(_listener: object) -> None:
        raise OSError(24, "too many open files")

    with a_world() as world:
        lane = world.open()
        world.receive()
        assert world.lanes._listener is not None
        # As a forked child has it, which keeps it in the set of what is polled for.
        copy = os.dup(world.lanes._listener.fileno())
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "accept", accept)
            late = world.open()
            lane.send([pack(HEADER)])
            assert len(world.receive()) == 1
        queued = lanes.connect(world.name)
        assert queued is not None
        lane.send([pack({**HEADER, "number": 3})])
        assert len(world.receive()) == 1
        os.close(copy)
        assert has_ended(late)
        assert has_ended(queued)
        assert lanes.connect(world.name) is None
        lane.send([pack({**HEADER, "number": 2})])
        assert len(world.receive()) == 1


def test_lanes_leave_most_descriptors_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 20, resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit)
    with a_world() as world:
        opened = [world.open() for _ in range(4)]
        for _ in opened:
            world.receive()
        assert [has_ended(lane) for lane in opened] == [False, False, True, True]
    limit = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    with a_world() as world:
        assert not has_ended(world.open())


class Noting:
    """A core that notes the numbers of gradients."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def expects(self, gradient: Gradient) -> bool:
        return gradient.number == len(self.numbers) + 1

    def handle(self, event: Any, _now: float) -> tuple[()]:
        if type(event) is Gradient:
            self.numbers.append(event.number)
        return ()


def test_what_came_by_lane_is_taken_before_what_was_pushed_after_it() -> None:
    """Else the second would be taken for one behind a gap, and both be sent again."""
    with a_world() as world, world.context.socket(zmq.PUSH) as pusher, ExitStack() as stack:
        pusher.linger = 0
        control = stack.enter_context(sockets.control_server(world.context, "tcp://127.0.0.1:0"))
        core: Any = Noting()
        files: Any = None
        loop = Loop(core, ControlChannel(control, None), world.channel, None, files, print, world.lanes)
        stack.callback(loop.close)
        pusher.connect(world.channel.socket.endpoint)
        lane = world.open()
        world.receive()

        # As if both had come since the loop has last looked at the lanes.
        lane.send([pack(HEADER)])
        pusher.send(pack({**HEADER, "number": 2}))
        assert world.channel.socket.poll(20_000)
        loop._read_gradients(0.0)

        assert core.numbers == [1, 2]
