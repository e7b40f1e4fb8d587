"""Tests of `distgrad_broker.loop`: real sockets around a core that does what the test says."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zmq

from distgrad import Admin, sockets
from distgrad.durable.disk_events import WriteCheckpoint
from distgrad.durable.records import Record
from distgrad.layout import Layout
from distgrad.wire import Gradient, pack
from distgrad_broker import Broker, loop
from distgrad_broker.channels import ControlChannel, GradientChannel
from distgrad_broker.events import (
    Effect,
    Log,
    MessageRejected,
    Reply,
    RequestReceived,
    SaveEnded,
    SaveParameters,
    Shutdown,
    ShutdownAsked,
    SocketsDrained,
    WorkDue,
)
from distgrad_worker import Worker

HEADER = {"v": 1, "kind": "gradient", "worker": "w", "session": "s", "attempt": 1, "number": 1, "fingerprint": 5}
LAYOUT = Layout.of({"w": np.zeros(3)})


class ScriptedCore:
    """Records what it is told, and answers as the test says; its queue is the gradients that it has seen."""

    def __init__(self, answer: Callable[[Any], Sequence[Effect]]) -> None:
        self.seen: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.log: list[Any] = []
        self.work = 0
        self.deadline: float | None = None
        self.is_known = True
        self.ask_s = 0.2
        self._answer = answer

    @property
    def has_work(self) -> bool:
        return self.work > 0

    @property
    def is_drained(self) -> bool:
        return not self.work

    def take_records(self) -> list[Record]:
        return []

    def next_deadline(self) -> float | None:
        return self.deadline

    def handle(self, event: Any, now: float) -> Sequence[Effect]:
        if type(event) is Gradient:
            self.work += 1
        elif type(event) is WorkDue:
            self.work -= 1
        self.log.append(event)
        if type(event) is not SocketsDrained:
            self.seen.put(event)
        return self._answer(event)

    def kinds(self) -> list[type]:
        return [type(event) for event in self.log]


class Files:
    """What the loop hands to the file thread."""

    def __init__(self) -> None:
        self.saves: queue.SimpleQueue[SaveParameters] = queue.SimpleQueue()
        self.written: queue.SimpleQueue[Sequence[Record]] = queue.SimpleQueue()
        self.save = self.saves.put
        self.write = self.written.put

    def checkpoint(self, job: WriteCheckpoint) -> None:
        raise AssertionError("no core here asks for a checkpoint")


class Running:
    """A loop on its thread, with a client for each channel."""

    def __init__(self, core: ScriptedCore) -> None:
        self.core = core
        self.files = Files()
        self.logs: list[Log] = []
        self.loop: loop.Loop
        self.endpoints: tuple[str, str]
        self._is_ready = threading.Event()
        self.thread = threading.Thread(target=self._run, name="distgrad-broker")

    def _run(self) -> None:
        context = sockets.open_context()
        control = sockets.control_server(context, "tcp://127.0.0.1:0")
        gradients = sockets.gradient_server(context, "tcp://127.0.0.1:0")
        self.endpoints = control.endpoint, gradients.endpoint
        channels = ControlChannel(control, None), GradientChannel(gradients, None)
        self.loop = loop.Loop(self.core, *channels, None, self.files, self.logs.append)  # type: ignore[arg-type]
        self._is_ready.set()
        self.loop.run()
        self.loop.close()
        control.close(0)
        gradients.close(0)
        context.term()

    def __enter__(self) -> Running:
        self.thread.start()
        self._is_ready.wait()
        self._context = zmq.Context()
        self.asker, self.pusher = self._context.socket(zmq.REQ), self._context.socket(zmq.PUSH)
        for socket, endpoint in zip((self.asker, self.pusher), self.endpoints, strict=True):
            socket.linger = 0
            socket.connect(endpoint)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.post(ShutdownAsked())
        self.thread.join(30)
        self._context.destroy(linger=0)
        assert not self.thread.is_alive()


def nothing(_event: Any) -> Sequence[Effect]:
    return ()


@contextmanager
def running(answer: Callable[[Any], Sequence[Effect]] = nothing) -> Iterator[Running]:
    with Running(ScriptedCore(answer)) as made:
        yield made


def test_a_request_reaches_the_core_and_its_reply_the_client() -> None:
    def answer(event: Any) -> Sequence[Effect]:
        return [Reply(event.envelope, {"ok": True}, [b"x"])] if type(event) is RequestReceived else ()

    with running(answer) as made:
        made.asker.send(pack({"v": 1, "op": "status"}))
        assert made.asker.poll(20_000)
        assert made.asker.recv_multipart() == [pack({"ok": True}), b"x"]


def test_each_gradient_is_handed_over_and_then_there_is_work() -> None:
    with running() as made:
        for number in (1, 2):
            made.pusher.send_multipart([pack({**HEADER, "number": number}), b"1234"])
        seen = [made.core.seen.get(timeout=20) for _ in range(4)]

    assert sorted(type(event).__name__ for event in seen) == ["Gradient", "Gradient", "WorkDue", "WorkDue"]
    assert [event.number for event in seen if type(event) is Gradient] == [1, 2]


def test_what_is_no_gradient_is_told_as_rejected() -> None:
    with running() as made:
        made.pusher.send(b"noise")
        assert made.core.seen.get(timeout=20) == MessageRejected("malformed")


def test_the_core_is_called_at_its_deadline_without_anything_to_read() -> None:
    called = threading.Event()
    deadline = time.monotonic() + 0.02

    def answer(event: Any) -> Sequence[Effect]:
        if type(event) is SocketsDrained and time.monotonic() >= deadline:
            called.set()
        return ()

    core = ScriptedCore(answer)
    core.deadline = deadline
    with Running(core):
        assert called.wait(20)
        core.deadline = None


def test_a_save_goes_to_the_file_thread_and_its_end_comes_back() -> None:
    job = SaveParameters(1, LAYOUT, LAYOUT.pack({"w": np.zeros(3)}), 5)

    def answer(event: Any) -> Sequence[Effect]:
        return [job, Log(20, "saving", {})] if type(event) is RequestReceived else ()

    with running(answer) as made:
        made.asker.send(pack({"v": 1, "op": "save"}))
        assert made.files.saves.get(timeout=20) is job
        made.loop.post(SaveEnded(1, "path", None))
        assert type(made.core.seen.get(timeout=20)) is RequestReceived
        assert made.core.seen.get(timeout=20) == SaveEnded(1, "path", None)
    assert made.logs == [Log(20, "saving", {})]


def test_a_shutdown_by_the_core_ends_the_loop_after_its_time() -> None:
    def answer(event: Any) -> Sequence[Effect]:
        return [Shutdown(0.01)] if type(event) is RequestReceived else ()

    with running(answer) as made:
        made.asker.send(pack({"v": 1, "op": "destroy"}))
        made.thread.join(20)
        assert not made.thread.is_alive()


# Outside the default run until it is understood: twice, under load, ZeroMQ ended the process in `zmq_ctx_term` here.
@pytest.mark.slow
def test_a_shutdown_reads_what_has_arrived_applies_it_and_is_heard_once() -> None:
    n_gradients = 3 * loop.MAX_GRADIENTS_A_TURN
    gate, is_there = threading.Event(), threading.Event()

    def answer(event: Any) -> Sequence[Effect]:
        if type(event) is RequestReceived:
            is_there.set()
            gate.wait(20)
        return ()

    with running(answer) as made:
        made.asker.send(pack({"v": 1, "op": "status"}))
        assert is_there.wait(20)
        for number in range(1, n_gradients + 1):
            made.pusher.send_multipart([pack({**HEADER, "number": number}), b"1234"])
        made.loop.post(ShutdownAsked())
        made.loop.post(ShutdownAsked())
        gate.set()
        made.thread.join(30)
        kinds = made.core.kinds()
    # ZeroMQ's own thread may still be bringing the last of them when the loop looks.
    assert kinds.count(ShutdownAsked) == 1
    assert kinds.count(Gradient) == kinds.count(WorkDue)


@pytest.mark.parametrize(("farewell_s", "ask_s"), [(60.0, 0.2), (0.01, 1_200.0)])
def test_a_shutdown_lets_workers_hear_of_the_last_of_their_gradients(
    monkeypatch: pytest.MonkeyPatch, farewell_s: float, ask_s: float
) -> None:
    monkeypatch.setattr(loop, "FAREWELL_S", farewell_s)

    def answer(event: Any) -> Sequence[Effect]:
        if type(event) is RequestReceived:
            core.is_known = True
            return [Reply(event.envelope, {"ok": True})]
        return ()

    core = ScriptedCore(answer)
    core.is_known, core.ask_s = False, ask_s
    with Running(core) as made:
        made.loop.post(ShutdownAsked())
        assert type(made.core.seen.get(timeout=20)) is ShutdownAsked
        made.asker.send(pack({"v": 1, "op": "heartbeat"}))
        assert made.asker.poll(20_000)
        made.thread.join(20)
        assert not made.thread.is_alive()


def test_a_shutdown_does_not_wait_for_ever_for_workers_that_do_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FAREWELL_S", 0.01)
    core = ScriptedCore(nothing)
    core.is_known = False
    with Running(core) as made:
        made.loop.post(ShutdownAsked())
        made.thread.join(20)
        assert not made.thread.is_alive()


def test_work_that_does_not_end_is_given_up_at_a_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CLOSE_TIMEOUT_S", 0.05)
    core = ScriptedCore(nothing)
    core.work = 10**9
    with Running(core) as made:
        made.loop.post(ShutdownAsked())
        made.thread.join(20)
        assert not made.thread.is_alive()


def test_what_is_posted_after_the_end_goes_nowhere() -> None:
    with running() as made:
        made.loop.post(ShutdownAsked())
        made.thread.join(20)
        made.loop.post(ShutdownAsked())
        made.loop.post(SaveEnded(1, "path", None))


def test_many_posts_at_once_are_all_taken_in() -> None:
    with running() as made:
        for ticket in range(100_000):
            made.loop.post(SaveEnded(ticket, "path", None))
        assert [made.core.seen.get(timeout=20).ticket for _ in range(100_000)] == list(range(100_000))


def test_a_peer_that_never_stops_sending_holds_up_neither_others_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "INTAKE_TIMEOUT_S", 0.2)
    is_over = threading.Event()

    def flood(endpoint: str) -> None:
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.linger = 0
            push.connect(endpoint)
            while not is_over.is_set():
                push.poll(100, zmq.POLLOUT) and push.send_multipart([b"noise", b"noise"], zmq.DONTWAIT)

    with Broker(parameters={"w": np.zeros(3)}) as broker:
        flooding = threading.Thread(target=flood, args=(broker.gradients,))
        flooding.start()
        with Admin(broker.address) as admin, Worker(broker.address) as worker:
            while admin.status()["rejected"].get("malformed", 0) < 1000:
                pass
            for _ in range(10):
                worker.push({"w": np.ones(3)})
            worker.flush(timeout=60)
            assert worker.pull().version == 10
    is_over.set()
    flooding.join()
