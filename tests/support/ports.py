"""Ports for tests that need to know one before anybody listens there."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago.

    Where a test can, it binds port 0 instead: between this call and the bind, another process may take the port.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
