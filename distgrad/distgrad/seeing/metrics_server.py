"""An exporter for Prometheus: each request for ``/metrics`` asks the broker once."""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from distgrad.addresses import Address
from distgrad.errors import ConfigError, DistgradError
from distgrad.seeing import metrics
from distgrad.seeing.watcher import Watcher

# How long a client may be silent within a request.
REQUEST_TIMEOUT_S = 10.0


class MetricsServer(ThreadingHTTPServer):
    """A small web server with one page.

    Parameters
    ----------
    watcher : Watcher
        Asks the broker; closed by who made it.
    listen : Address
        Where to serve; port 0 takes a free one.

    Raises
    ------
    ConfigError
        If the address cannot be had.
    """

    daemon_threads = True

    def __init__(self, watcher: Watcher, listen: Address) -> None:
        self.watcher = watcher
        if ":" in listen.host:
            import socket  # only who serves on IPv6 needs it

            self.address_family = socket.AF_INET6
        try:
            super().__init__((listen.host, listen.port), _Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {listen}: {error.strerror or error}") from error

    @property
    def url(self) -> str:
        """Where the metrics are, with the real port."""
        host, port = self.server_address[:2]
        return f"http://{Address(str(host), int(port))}/metrics"

    def text(self) -> str:
        """Ask the broker, and write what it said.

        Returns
        -------
        str
            In the text format; that the broker did not answer is a metric as well.
        """
        try:
            sight = self.watcher.look()
        except DistgradError:
            return metrics.render(None)
        return metrics.render(None if sight.error else sight.status, sight.workers)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server: MetricsServer
    server_version = "distgrad"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", "the metrics are at /metrics\n")
            return
        self._answer(HTTPStatus.OK, metrics.CONTENT_TYPE, self.server.text())

    def _answer(self, status: HTTPStatus, content_type: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a scrape every few seconds is no news."""
