"""A dashboard that is served on a thread of the test, and requests to it as any program may send them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, NamedTuple

from distgrad import addresses
from distgrad.seeing.dashboard_server import DashboardServer
from distgrad.seeing.watcher import Watcher


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


@contextmanager
def served(address: str, every_s: float = 0.05, *, controls: bool = True) -> Iterator[DashboardServer]:
    """Serve while the context lasts."""
    with Watcher(address) as watcher:
        server = DashboardServer(watcher, addresses.parse("127.0.0.1:0", 0), every_s, controls=controls)
        thread = Thread(target=server.run, name="dashboard")
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def ask(server: DashboardServer, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """Send one request; ``_`` in a header's name stands for ``-``."""
    connection = http.client.HTTPConnection("127.0.0.1", server.address.port, timeout=30)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, given)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


@contextmanager
def events(server: DashboardServer, token: str) -> Iterator[Iterator[tuple[str, Any]]]:
    """Listen to the stream: name and data of each event."""
    connection = http.client.HTTPConnection("127.0.0.1", server.address.port, timeout=30)
    connection.request("GET", "/api/events", headers={"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    assert answer.headers["Content-Type"].startswith("text/event-stream")

    def told() -> Iterator[tuple[str, Any]]:
        name = ""
        for line in answer:
            kind, _, value = line.decode().rstrip("\n").partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                yield name, json.loads(value)

    try:
        yield told()
    finally:
        answer.close()
        connection.close()
