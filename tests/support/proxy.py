"""A TCP proxy that cuts connections by the bytes that it has forwarded, and knows whether a cut tore a message.

Each connection gets a budget from a seeded generator. When as many bytes have gone from the client to the server, or
from the server to the client, both sides are closed at once, at that very byte. The generator makes the budgets
deterministic; how often a client comes back depends on the client.
"""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

_GREETING_BYTES = 64
_MORE, _LONG, _COMMAND = 0x01, 0x02, 0x04
_CHUNK_BYTES = 64 * 1024
# Closing with this lets the kernel send a reset and drop what it has not sent: the rough way to lose a connection.
_RESET = struct.pack("ii", 1, 0)

Budgets = Iterator[int]


class MessageTracker:
    """Follow one direction of a ZMTP 3 connection just far enough to know whether it stands inside a message."""

    def __init__(self) -> None:
        self.messages = 0
        self._skip = _GREETING_BYTES
        self._head = b""
        self._flags = 0
        self._is_open = False

    @property
    def is_inside(self) -> bool:
        """Whether the bytes so far end within a message (not within the greeting or a command)."""
        return self._is_open

    def feed(self, data: bytes) -> None:
        """Take in bytes that were forwarded."""
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
                if not self._skip:
                    self._end_frame()
                continue
            self._head += data[position : position + 1]
            position += 1
            self._flags = self._head[0]
            if not self._flags & _COMMAND:
                self._is_open = True
            if len(self._head) == (9 if self._flags & _LONG else 2):
                self._skip = int.from_bytes(self._head[1:], "big")
                self._head = b""
                if not self._skip:
                    self._end_frame()

    def _end_frame(self) -> None:
        if self._is_open and not self._flags & (_MORE | _COMMAND):
            self._is_open = False
            self.messages += 1


class _Link:
    """One connection through the proxy: two sockets, and what has gone either way."""

    def __init__(self, port: _Port, client: socket.socket, budget: int) -> None:
        self.port = port
        self.client = client
        self.server = socket.create_connection(port.target)
        self.left = {self.client: budget, self.server: budget}
        self.trackers = {self.client: MessageTracker(), self.server: MessageTracker()}
        for end in (self.client, self.server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(5.0)

    def other(self, end: socket.socket) -> socket.socket:
        return self.server if end is self.client else self.client


class _Port:
    """Where the proxy listens, and for whom."""

    def __init__(self, listener: socket.socket, target: tuple[str, int], name: str, budgets: Budgets | None) -> None:
        self.listener = listener
        self.target = target
        self.name = name
        self.budgets = budgets


class CuttingProxy:
    """Forward TCP connections on a thread of its own, and cut them.

    Attributes
    ----------
    cuts : dict of str to list of bool
        For each name given to `listen`, one entry a cut: whether it tore a message that was on its way.
    """

    def __init__(self) -> None:
        self.cuts: dict[str, list[bool]] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._links: set[_Link] = set()
        self._ports: list[_Port] = []
        self._jobs: list[Callable[[], None]] = []
        self._is_over = False
        self._lock = threading.Lock()
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="cutting-proxy", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> CuttingProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._do(self._stop)
        self._thread.join()
        for link in list(self._links):
            self._close(link)
        for port in self._ports:
            port.listener.close()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        if self._error is not None and kind is None:
            raise self._error

    def listen(self, target: str, name: str, budgets: Budgets | None = None) -> str:
        """Listen on a free port and forward to `target`; without budgets nothing is cut by itself."""
        host, _, port_text = target.removeprefix("tcp://").rpartition(":")
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = _Port(listener, (host, int(port_text)), name, budgets)
        self.cuts.setdefault(name, [])

        def add() -> None:
            self._ports.append(port)
            self._selector.register(listener, selectors.EVENT_READ, port)

        self._do(add)
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    def cut(self, name: str) -> None:
        """Cut all connections that came in under a name, now."""

        def cut_all() -> None:
            for link in [link for link in self._links if link.port.name == name]:
                self._cut(link)

        self._do(cut_all)

    def _do(self, job: Callable[[], None]) -> None:
        """Have the proxy's thread do something, and wait until it has."""
        done = threading.Event()

        def do_and_tell() -> None:
            job()
            done.set()

        with self._lock:
            self._jobs.append(do_and_tell)
        self._wake_write.send(b"x")
        assert done.wait(10) or self._error is not None, "the proxy's thread hangs"

    def _stop(self) -> None:
        self._is_over = True

    def _run(self) -> None:
        try:
            while not self._is_over:
                for key, _ in self._selector.select():
                    if key.data is None:
                        self._wake_read.recv(64)
                        with self._lock:
                            jobs, self._jobs = self._jobs, []
                        for job in jobs:
                            job()
                    elif isinstance(key.data, _Port):
                        self._accept(key.data)
                    elif key.data in self._links:
                        self._forward(key.data, key.fileobj)  # type: ignore[arg-type]  # only sockets are registered
        except BaseException as error:
            self._error = error

    def _accept(self, port: _Port) -> None:
        client, _ = port.listener.accept()
        budget = 2**62 if port.budgets is None else next(port.budgets)
        try:
            link = _Link(port, client, budget)
        except OSError:
            client.close()
            return
        self._links.add(link)
        for end in (link.client, link.server):
            self._selector.register(end, selectors.EVENT_READ, link)

    def _forward(self, link: _Link, source: socket.socket) -> None:
        try:
            data = source.recv(min(_CHUNK_BYTES, link.left[source]))
            if data:
                # A receiver that does not read makes everybody wait; the broker and its clients always read.
                link.other(source).sendall(data)
        except OSError:
            data = b""
        if not data:
            self._close(link)
            return
        link.trackers[source].feed(data)
        link.left[source] -= len(data)
        if not link.left[source]:
            self._cut(link)

    def _cut(self, link: _Link) -> None:
        self.cuts[link.port.name].append(any(tracker.is_inside for tracker in link.trackers.values()))
        for end in (link.client, link.server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close(link)

    def _close(self, link: _Link) -> None:
        self._links.discard(link)
        for end in (link.client, link.server):
            self._selector.unregister(end)
            end.close()


def budgets(seed: int, low: int, high: int) -> Budgets:
    """Draw byte budgets without end, spread evenly over the orders of magnitude between two bounds."""
    chance = random.Random(seed)
    ratio = high / low
    while True:
        yield int(low * ratio ** chance.random())
