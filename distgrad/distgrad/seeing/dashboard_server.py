"""Running the dashboard: a socket, a server, and the task that looks at the broker."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

import uvicorn

from distgrad.addresses import Address
from distgrad.errors import ConfigError
from distgrad.seeing.dashboard import Dashboard, Tokens
from distgrad.seeing.watcher import Watcher

# How long streams have to end.
END_WITHIN_S = 2


class DashboardServer:
    """A dashboard's server; its port is taken when it is made.

    Parameters
    ----------
    watcher : Watcher
        Asks the broker; closed by who made it.
    listen : Address
        Where to serve; port 0 takes a free one.
    every_s : float, seconds
        Between two looks.
    controls : bool
        Whether there is a link that may control.

    Raises
    ------
    ConfigError
        If the address cannot be had.
    """

    def __init__(self, watcher: Watcher, listen: Address, every_s: float, *, controls: bool) -> None:
        self._watcher = watcher
        self._every_s = every_s
        self._host = listen.host
        self.tokens = Tokens() if controls else Tokens(control=None)
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((listen.host, listen.port))
            self._socket.listen()  # who opens a link as soon as it is printed waits, and is not turned away
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"cannot listen on {listen}: {error.strerror or error}") from error
        self.address = Address(listen.host, int(self._socket.getsockname()[1]))
        self._is_stopped = False
        self._server: uvicorn.Server | None = None

    def link(self, token: str) -> str:
        """Give the link that carries a token.

        Parameters
        ----------
        token : str
            One of `tokens`.

        Returns
        -------
        str
            What is behind ``#`` is not sent to a server.
        """
        return f"http://{self.address}/#token={token}"

    def run(self) -> None:
        """Serve until a signal, or `stop`."""
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it once more when all is closed
            asyncio.run(self._serve())

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._is_stopped = True
        if self._server is not None:
            self._server.should_exit = True

    async def _serve(self) -> None:
        dashboard = Dashboard(self._watcher, self._every_s, self.tokens, self._host)
        config = uvicorn.Config(
            dashboard.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=END_WITHIN_S,
        )
        self._server = server = _Server(config, dashboard.end)
        server.should_exit = self._is_stopped
        looking = asyncio.create_task(dashboard.keep_looking())
        try:
            await server.serve(sockets=[self._socket])
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
            self._socket.close()


class _Server(uvicorn.Server):
    """Ends the streams before it waits for them."""

    def __init__(self, config: uvicorn.Config, before_end: Callable[[], object]) -> None:
        super().__init__(config)
        self._before_end = before_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._before_end()  # type: ignore[misc]
        await super().shutdown(sockets)


def serve(
    watcher: Watcher,
    listen: Address,
    every_s: float,
    *,
    controls: bool,
    on_ready: Callable[[str, str | None], None],
) -> None:
    """Serve a dashboard until Ctrl-C.

    Parameters
    ----------
    watcher : Watcher
        Asks the broker; closed by who made it.
    listen : Address
        Where to serve.
    every_s : float, seconds
        Between two looks.
    controls : bool
        Whether there is a link that may control.
    on_ready : callable
        Is given the link to watch with, and the one that controls or None.

    Raises
    ------
    ConfigError
        If the address cannot be had.
    """
    server = DashboardServer(watcher, listen, every_s, controls=controls)
    control = server.tokens.control
    on_ready(server.link(server.tokens.watch), None if control is None else server.link(control))
    server.run()
