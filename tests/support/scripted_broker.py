"""A broker that does what a test tells it: real bytes over a real socket, and nothing decided by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import msgpack
import zmq

State = tuple[str, int, int]


class Request:
    """One request as it came; a script may answer it now, later, twice or never."""

    def __init__(self, socket: zmq.Socket[bytes], message: list[bytes]) -> None:
        border = message.index(b"")
        self._socket = socket
        self._envelope = message[: border + 1]
        self.header: dict[str, Any] = msgpack.unpackb(message[border + 1])
        self.frames = message[border + 2 :]

    @property
    def op(self) -> str:
        return str(self.header["op"])

    def answer(self, *frames: Any, state: State = ("one", 0, 0), **keys: Any) -> None:
        incarnation, generation, version = state
        common = {"v": 1, "ok": True, "id": self.header["id"], "running": True, "fingerprint": None}
        named = {"incarnation": incarnation, "generation": generation, "version": version}
        self.send_raw(msgpack.packb({**common, **named, **keys}), *frames)

    def fail(self, code: str, message: str = "no", **keys: Any) -> None:
        header = {"v": 1, "ok": False, "id": self.header["id"], "error": code, "message": message, **keys}
        self.send_raw(msgpack.packb(header))

    def send_raw(self, *frames: Any) -> None:
        self._send(*self._envelope, *frames)

    def send_bare(self, *frames: Any) -> None:
        """Send frames without the empty one that a reply begins with."""
        self._send(self._envelope[0], *frames)

    def _send(self, *frames: Any) -> None:
        try:
            self._socket.send_multipart(frames)
        except zmq.ZMQError as error:
            # Whoever asked has given up on that connection: a reply to it has nowhere to go.
            if error.errno != zmq.EHOSTUNREACH:
                raise


class ScriptedBroker:
    """Run `script` for each request, on a thread that owns the socket.

    Parameters
    ----------
    script : callable
        Gets each `Request` in the order of arrival.

    Attributes
    ----------
    address : str
        Where it listens.
    headers : list of dict
        The headers of all requests so far.
    """

    def __init__(self, script: Callable[[Request], None]) -> None:
        self.headers: list[dict[str, Any]] = []
        self.frames: list[list[bytes]] = []
        self._script = script
        self._is_over = threading.Event()
        self._is_bound = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scripted-broker")

    def __enter__(self) -> ScriptedBroker:
        self._thread.start()
        self._is_bound.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    @property
    def ops(self) -> list[str]:
        return [header["op"] for header in self.headers]

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.router_mandatory = True
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            self.address = f"127.0.0.1:{port}"
            self._is_bound.set()
            try:
                while not self._is_over.is_set():
                    if socket.poll(20):
                        request = Request(socket, socket.recv_multipart())
                        self.headers.append(request.header)
                        self.frames.append(request.frames)
                        self._script(request)
            except BaseException as error:
                self._error = error


def in_turn(*scripts: Callable[[Request], None]) -> Callable[[Request], None]:
    """Run one script for each request; the last one goes on."""
    left = list(scripts)

    def script(request: Request) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(request)

    return script


def ignore(_request: Request) -> None:
    """Lose a request."""
