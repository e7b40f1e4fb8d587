from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils import z85

from distgrad import sockets
from distgrad.keys import BrokerKeys, ClientKeys, Role, add_client, revoke_client
from distgrad.owned_sockets import is_readable
from distgrad.sockets import Link, OwnedSocket
from distgrad.wire import pack
from distgrad_broker.authenticator import REFRESH_S, Authenticator
from distgrad_broker.channels import GradientChannel
from distgrad_broker.events import MessageRejected
from support.key_folders import KeyFolder, make_key_folder

WAIT_S = 10.0
HEADER = {"v": 1, "kind": "gradient", "worker": "w", "session": "s", "attempt": 1, "number": 1, "fingerprint": 5}


class Door:
    """A broker's sockets with an authenticator and no broker behind."""

    def __init__(self, context: sockets.Context, folder: Path) -> None:
        self.keys = BrokerKeys.load(folder)
        self.authenticator = Authenticator(context, self.keys)
        self.gradients = sockets.gradient_server(context, "tcp://127.0.0.1:0", keys=self.keys)
        self.control = sockets.control_server(context, "tcp://127.0.0.1:0", keys=self.keys)
        self.authenticator.watch(self.gradients, self.control)

    def turn(self) -> list[zmq.Frame]:
        """Do what a turn of the loop does; return a gradient's frames, if one came."""
        poller = zmq.Poller()
        for one in (self.authenticator.socket, self.gradients.raw()):
            poller.register(one, zmq.POLLIN)
        poller.poll(20)
        self.authenticator.handle()
        return self.gradients.recv_multipart()

    def until(self, condition: Callable[[], object]) -> None:
        """Serve until something holds; nothing may come through meanwhile."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.turn() == []
            assert time.monotonic() < deadline

    def receive(self) -> tuple[bytes, str]:
        """Serve until a gradient comes; return its text and the user id of its sender."""
        deadline = time.monotonic() + WAIT_S
        while not (frames := self.turn()):
            assert time.monotonic() < deadline
        return frames[0].bytes, str(frames[0].get("User-Id"))

    def close(self) -> None:
        for one in (self.gradients, self.control):
            one.close()
        self.authenticator.close()


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    return make_key_folder(tmp_path)


@pytest.fixture
def context() -> Iterator[sockets.Context]:
    context = sockets.open_context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def door(context: sockets.Context, folder: KeyFolder) -> Iterator[Door]:
    door = Door(context, folder.folder)
    yield door
    door.close()


@pytest.fixture
def push(context: sockets.Context, door: Door) -> Iterator[Callable[[Any], OwnedSocket]]:
    """Push a message with some keys, and return the socket."""
    made: list[OwnedSocket] = []

    def push(keys: Any) -> OwnedSocket:
        client = sockets.gradient_client(context, door.gradients.endpoint, keys=keys)
        made.append(client)
        client.send_multipart([b"hello"])
        return client

    yield push
    for client in made:
        client.close()


def touch(folder: Path) -> None:
    """Give a folder a modification time that differs from the one before."""
    stamp = folder.stat().st_mtime_ns
    os.utime(folder, ns=(stamp + 10**9, stamp + 10**9))


@pytest.mark.parametrize("role", list(Role))
def test_a_known_key_gets_through_and_is_known_by_name_and_role(
    door: Door, folder: KeyFolder, push: Callable[[Any], OwnedSocket], role: Role
) -> None:
    keys = ClientKeys.load(getattr(folder, role))

    push(keys)

    text, user = door.receive()
    assert text == b"hello"
    assert user == keys.public.decode()
    assert door.authenticator.role_of(user) is role
    assert door.authenticator.name_of(user) == role
    assert door.authenticator.refused() == {}


def test_control_names_its_sender_too(context: sockets.Context, door: Door, folder: KeyFolder) -> None:
    with sockets.control_client(context, door.control.endpoint, keys=ClientKeys.load(folder.admin)) as client:
        client.send_multipart([b"ask"])
        door.until(lambda: door.control.poll(0))

        frames = door.control.recv_multipart()

    assert frames[-1].bytes == b"ask"
    assert door.authenticator.role_of(frames[-1].get("User-Id")) is Role.ADMIN


def test_an_unknown_key_gets_nothing_and_is_counted(
    door: Door, tmp_path: Path, push: Callable[[Any], OwnedSocket]
) -> None:
    stranger = ClientKeys.load(make_key_folder(tmp_path, "other").worker)
    mixed = ClientKeys("x", Role.WORKER, stranger.public, stranger.secret, door.keys.public)

    client = push(mixed)

    door.until(lambda: door.authenticator.refused().get("unknown_key"))
    door.until(lambda: Link.REFUSED in sockets.monitor(client).drain())
    # It would wait for ever, if it waited: after a refusal ZeroMQ does not connect again.
    door.until(lambda: not client.send_multipart([b"hello"]))
    assert door.authenticator.role_of(stranger.public.decode()) is None


def test_a_key_of_another_broker_gets_nothing_and_is_counted(
    door: Door, tmp_path: Path, push: Callable[[Any], OwnedSocket]
) -> None:
    push(ClientKeys.load(make_key_folder(tmp_path, "other").worker))

    door.until(lambda: door.authenticator.refused().get("other_broker"))
    assert "unknown_key" not in door.authenticator.refused()


def test_no_key_gets_nothing_and_is_counted(door: Door, push: Callable[[Any], OwnedSocket]) -> None:
    watch = sockets.monitor(push(None))

    door.until(lambda: door.authenticator.refused().get("no_key"))
    door.until(lambda: Link.NO_KEYS in watch.drain())


def test_a_visitor_that_speaks_something_else_is_counted(door: Door) -> None:
    port = int(door.gradients.endpoint.rpartition(":")[2])

    with socket.create_connection(("127.0.0.1", port)) as visitor:
        visitor.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47) + b"\x04\x06\x05HELLO" + bytes(300))

        door.until(lambda: sum(door.authenticator.refused().values()))


def test_a_stolen_public_key_is_not_enough(
    door: Door, folder: KeyFolder, tmp_path: Path, push: Callable[[Any], OwnedSocket]
) -> None:
    victim = ClientKeys.load(folder.worker)
    thief = ClientKeys.load(make_key_folder(tmp_path, "other").worker)

    push(ClientKeys("x", Role.WORKER, victim.public, thief.secret, door.keys.public))

    door.until(lambda: door.authenticator.refused())


def test_without_an_authenticator_nobody_gets_in(context: sockets.Context, folder: KeyFolder) -> None:
    """ZAP fails open: it would let every key in, were the domain not enforced."""
    keys = BrokerKeys.load(folder.folder)
    with (
        sockets.gradient_server(context, "tcp://127.0.0.1:0", keys=keys) as server,
        sockets.gradient_client(context, server.endpoint, keys=ClientKeys.load(folder.worker)) as client,
    ):
        watch = sockets.monitor(client)
        client.send_multipart([b"hello"])
        seen: list[Link] = []
        while not seen:
            assert watch.raw().poll(int(WAIT_S * 1000))
            seen = watch.drain()

        assert Link.UP not in seen
        assert not server.poll(100)


def test_a_revoked_key_has_no_role_though_its_connection_stands(
    door: Door, folder: KeyFolder, push: Callable[[Any], OwnedSocket]
) -> None:
    client = push(ClientKeys.load(folder.worker))
    _, user = door.receive()

    revoke_client(folder.folder, "worker")
    touch(folder.folder)
    door.authenticator.refresh(REFRESH_S)

    client.send_multipart([b"again"])
    assert door.receive() == (b"again", user)
    assert door.authenticator.role_of(user) is None
    assert door.authenticator.name_of(user) is None


def test_a_revoked_key_cannot_come_back(door: Door, folder: KeyFolder, push: Callable[[Any], OwnedSocket]) -> None:
    keys = ClientKeys.load(folder.worker)
    revoke_client(folder.folder, "worker")
    touch(folder.folder)
    door.authenticator.refresh(REFRESH_S)

    push(keys)

    door.until(lambda: door.authenticator.refused().get("unknown_key"))


def test_a_new_key_gets_in_without_a_restart(
    door: Door, folder: KeyFolder, push: Callable[[Any], OwnedSocket], tmp_path: Path
) -> None:
    keys, _ = add_client(folder.folder, "late", Role.WORKER, sockets.curve_pair, out=tmp_path / "late.key")
    touch(folder.folder)
    door.authenticator.refresh(REFRESH_S)

    push(keys)

    assert door.receive() == (b"hello", keys.public.decode())


def test_the_folder_is_looked_at_once_a_second(door: Door, folder: KeyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def refreshed(self: BrokerKeys) -> BrokerKeys:
        looks.append(self)
        return self

    monkeypatch.setattr(BrokerKeys, "refreshed", refreshed)

    for tenth in range(100, 131):
        door.authenticator.refresh(tenth / 10)

    assert len(looks) == 4


def test_changes_are_logged_by_name(door: Door, folder: KeyFolder, caplog: pytest.LogCaptureFixture) -> None:
    revoke_client(folder.folder, "worker")
    touch(folder.folder)

    with caplog.at_level(logging.INFO):
        door.authenticator.refresh(1)

    assert caplog.messages == ["key revoked name=worker role=worker"]


def test_a_folder_that_cannot_be_read_is_reported_once_and_keeps_the_table(
    door: Door, folder: KeyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    user = ClientKeys.load(folder.worker).public.decode()
    away = folder.folder.rename(folder.folder.with_name("away"))

    for now in (1, 2, 3):
        door.authenticator.refresh(now)

    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("key folder cannot be read problem=")
    assert door.authenticator.role_of(user) is Role.WORKER
    away.rename(folder.folder)


@pytest.mark.parametrize("user", [None, "", "worker", "ä", "\0"])
def test_other_user_ids_have_no_role(door: Door, user: str | None) -> None:
    assert door.authenticator.role_of(user) is None
    assert door.authenticator.name_of(user) is None


KNOWN = b"the raw key of the known worker"


@pytest.mark.parametrize(
    ("request_frames", "reason"),
    [
        ([], "malformed"),
        ([b"1.0"], "malformed"),
        ([b"1.0", b"1"], "malformed"),
        ([b"2.0", b"1", b"distgrad", b"127.0.0.1", b"", b"CURVE", KNOWN], "malformed"),
        ([b"1.0", b"1", b"other", b"127.0.0.1", b"", b"CURVE", KNOWN], "malformed"),
        ([b"1.0", b"1", b"distgrad", b"127.0.0.1", b"", b"NULL"], "malformed"),
        ([b"1.0", b"1", b"distgrad", b"127.0.0.1", b"", b"PLAIN", KNOWN, b"password"], "no_key"),
        ([b"1.0", b"1", b"distgrad", b"127.0.0.1", b"", b"CURVE", b"short"], "no_key"),
        ([b"1.0", b"1", b"distgrad", b"127.0.0.1", b"", b"CURVE", bytes(32)], "unknown_key"),
    ],
)
def test_every_other_question_is_refused_and_counted(
    context: sockets.Context, door: Door, folder: KeyFolder, request_frames: list[bytes], reason: str
) -> None:
    known = z85.decode(ClientKeys.load(folder.worker).public)
    with context.socket(zmq.DEALER) as asker:
        asker.linger = 0
        asker.connect("inproc://zeromq.zap.01")
        asker.send_multipart([b"", *(known if frame is KNOWN else frame for frame in request_frames)])
        door.until(lambda: door.authenticator.refused())

        assert door.authenticator.refused() == {reason: 1}
        if len(request_frames) > 1:
            assert asker.poll(int(WAIT_S * 1000))
            assert asker.recv_multipart()[1:4] == [b"1.0", request_frames[1], b"400"]


def test_a_first_message_of_which_a_part_has_come_is_none_and_stops_nobody(
    door: Door, folder: KeyFolder, context: sockets.Context
) -> None:
    """ZeroMQ has news of its own by then: whose the connection is."""
    channel = GradientChannel(door.gradients, lambda _: "worker")
    host, port = door.gradients.endpoint.removeprefix("tcp://").split(":")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = sockets.gradient_client(
            context, f"tcp://127.0.0.1:{listener.getsockname()[1]}", keys=ClientKeys.load(folder.worker)
        )
        stack.callback(client.close)
        client.send_multipart([pack(HEADER), bytes(4_000_000)])
        near = stack.enter_context(listener.accept()[0])
        far = stack.enter_context(socket.create_connection((host, int(port))))
        near.settimeout(WAIT_S)
        sent = 0
        looks: list[bool] = []

        def forward(up_to: int) -> None:
            nonlocal sent
            while sent < up_to and select.select([near], [], [], 0.02)[0]:
                data = near.recv(min(4096, up_to - sent))
                far.sendall(data)
                sent += len(data)
            while select.select([far], [], [], 0.02)[0]:
                near.sendall(far.recv(4096))
            door.authenticator.handle()

        # The handshake, the header and a part of the payload; then the rest of it.
        while not (looks and looks[-1]) and len(looks) < 100:
            forward(100_000)
            looks.append(is_readable(door.gradients.raw()))
        assert looks[-1]
        assert channel.receive() is None
        assert channel.receive() is None

        gradients = None
        while gradients is None:
            forward(1 << 30)
            gradients = channel.receive()
        assert not isinstance(gradients, MessageRejected)
        assert gradients[0].size == 4_000_000
