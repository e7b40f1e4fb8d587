"""Requests over real sockets, against a broker that loses, delays, repeats and refuses as told."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest

from distgrad import client as client_module
from distgrad import keys, sockets
from distgrad.client import ControlClient
from distgrad.errors import (
    BrokerRestarted,
    BrokerUnreachable,
    ConfigError,
    ControlError,
    Destroyed,
    Fenced,
    Forbidden,
    Forked,
    MalformedMessage,
    NoParameters,
    StateError,
)
from distgrad.keys import BrokerKeys, Role
from distgrad.owned_sockets import OwnedSocket
from support.ports import free_port
from support.scripted_broker import Request, ScriptedBroker, ignore, in_turn


def echo(request: Request) -> None:
    request.answer(op=request.op)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_RETRY_S", 0.05)


def test_a_request_gets_its_reply_header_frames_and_state() -> None:
    def script(request: Request) -> None:
        request.answer(b"first", b"second", state=("abc", 2, 7), fingerprint=5)

    with ScriptedBroker(script) as broker, ControlClient(broker.address) as client:
        reply = client.request("get", newer_than=None)

    assert reply.header["fingerprint"] == 5
    assert [bytes(frame) for frame in reply.frames] == [b"first", b"second"]
    assert reply.state == ("abc", 2, 7)


def test_request_ids_rise_and_the_client_nonce_stays() -> None:
    with ScriptedBroker(echo) as broker, ControlClient(broker.address) as client:
        for _ in range(3):
            client.request("status")

    assert [header["id"] for header in broker.headers] == [1, 2, 3]
    assert len({header["client"] for header in broker.headers}) == 1
    assert len(broker.headers[0]["client"]) == 16


def test_frames_arrive_as_they_were_given() -> None:
    frames = [b"layout", memoryview(bytes(range(256)) * 4096)]

    with ScriptedBroker(echo) as broker, ControlClient(broker.address) as client:
        client.request("workers", frames=frames)

    assert broker.frames == [[b"layout", bytes(frames[1])]]


def test_a_lost_request_is_repeated_with_the_same_client_and_id() -> None:
    with ScriptedBroker(in_turn(ignore, ignore, echo)) as broker, ControlClient(broker.address) as client:
        assert client.request("status").header["op"] == "status"

    assert len(broker.headers) == 3
    assert len({(header["client"], header["id"]) for header in broker.headers}) == 1


def test_a_late_reply_to_a_former_try_does_no_harm() -> None:
    held: list[Request] = []

    def answer_both(request: Request) -> None:
        held.pop().answer(got="late")
        request.answer(got="in time")

    script = in_turn(held.append, answer_both, echo)
    with ScriptedBroker(script) as broker, ControlClient(broker.address) as client:
        assert client.request("status").header["got"] == "in time"
        assert client.request("workers").header["op"] == "workers"


def test_a_reply_with_another_id_is_dropped() -> None:
    def stale(request: Request) -> None:
        request.answer(id=request.header["id"] - 1, got="stale")

    with ScriptedBroker(in_turn(stale, echo)) as broker, ControlClient(broker.address) as client:
        assert client.request("status").header["op"] == "status"

    assert len(broker.headers) == 2


def test_a_wait_that_was_asked_for_is_not_cut_short_by_retries() -> None:
    answered = threading.Event()

    def answer_late(request: Request) -> None:
        answered.wait(0.3)  # six times the retry interval
        request.answer()

    with ScriptedBroker(answer_late) as broker, ControlClient(broker.address) as client:
        client.request("get", wait_s=5.0)

    assert len(broker.headers) == 1


def test_repeats_wait_for_what_a_large_transfer_takes() -> None:
    def answer_late(request: Request) -> None:
        threading.Event().wait(0.3)
        request.answer()

    with ScriptedBroker(answer_late) as broker, ControlClient(broker.address) as client:
        client.request("get", reply_bytes=16 << 20)

    assert len(broker.headers) == 1


def test_repeats_of_a_large_transfer_slow_down_until_it_fits_between_them() -> None:
    """A link that is slower than expected must not be loaded with the same reply for ever."""
    delays: list[float] = []

    def note(request: Request) -> None:
        delays.append(time.monotonic())
        if len(delays) == 4:
            request.answer(b"x" * (2 << 20))

    with ScriptedBroker(note) as broker, ControlClient(broker.address) as client:
        client.request("get", reply_bytes=1 << 20)

    gaps = [later - earlier for earlier, later in itertools.pairwise(delays)]
    assert gaps == sorted(gaps), "each gap at least as long as the one before"


def test_silence_ends_as_unreachable_and_names_the_address() -> None:
    with (
        ScriptedBroker(ignore) as broker,
        ControlClient(broker.address, timeout=0.2) as client,
        pytest.raises(BrokerUnreachable, match=f"{broker.address}.*silent") as caught,
    ):
        client.request("status")

    assert isinstance(caught.value, TimeoutError)
    assert caught.value.hint


def test_nobody_listening_is_unreachable_too() -> None:
    with (
        ControlClient(f"127.0.0.1:{free_port()}", timeout=0.2) as client,
        pytest.raises(BrokerUnreachable, match="nobody listens there"),
    ):
        client.request("status")


def test_keys_on_one_side_only_are_named_as_the_cause(tmp_path: Path) -> None:
    """A broker with keys says nothing to a client without: only how the connection ended tells why."""
    keys.add_client(tmp_path / "keys", "me", Role.ADMIN, sockets.curve_pair)
    with (
        sockets.open_context() as context,
        sockets.control_server(context, "127.0.0.1:0", keys=BrokerKeys.load(tmp_path / "keys")) as server,
        ControlClient(server.endpoint, timeout=0.2) as client,
        pytest.raises(BrokerUnreachable) as caught,
    ):
        client.request("status")

    # Whichever side notices first ends the connection; only the one that notices knows exactly why.
    assert "this client has none" in str(caught.value) or "both sides have keys" in str(caught.value.hint)


def test_a_client_goes_on_after_a_time_out() -> None:
    held: list[Request] = []

    def answer_both(request: Request) -> None:
        for former in held:
            former.answer(op="status")
        echo(request)

    script = in_turn(held.append, answer_both)
    with ScriptedBroker(script) as broker, ControlClient(broker.address) as client:
        with pytest.raises(BrokerUnreachable):
            client.request("status", timeout=0.02)

        assert client.request("workers").header["op"] == "workers"


def test_a_poll_that_returns_early_is_no_reason_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    poll = OwnedSocket.poll
    monkeypatch.setattr(OwnedSocket, "poll", lambda self, timeout_ms: poll(self, timeout_ms // 2))

    with (
        ScriptedBroker(ignore) as broker,
        ControlClient(broker.address) as client,
        pytest.raises(BrokerUnreachable),
    ):
        client.request("status", timeout=0.04)

    assert broker.ops == ["status"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("no_parameters", NoParameters),
        ("destroyed", Destroyed),
        ("invalid", ConfigError),
        ("forbidden", Forbidden),
        ("fenced", Fenced),
        ("unknown_op", ControlError),
    ],
)
def test_an_error_of_the_broker_is_raised_as_its_class(code: str, kind: type[Exception]) -> None:
    def script(request: Request) -> None:
        request.fail(code, "because of this")

    with (
        ScriptedBroker(script) as broker,
        ControlClient(broker.address) as client,
        pytest.raises(kind, match="because of this"),
    ):
        client.request("status")

    assert len(broker.headers) == 1


def test_an_error_without_an_id_belongs_to_the_request_under_way() -> None:
    """A broker that could not read a request cannot name it."""
    with (
        ScriptedBroker(lambda request: request.fail("malformed", "not a map", id=None)) as broker,
        ControlClient(broker.address) as client,
        pytest.raises(ControlError, match="not a map"),
    ):
        client.request("status")


@pytest.mark.parametrize("reply", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"v": 2, "ok": True, "id": 1})])
def test_what_does_not_speak_the_protocol_is_said_to_be_no_broker(reply: bytes) -> None:
    with (
        ScriptedBroker(lambda request: request.send_raw(reply)) as broker,
        ControlClient(broker.address) as client,
        pytest.raises(MalformedMessage, match=broker.address),
    ):
        client.request("status")


def test_a_mutation_names_the_incarnation_after_asking_for_it_once() -> None:
    with ScriptedBroker(echo) as broker, ControlClient(broker.address) as client:
        client.request("clear", mutating=True)
        client.request("start", mutating=True)

    assert broker.ops == ["status", "clear", "start"]
    assert [header.get("incarnation") for header in broker.headers] == [None, "one", "one"]


def test_a_mutation_that_another_incarnation_answers_is_not_redone() -> None:
    def restarted(request: Request) -> None:
        request.fail("restarted", "this is another broker")

    script = in_turn(echo, restarted, lambda request: request.answer(state=("two", 0, 0)))
    with ScriptedBroker(script) as broker, ControlClient(broker.address) as client:
        with pytest.raises(BrokerRestarted):
            client.request("clear", mutating=True)
        assert broker.ops == ["status", "clear"]

        client.request("clear", mutating=True)

    assert broker.ops == ["status", "clear", "status", "clear"]
    assert broker.headers[-1]["incarnation"] == "two"


def test_a_repeated_mutation_still_means_the_incarnation_of_the_first_try() -> None:
    script = in_turn(echo, ignore, lambda request: request.fail("restarted", incarnation="two"))
    with ScriptedBroker(script) as broker, ControlClient(broker.address) as client:
        with pytest.raises(BrokerRestarted):
            client.request("clear", mutating=True)

        assert client.incarnation == "two"

    assert [header.get("incarnation") for header in broker.headers] == [None, "one", "one"]


def test_threads_may_share_a_client() -> None:
    results: list[Any] = []

    with ScriptedBroker(echo) as broker, ControlClient(broker.address) as client:

        def ask(op: str) -> None:
            results.extend((op, client.request(op).header["op"]) for _ in range(50))

        threads = [threading.Thread(target=ask, args=(op,)) for op in ("status", "workers", "get")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(results) == 150
    assert all(asked == answered for asked, answered in results)


def test_close_ends_a_request_that_waits_in_another_thread_and_may_come_twice() -> None:
    arrived = threading.Event()
    errors: list[BaseException] = []

    with ScriptedBroker(lambda _request: arrived.set()) as broker:
        client = ControlClient(broker.address)

        def ask() -> None:
            try:
                client.request("get", wait_s=60.0)
            except StateError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        arrived.wait()
        client.close()
        client.close()
        thread.join()

    assert "closed" in str(errors[0])
    with pytest.raises(StateError, match="closed"):
        client.request("status")


def test_close_does_not_wait_for_a_broker_that_is_not_there() -> None:
    client = ControlClient(f"127.0.0.1:{free_port()}", timeout=0.1)
    with pytest.raises(BrokerUnreachable):
        client.request("set", frames=[bytes(1 << 20)])

    client.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_is_refused_and_leaves_the_parent_its_connection() -> None:
    with ScriptedBroker(echo) as broker, ControlClient(broker.address) as client:
        client.request("status")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                client.request("status")
            except Forked:
                client.close()
                code = 0
            finally:
                os._exit(code)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.request("status").header["op"] == "status"


def test_ctrl_c_ends_a_waiting_request() -> None:
    program = (
        "import sys\n"
        "from distgrad.client import ControlClient\n"
        "try:\n"
        "    ControlClient(sys.argv[1]).request('get', wait_s=100.0)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    arrived = threading.Event()

    with ScriptedBroker(lambda _request: arrived.set()) as broker:
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, broker.address])
        assert arrived.wait(60)
        process.send_signal(signal.SIGINT)

        assert process.wait(20) == 130
