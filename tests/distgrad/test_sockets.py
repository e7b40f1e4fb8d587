from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from distgrad import sockets
from distgrad.errors import ConfigError, Forked
from distgrad.sockets import Link, OwnedSocket
from support.ports import free_port

WAIT_MS = 5000


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


NEEDS_IPV6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on the loopback interface")


@pytest.fixture
def context() -> Iterator[sockets.Context]:
    context = sockets.open_context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def make(context: sockets.Context) -> Iterator[Callable[..., OwnedSocket]]:
    """Make sockets that are closed when the test ends."""
    made: list[OwnedSocket] = []

    def make(factory: Callable[..., OwnedSocket], endpoint: str, **keys: Any) -> OwnedSocket:
        made.append(factory(context, endpoint, **keys))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Keys:
    """A pair, and the public key of a broker that nobody has."""

    def __init__(self) -> None:
        self.public, self.secret = sockets.curve_pair()
        self.broker_public, _ = sockets.curve_pair()


def wait_for(watch: sockets.LinkMonitor, wanted: Link) -> list[Link]:
    """Read a monitor until it tells what is wanted."""
    seen: list[Link] = []
    while wanted not in seen:
        assert watch.raw().poll(WAIT_MS), f"only {seen}"
        seen += watch.drain()
    return seen


