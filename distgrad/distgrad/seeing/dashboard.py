"""The web application behind ``distgrad dashboard``: a page, a stream of looks, and commands.

Who may do what: two tokens, one to watch and one that may also control. They travel in the printed link behind ``#``,
which no browser sends to a server, and from there in the ``Authorization`` header, which no other site can make a
browser send. Requests must name a host that no foreign name can be resolved to (an IP address or localhost), and the
page may load nothing but its own files.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distgrad.errors import DistgradError
from distgrad.seeing.history import Sight
from distgrad.seeing.watcher import Watcher

# What a stop waits for the queue to drain before it says that it goes on doing so.
DRAIN_WITHIN_S = 3.0
MAX_BODY_BYTES = 4096
_PAGE = {
    "/": ("index.html", "text/html"),
    "/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard.js": ("dashboard.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Tokens:
    """Who may watch, and who may control.

    Attributes
    ----------
    watch : str
        Shows everything and changes nothing.
    control : str or None
        May also start, stop, save and evict; None if nobody may.
    """

    watch: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    control: str | None = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    def allows(self, header: str | None) -> str | None:
        """Tell what the bearer of a token may do.

        Parameters
        ----------
        header : str or None
            The request's ``Authorization``.

        Returns
        -------
        str or None
            ``control``, ``watch``, or None for nothing. The time that it takes does not depend on the token.
        """
        given = (header or "").removeprefix("Bearer ").encode()
        is_control = hmac.compare_digest(given, (self.control or "").encode()) and self.control is not None
        is_watch = hmac.compare_digest(given, self.watch.encode())
        return "control" if is_control else "watch" if is_watch else None


class Dashboard:
    """One broker's page.

    Parameters
    ----------
    watcher : Watcher
        Asks the broker; closed by who made it.
    every_s : float, seconds
        Between two looks.
    tokens : Tokens
        Who may do what.
    host : str
        What it listens on, by which it may be called beside localhost and IP addresses.
    """

    def __init__(self, watcher: Watcher, every_s: float, tokens: Tokens, host: str) -> None:
        self._watcher = watcher
        self._every_s = every_s
        self._tokens = tokens
        self._host = host
        self._changed = asyncio.Condition()
        self._is_ending = False
        routes = [Route(path, self._file) for path in _PAGE]
        routes += [
            Route("/api/events", self._events),
            Route("/api/{command}", self._command, methods=["POST"]),
        ]
        self.app = Guard(Starlette(routes=routes), host)

    async def keep_looking(self) -> None:
        """Look at the broker until the task is cancelled."""
        while True:
            await run_in_threadpool(self._look)
            await self._tell()
            await asyncio.sleep(self._every_s)

    async def end(self) -> None:
        """End all streams, so that the server can."""
        self._is_ending = True
        await self._tell()

    def _look(self) -> Sight:
        try:
            return self._watcher.look()
        except DistgradError as error:  # refused from the first look on; the page says why
            return self._watcher.history.miss(time.time(), str(error))

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _file(self, request: Request) -> Response:
        name, media_type = _PAGE[request.url.path]
        content = files("distgrad.seeing").joinpath("static", name).read_bytes()
        return Response(content, media_type=media_type)

    async def _events(self, request: Request) -> Response:
        """Send the history, and then each look, as server-sent events."""
        may = self._tokens.allows(request.headers.get("authorization"))
        if may is None:
            return _refused(401, "this link's token is missing or wrong; take the link that the command printed")
        return StreamingResponse(self._stream(may), media_type="text/event-stream")

    async def _stream(self, may: str) -> AsyncIterator[bytes]:
        history = self._watcher.history
        points = [asdict(point) for point in list(history.points)]
        yield _event("history", {"address": self._watcher.address, "may": may, "points": points})
        yield _event("look", self._picture(history.sight))
        while not self._is_ending:
            async with self._changed:
                await self._changed.wait()
            yield _event("look", self._picture(history.sight))

    def _picture(self, sight: Sight) -> dict[str, Any]:
        points = self._watcher.history.points
        return {
            "at": sight.at,
            "error": sight.error,
            "status": sight.status,
            "workers": sight.workers,
            "point": asdict(points[-1]) if points and not sight.error else None,
        }

    async def _command(self, request: Request) -> Response:
        may = self._tokens.allows(request.headers.get("authorization"))
        if may is None:
            return _refused(401, "this link's token is missing or wrong; take the link that the command printed")
        if may != "control":
            return _refused(403, "this link only shows; the one that controls is printed beside it")
        commands: Mapping[str, Callable[[Any], str]] = {
            "start": self._start,
            "stop": self._stop,
            "save": lambda _: f"saved to {self._watcher.admin.save()}",
            "evict": self._evict,
        }
        command = commands.get(request.path_params["command"])
        if command is None:
            return _refused(404, f"there are {', '.join(commands)}")
        try:
            asked = await _body(request)
        except ValueError:
            return _refused(400, f"the body must be a JSON object of at most {MAX_BODY_BYTES} bytes")
        try:
            said = await run_in_threadpool(command, asked)
        except (DistgradError, TimeoutError) as error:
            return _refused(409, str(error))
        await run_in_threadpool(self._look)
        await self._tell()
        return JSONResponse({"said": said})

    def _start(self, _: Any) -> str:
        return "started" if self._watcher.admin.start() else "was running already"

    def _stop(self, _: Any) -> str:
        return "stopped" if self._watcher.admin.stop(timeout=DRAIN_WITHIN_S) else "was stopped already"

    def _evict(self, asked: Mapping[str, Any]) -> str:
        worker = str(asked.get("worker"))
        self._watcher.admin.evict(worker)
        return f"evicted {worker}"


class Guard:
    """Refuses requests under foreign names, and puts the headers that protect the page on every answer.

    Parameters
    ----------
    app : ASGI application
        What it guards.
    host : str
        What the server listens on.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in _HEADERS.items())]
            await send(message)

        request = Request(scope)
        app: Callable[[Scope, Receive, Send], Awaitable[None]] = self._app
        if not is_own_name(request.headers.get("host", ""), self._host):
            app = PlainTextResponse("call this page by the address that was printed\n", 421)
        elif request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and request.method != "GET":
            app = PlainTextResponse("another site may not do this\n", 403)
        await app(scope, receive, send_guarded)


def is_own_name(header: str, host: str) -> bool:
    """Tell whether a request's ``Host`` can only mean this server.

    A page of another site can have its own name resolved to our address ("DNS rebinding"), and would then count as
    being of the same origin. It cannot do that with an address, or with localhost.

    Parameters
    ----------
    header : str
        ``Host``, with or without a port.
    host : str
        What the server listens on.

    Returns
    -------
    bool
        Whether the request may be answered.
    """
    name = header[1 : header.find("]")] if header.startswith("[") else header.partition(":")[0]
    if name.lower() in ("localhost", host.lower()):
        return bool(name)
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _body(request: Request) -> dict[str, Any]:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ValueError("too long")
    asked = json.loads(body or b"{}")
    if not isinstance(asked, dict):
        raise ValueError("no object")
    return asked


def _refused(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)


def _event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(_plain(data))}\n\n".encode()


def _plain(value: Any) -> Any:
    """Make a value JSON: numbers that are none become text, bytes become hexadecimal."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
