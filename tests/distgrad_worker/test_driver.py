"""Tests of `distgrad_worker.driver`, mostly against a broker that does what the test tells it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from distgrad import addresses, gradient_messages, wire
from distgrad.errors import BrokerUnreachable, ControlError, DeliveryFailed, DistgradError, Fenced
from distgrad.layout import Layout
from distgrad_worker import asking
from distgrad_worker.driver import Driver
from distgrad_worker.headers import Header
from distgrad_worker.session import OPEN, Session
from support.ports import free_port
from support.scripted_broker import Request, ScriptedBroker, ignore, in_turn

LAYOUT = Layout.of({"w": np.zeros(2, np.float32)})
STATE = ("one", 0, 0)


class Shell:
    """A driver with its session and lock, as `Worker` puts them together."""

    def __init__(self, address: str, gradients: str | None = None) -> None:
        self.session = Session("w", b"0123456789abcdef", generated=False, window_bytes=None)
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.driver = Driver(self.session, self.changed, self.lock, addresses.parse(address, 5556), None, gradients)

    def wait_until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        with self.lock:
            while not is_so():
                assert self.driver.failure is None, self.driver.failure
                assert time.monotonic() < deadline, "it does not come to pass"
                self.changed.wait(0.05)

    def wait_until_open(self) -> None:
        self.wait_until(lambda: self.session.phase == OPEN)

    def push(self, value: float = 1.0) -> int:
        header = Header("w", LAYOUT.fingerprint, None)
        with self.lock:
            number = self.session.push(header, {}, [np.full(2, value, np.float32).data.cast("B")], 8)
            self.driver.send_due()
            self.driver.wake()
        return number


@contextmanager
def running(address: str, *, leaves: bool = False, gradients: str | None = None) -> Iterator[Shell]:
    shell = Shell(address, gradients)
    shell.driver.start()
    try:
        yield shell
    finally:
        shell.driver.close(leaves=leaves, timeout_s=2.0)


@contextmanager
def gradient_sink() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield socket, f"tcp://127.0.0.1:{port}"


def greet(request: Request, gradients: str, **changes: Any) -> None:
    keys = {
        "session": "one:1", "accepted": 0, "settled": 0, "adopted": False, "cursor": None, "gradients": gradients,
        "lease_s": 30.0, "queued": 0, "queue_bytes": 1 << 20, "grant": 1 << 20, "grant_seq": 1,
    }  # fmt: skip
    request.answer(LAYOUT.to_frame(), state=STATE, fingerprint=LAYOUT.fingerprint, **{**keys, **changes})


def beat(request: Request, **changes: Any) -> None:
    keys = {
        "accepted": 0, "settled": 0, "queued": 0, "attempt": request.header["attempt"], "resend": False,
        "grant": 1 << 20, "grant_seq": 1, "refused": [],
    }  # fmt: skip
    request.answer(state=STATE, fingerprint=LAYOUT.fingerprint, **{**keys, **changes})


def broker_of(gradients: str, **beats: Any) -> ScriptedBroker:
    def script(request: Request) -> None:
        if request.op == "hello":
            greet(request, gradients)
        elif request.op == "heartbeat":
            beat(request, **beats)
        else:
            request.answer(state=STATE)

    return ScriptedBroker(script)


def test_it_says_hello_and_then_gives_a_sign_of_life() -> None:
    with gradient_sink() as (_, gradients), broker_of(gradients) as broker, running(broker.address) as shell:
        shell.wait_until(lambda: "heartbeat" in broker.ops)

        assert broker.ops[:2] == ["hello", "heartbeat"]
        assert broker.headers[0]["worker"] == "w"
        assert shell.session.phase == OPEN


def test_a_lost_hello_is_sent_again_over_another_connection() -> None:
    with gradient_sink() as (_, gradients):
        script = in_turn(ignore, ignore, lambda request: greet(request, gradients), beat)
        with ScriptedBroker(script) as broker, running(broker.address) as shell:
            shell.wait_until_open()
            assert broker.ops[:3] == ["hello"] * 3


def test_a_reply_to_a_former_request_is_not_taken_for_the_present_one() -> None:
    with gradient_sink() as (_, gradients):

        def late(request: Request) -> None:
            request.header["id"] -= 1
            greet(request, gradients, session="wrong:1")

        script = in_turn(late, lambda request: greet(request, gradients), beat)
        with ScriptedBroker(script) as broker, running(broker.address) as shell:
            shell.wait_until_open()
            assert asking.heartbeat(shell.session)["session"] == "one:1"


def test_noise_instead_of_a_reply_ends_the_greeting_with_an_error() -> None:
    def noise(request: Request) -> None:
        request.send_raw(b"\xc1 not msgpack")

    with ScriptedBroker(noise) as broker, running(broker.address) as shell:
        shell.wait_until(lambda: shell.session.ended is not None)
        assert isinstance(shell.session.ended, DistgradError)


def test_a_broker_that_is_shutting_down_is_asked_again_but_not_in_a_tight_loop() -> None:
    def closing(request: Request) -> None:
        request.fail("failed", "the broker is shutting down")

    with gradient_sink() as (_, gradients):
        script = in_turn(closing, lambda request: greet(request, gradients), beat)
        with ScriptedBroker(script) as broker, running(broker.address) as shell:
            shell.wait_until_open()
            assert broker.ops[:2] == ["hello", "hello"]


def test_a_small_gradient_is_one_frame() -> None:
    with gradient_sink() as (sink, gradients), broker_of(gradients) as broker, running(broker.address) as shell:
        shell.wait_until_open()

        assert [shell.push(1.0), shell.push(2.0)] == [1, 2]

        for number in (1, 2):
            assert sink.poll(10_000)
            (header,) = sink.recv_multipart()
            gradient = gradient_messages.parse_gradient(wire.unpack(header), [], 0)  # "kind" is checked there
            assert (gradient.worker, gradient.session, gradient.attempt) == ("w", "one:1", 1)
            assert (gradient.number, gradient.encoding) == (number, "raw")
            assert np.frombuffer(gradient.parts[0], "<f4").tolist() == [number, number]


def test_a_gap_makes_a_new_attempt_from_the_brokers_number() -> None:
    with gradient_sink() as (sink, gradients):

        def script(request: Request) -> None:
            if request.op == "hello":
                greet(request, gradients)
            elif request.header["attempt"] == 1:
                beat(request, accepted=1, settled=1, resend=request.header["sent"] == 3)
            else:
                beat(request, accepted=1, settled=1)

        with ScriptedBroker(script) as broker, running(broker.address) as shell:
            shell.wait_until_open()
            for value in (1.0, 2.0, 3.0):
                shell.push(value)
            seen: list[tuple[int, int]] = []
            while (2, 3) not in seen:
                assert sink.poll(10_000)
                fields = msgpack.unpackb(sink.recv_multipart()[0])
                seen.append((fields["attempt"], fields["number"]))

        assert [each for each in seen if each[0] == 2] == [(2, 2), (2, 3)]
        # A connection that is closed for a new attempt may take what was on its way along.
        assert {each for each in seen if each[0] != 2} <= {(1, 1), (1, 2), (1, 3)}


def test_the_override_says_where_gradients_go() -> None:
    with (
        gradient_sink() as (sink, real),
        broker_of("tcp://127.0.0.1:1") as broker,
        running(broker.address, gradients=real) as shell,
    ):
        shell.wait_until_open()
        shell.push()
        assert sink.poll(10_000)


def test_gradients_that_never_arrive_end_in_an_error_that_names_where_they_were_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distgrad_worker.losses.STALL_S", 0.01)
    nowhere = f"tcp://127.0.0.1:{free_port()}"
    with broker_of(nowhere) as broker, running(broker.address) as shell:
        shell.wait_until_open()
        shell.push()
        shell.wait_until(lambda: shell.session.ended is not None)
        assert isinstance(shell.session.ended, DeliveryFailed)
        assert nowhere in str(shell.session.ended)


def test_leaving_says_goodbye_and_not_leaving_does_not() -> None:
    for leaves in (True, False):
        with gradient_sink() as (_, gradients), broker_of(gradients) as broker:
            with running(broker.address, leaves=leaves) as shell:
                shell.wait_until_open()
            assert ("leave" in broker.ops) is leaves


def test_close_does_not_wait_for_a_broker_that_is_silent() -> None:
    shell = Shell(f"127.0.0.1:{free_port()}")
    shell.driver.start()

    shell.driver.close(leaves=True, timeout_s=0.1)

    assert shell.driver.context.closed


def test_close_works_before_start_was_of_any_use() -> None:
    with ScriptedBroker(ignore) as broker, running(broker.address) as shell, shell.lock:
        shell.driver.send_pushed(16)


def test_a_bug_in_the_thread_is_kept_for_whoever_uses_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(session: Session) -> dict[str, Any]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(asking, "hello", broken)
    shell = Shell(f"127.0.0.1:{free_port()}")
    shell.driver.start()
    with shell.lock:
        assert shell.changed.wait_for(lambda: shell.driver.failure is not None, 20)
    shell.driver.close(leaves=False, timeout_s=0.1)

    assert isinstance(shell.driver.failure, ZeroDivisionError)


def test_whose_session_has_ended_sleeps() -> None:
    """Regression: it looked at the clock without end, which had stopped being set."""
    shell = Shell(f"127.0.0.1:{free_port()}")
    shell.session.on_error(Fenced("fenced", "another process"), "fenced")

    assert shell.driver._timeout_s(time.monotonic() + 3600) > 1

    shell.driver.start()
    shell.driver.close(leaves=False, timeout_s=0.1)


def test_a_fence_ends_the_session_and_nothing_more_is_asked() -> None:
    with gradient_sink() as (_, gradients):

        def script(request: Request) -> None:
            if request.op == "hello":
                greet(request, gradients)
            else:
                request.fail("fenced", "a newer process runs")

        with ScriptedBroker(script) as broker, running(broker.address) as shell:
            shell.wait_until(lambda: shell.session.ended is not None)
            asked = len(broker.ops)
            assert isinstance(shell.session.ended, ControlError)
        assert len(broker.ops) == asked


def test_an_unknown_worker_says_hello_again_with_its_session() -> None:
    with gradient_sink() as (_, gradients):
        script = in_turn(
            lambda request: greet(request, gradients),
            lambda request: request.fail("unknown_worker", "who?"),
            lambda request: greet(request, gradients, session="one:2"),
            beat,
        )
        with ScriptedBroker(script) as broker, running(broker.address) as shell:
            shell.wait_until(lambda: broker.ops[:3] == ["hello", "heartbeat", "hello"] and len(broker.ops) > 3)
            assert broker.headers[2]["session"] == "one:1"
            assert asking.heartbeat(shell.session)["session"] == "one:2"


def test_the_errors_of_unreachable_brokers_are_timeouts_too() -> None:
    assert issubclass(BrokerUnreachable, TimeoutError)