def in_thread(action: Callable[[], object]) -> object:
    """Return what an action returned or raised on another thread."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(action())
        except RuntimeError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def test_a_request_and_its_reply_cross(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.control_server, "tcp://127.0.0.1:0")
    client = make(sockets.control_client, server.endpoint)

    assert client.send_multipart([b"ask", b"x" * 100_000])
    assert server.poll(WAIT_MS)
    *envelope, header, payload = server.recv_multipart(copy=True)
    assert server.send_multipart([*envelope, header, payload[:3]])

    assert client.poll(WAIT_MS)
    assert [bytes(frame) for frame in client.recv_multipart()] == [b"ask", b"xxx"]


def test_a_request_that_is_asked_again_gets_only_its_own_reply(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.control_server, "tcp://127.0.0.1:0")
    client = make(sockets.control_client, server.endpoint)
    messages = []
    for ask in (b"first", b"second"):
        assert client.send_multipart([ask])
        assert server.poll(WAIT_MS)
        messages.append(server.recv_multipart(copy=True))

    for message in messages:
        server.send_multipart(message)

    reply: list[bytes] = []
    while not reply:  # a REQ is readable for a moment because of the reply that it then drops
        assert client.poll(WAIT_MS)
        reply = client.recv_multipart(copy=True)
    assert reply == [b"second"]


def test_gradients_cross_whole_and_in_order(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0")
    client = make(sockets.gradient_client, server.endpoint)

    for number in range(2000):
        assert client.send_multipart([str(number).encode(), b"part"])

    got: list[list[bytes]] = []
    while len(got) < 2000:
        assert server.poll(WAIT_MS)
        got.append(server.recv_multipart(copy=True))
    assert got == [[str(number).encode(), b"part"] for number in range(2000)]


def test_a_push_takes_messages_before_anybody_listens(make: Callable[..., OwnedSocket]) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    client = make(sockets.gradient_client, endpoint)

    assert client.send_multipart([b"early"])

    server = make(sockets.gradient_server, endpoint)
    assert server.poll(WAIT_MS)
    assert server.recv_multipart(copy=True) == [b"early"]


def test_nothing_waits_inside_zeromq(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.control_server, "tcp://127.0.0.1:0")

    assert server.recv_multipart() == []
    assert not server.poll(0)
    with pytest.raises(zmq.Again):
        server.raw().recv()


def test_a_reply_to_a_client_that_is_gone_is_dropped_and_reported(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.control_server, "tcp://127.0.0.1:0")

    assert not server.send_multipart([b"nobody", b"", b"reply"])


def test_an_oversized_frame_ends_its_connection_only(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0")
    hostile = make(sockets.gradient_client, server.endpoint)
    watch = sockets.monitor(hostile)
    hostile.send_multipart([b"x" * (sockets.MAX_FRAME_BYTES + 128 * 1024)])
    wait_for(watch, Link.LOST)

    good = make(sockets.gradient_client, server.endpoint)
    good.send_multipart([b"x" * sockets.MAX_FRAME_BYTES])

    assert server.poll(WAIT_MS)
    assert len(server.recv_multipart(copy=True)[0]) == sockets.MAX_FRAME_BYTES


@pytest.mark.parametrize(
    ("listen", "connect"),
    [
        ("tcp://localhost:0", "localhost"),
        ("tcp://localhost:0", "127.0.0.1"),
        ("tcp://127.0.0.1:0", "localhost"),
        ("tcp://*:0", "127.0.0.1"),
        ("tcp://*:0", "localhost"),
        ("tcp://0.0.0.0:0", "127.0.0.1"),
        pytest.param("tcp://[::1]:0", "[::1]", marks=NEEDS_IPV6),
        pytest.param("tcp://*:0", "[::1]", marks=NEEDS_IPV6),
        pytest.param("tcp://[::]:0", "127.0.0.1", marks=NEEDS_IPV6),
    ],
)
def test_ipv4_ipv6_names_and_wildcards_meet(make: Callable[..., OwnedSocket], listen: str, connect: str) -> None:
    server = make(sockets.gradient_server, listen)
    client = make(sockets.gradient_client, f"tcp://{connect}:{server.endpoint.rpartition(':')[2]}")

    client.send_multipart([b"hello"])

    assert server.poll(WAIT_MS)


def test_a_name_with_both_kinds_of_address_is_reached_over_ipv4(
    make: Callable[..., OwnedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With IPv6 on, ZeroMQ would try the name's IPv6 address alone."""
    asked = []

    def getaddrinfo(host: str, port: object, family: int = 0, *_more: int, **_types: int) -> list[Any]:
        asked.append(host)
        entries = [(socket.AF_INET6, 1, 6, "", ("::1", 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
        return [entry for entry in entries if family in (0, entry[0])]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    assert make(sockets.gradient_server, "tcp://broker.test:0").endpoint.startswith("tcp://127.0.0.1:")
    assert not make(sockets.gradient_client, "tcp://broker.test:1").raw().ipv6
    assert asked == ["broker.test", "broker.test"]


def test_a_name_that_is_unknown_yet_may_become_either(
    make: Callable[..., OwnedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(*_arguments: object, **_more: object) -> list[Any]:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    assert make(sockets.gradient_client, "tcp://broker.test:1").raw().ipv6


def test_a_port_that_is_taken_is_said_with_a_hint(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.control_server, "tcp://127.0.0.1:0")

    with pytest.raises(ConfigError, match="the port is taken") as caught:
        make(sockets.gradient_server, server.endpoint)

    assert caught.value.hint is not None


@pytest.mark.parametrize("endpoint", ["tcp://192.0.2.1:0", "tcp://no-such-nic:0", "ipc:///tmp/x", "tcp://:0"])
def test_an_address_that_is_not_this_machines_cannot_be_listened_on(
    make: Callable[..., OwnedSocket], monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    def getaddrinfo(host: str, *_arguments: object, **_more: object) -> list[Any]:
        if host == "192.0.2.1":
            return [(socket.AF_INET, 1, 6, "", (host, 0))]
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    with pytest.raises(ConfigError):
        make(sockets.control_server, endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://*:5", "tcp://127.0.0.1:0", "udp://127.0.0.1:5"])
def test_one_cannot_connect_to_what_is_not_a_host_and_port(make: Callable[..., OwnedSocket], endpoint: str) -> None:
    with pytest.raises(ConfigError):
        make(sockets.control_client, endpoint)


def test_another_thread_may_not_touch_a_socket(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0")
    touches: list[Callable[[], object]] = [
        server.raw,
        server.recv_multipart,
        server.close,
        lambda: server.poll(0),
        lambda: server.send_multipart([b"x"]),
        lambda: server.endpoint,
    ]

    assert [type(in_thread(touch)) for touch in touches] == [RuntimeError] * len(touches)


def test_a_socket_can_be_handed_over_where_a_lock_allows_it(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0")
    sockets.monitor(server)

    def use() -> object:
        server.adopt()
        return server.poll(0)

    assert in_thread(use) is False
    with pytest.raises(RuntimeError):
        server.raw()
    server.adopt()
    assert not server.poll(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_may_not_touch_a_socket_and_closing_is_harmless(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0")
    parent = os.getpid()

    def pretend() -> int:
        return parent + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", pretend)
        with pytest.raises(Forked, match="after fork"):
            server.raw()
        with pytest.raises(Forked):
            server.adopt()
        server.close()
        assert not server.closed

    assert not server.poll(0)


def test_closing_twice_is_fine_and_ends_the_monitor(context: sockets.Context) -> None:
    server = sockets.gradient_server(context, "tcp://127.0.0.1:0")
    watch = sockets.monitor(server)

    with server:
        pass
    server.close()

    assert server.closed
    assert watch.drain() == []
    watch.close()


def test_a_context_ends_at_once_with_messages_unsent(context: sockets.Context) -> None:
    client = sockets.gradient_client(context, f"tcp://127.0.0.1:{free_port()}")
    client.send_multipart([b"x" * 1_000_000])

    client.close()

    ended = threading.Thread(target=context.term, daemon=True)
    ended.start()
    ended.join(10)
    assert not ended.is_alive()


def test_a_monitor_tells_when_a_connection_comes_and_goes(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0")
    client = make(sockets.gradient_client, server.endpoint)
    watch = sockets.monitor(client)
    wait_for(watch, Link.UP)

    server.close()

    assert Link.LOST in wait_for(watch, Link.ABSENT)
    assert sockets.monitor(client) is watch


def test_what_happened_before_anybody_asked_is_told(make: Callable[..., OwnedSocket]) -> None:
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0")
    client = make(sockets.gradient_client, server.endpoint)
    client.send_multipart([b"x"])
    assert server.poll(WAIT_MS)

    assert wait_for(sockets.monitor(client), Link.UP) == [Link.UP]


def test_a_monitor_that_nobody_reads_stops_nobody(make: Callable[..., OwnedSocket]) -> None:
    """At its default mark it would block the I/O thread, and so every connection, after 2000 events."""
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0")
    watch = sockets.monitor(server)
    port = int(server.endpoint.rpartition(":")[2])
    for _ in range(1100):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as visitor:
            visitor.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00PLAIN" + bytes(47))
            while visitor.recv(4096):
                pass

    client = make(sockets.gradient_client, server.endpoint)
    client.send_multipart([b"still here"])

    assert server.poll(WAIT_MS)
    assert len(watch.drain()) > 2000


def test_closed_sockets_do_not_go_on_reconnecting(context: sockets.Context, make: Callable[..., OwnedSocket]) -> None:
    """Many would, if their monitors were still on and their handshakes kept failing."""
    server = make(sockets.gradient_server, "tcp://127.0.0.1:0", keys=Keys())
    watch = sockets.monitor(server, only_failures=True)
    for _ in range(8):
        client = sockets.gradient_client(context, server.endpoint, keys=Keys())
        wait_for(sockets.monitor(client), Link.UNFINISHED)
        client.close()

    deadline = time.monotonic() + WAIT_MS / 1000
    while watch.raw().poll(500):
        watch.drain()
        assert time.monotonic() < deadline, "somebody still tries"


def test_unknown_events_of_a_monitor_are_not_believed() -> None:
    assert sockets.parse_event([struct.pack("=HI", 0x8000, 0), b""]) is Link.UNFINISHED
    failed = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    assert sockets.parse_event([struct.pack("=HI", failed, 0x10000000), b""]) is Link.UNFINISHED
