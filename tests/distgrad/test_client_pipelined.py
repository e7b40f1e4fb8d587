"""Several requests under way at a time, against a broker that loses, delays, cuts and refuses as told."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress

import pytest

from distgrad import client as client_module
from distgrad import sockets
from distgrad.client import ControlClient
from distgrad.errors import NoParameters
from support.proxy import CuttingProxy
from support.scripted_broker import Request, ScriptedBroker, ignore, in_turn


def echo(request: Request) -> None:
    request.answer(op=request.op)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_RETRY_S", 0.05)


def test_several_requests_on_one_socket_look_each_like_that_of_a_req() -> None:
    with (
        sockets.open_context() as context,
        sockets.control_server(context, "tcp://127.0.0.1:0") as server,
        sockets.pipelined_control_client(context, server.endpoint) as client,
    ):
        messages = []
        for ask in (b"first", b"second"):
            assert client.send_multipart([b"", ask])
        for _ in range(2):
            assert server.poll(5000)
            messages.append(server.recv_multipart(copy=True))

        assert [message[1:] for message in messages] == [[b"", b"first"], [b"", b"second"]]
        for message in reversed(messages):
            server.send_multipart(message)
        for answer in (b"second", b"first"):
            assert client.poll(5000)
            assert client.recv_multipart(copy=True) == [b"", answer]


def test_several_requests_under_way_get_their_own_replies_in_whatever_order_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "FIRST_RETRY_S", 1000.0)
    held: list[Request] = []

    def answer_backwards(request: Request) -> None:
        held.append(request)
        if len(held) == 3:
            while held:
                echo(held.pop())

    with (
        ScriptedBroker(answer_backwards) as broker,
        ControlClient(broker.address) as client,
        client.conversation(),
    ):
        pending = [client.send(op) for op in ("status", "workers", "get")]

        assert [client.receive(one).header["op"] for one in pending] == ["status", "workers", "get"]

    assert len(broker.headers) == 3


def test_only_what_is_unanswered_is_repeated() -> None:
    script = in_turn(ignore, echo, ignore, echo)
    with ScriptedBroker(script) as broker, ControlClient(broker.address) as client, client.conversation():
        pending = [client.send(op) for op in ("status", "workers", "get")]

        assert [client.receive(one).header["op"] for one in pending] == ["status", "workers", "get"]

    ids = [header["id"] for header in broker.headers]
    assert ids[:5] == [1, 2, 3, 1, 3]
    assert 2 not in ids[5:]


def test_what_was_under_way_on_a_connection_that_was_cut_is_repeated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_RETRY_S", 1000.0)
    with CuttingProxy() as proxy:

        def cut(_request: Request) -> None:
            proxy.cut("control")

        with ScriptedBroker(in_turn(echo, echo, cut, echo)) as broker:
            address = proxy.listen(broker.address, "control")
            with ControlClient(address) as client, client.conversation():
                client.receive(client.send("status"))
                pending = [client.send(op) for op in ("workers", "get")]

                assert [client.receive(one).header["op"] for one in pending] == ["workers", "get"]

    assert broker.headers[-1]["op"] == "get"


def test_the_error_that_answers_one_request_is_raised_for_that_one() -> None:
    script = in_turn(lambda request: request.fail("no_parameters"), echo)
    with ScriptedBroker(script) as broker, ControlClient(broker.address) as client, client.conversation():
        first, second = client.send("get"), client.send("status")

        assert client.receive(second).header["op"] == "status"
        with pytest.raises(NoParameters):
            client.receive(first)


def test_what_an_exception_leaves_unanswered_is_given_up() -> None:
    held: list[Request] = []

    def answer_all(request: Request) -> None:
        # What was sent over the former connection may be read after what comes over this one.
        if request.op != "status":
            held.append(request)
            return
        for former in held:
            former.answer(op="late")
        echo(request)

    with ScriptedBroker(answer_all) as broker, ControlClient(broker.address) as client:
        with suppress(KeyboardInterrupt), client.conversation():
            client.send("get")
            client.send("workers")
            raise KeyboardInterrupt

        assert client.request("status").header["op"] == "status"


def test_a_request_is_not_repeated_while_replies_before_it_are_coming() -> None:
    def answer_slowly(request: Request) -> None:
        threading.Event().wait(0.6)
        request.answer()

    with ScriptedBroker(answer_slowly) as broker, ControlClient(broker.address) as client, client.conversation():
        # Patient for a second each, at the pace that a client begins with.
        pending = [client.send("range", reply_bytes=10_000_000) for _ in range(3)]
        for one in pending:
            client.receive(one)

    assert len(broker.headers) == 3


def test_a_mutation_has_no_other_request_beside_it() -> None:
    with ScriptedBroker(echo) as broker, ControlClient(broker.address) as client, client.conversation():
        pending = client.send("status")

        with pytest.raises(AssertionError):
            client.send("clear", mutating=True)
        client.receive(pending)


def test_a_message_without_the_empty_frame_is_no_reply() -> None:
    def script(request: Request) -> None:
        request.send_bare(b"not", b"a reply")
        echo(request)

    with ScriptedBroker(script) as broker, ControlClient(broker.address) as client:
        assert client.request("status").header["op"] == "status"


def test_a_request_that_something_else_asks_for_is_sent_only_if_no_reply_comes() -> None:
    with ScriptedBroker(echo) as broker, ControlClient(broker.address) as client:
        client.request("status")
        with client.conversation():
            reserved = client.reserve()
            pending = client.send("get", reserved=reserved)
            assert len(broker.headers) == 1
            assert client.receive(pending).header["op"] == "get"
        client.request("workers")

    assert [(header["op"], header["id"]) for header in broker.headers] == [("status", 1), ("get", 2), ("workers", 3)]


def test_a_reply_that_comes_for_what_was_reserved_is_taken() -> None:
    requests: list[Request] = []

    def answer(request: Request) -> None:
        requests.append(request)
        request.answer(op=request.op)
        # And at once what the next one, of which nothing is sent, waits for.
        request.header["id"] += 1
        request.answer(op="asked for by something else")

    with ScriptedBroker(answer) as broker, ControlClient(broker.address) as client, client.conversation():
        first = client.send("status")
        second = client.send("get", reserved=client.reserve())

        assert client.receive(first).header["op"] == "status"
        assert client.receive(second).header["op"] == "asked for by something else"


def test_another_connection_has_another_number() -> None:
    with ExitStack() as stack:
        proxy, broker = stack.enter_context(CuttingProxy()), stack.enter_context(ScriptedBroker(echo))
        client = stack.enter_context(ControlClient(proxy.listen(broker.address, "control")))
        client.request("status")
        before = client.connection
        client.request("status")
        assert client.connection == before
        proxy.cut("control")
        client.request("status")

        assert client.connection != before
