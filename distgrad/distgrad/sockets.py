"""Make ZeroMQ sockets that are safe to use: bounded, owned by one thread, encrypted where there are keys.

Every socket of distgrad is made here, so every option is set on purpose. What the options guard against was
measured on pyzmq 27.3 / libzmq 4.3.5:

- The default linger never gives up, and ends ``term`` in a hang: hence a linger on every socket.
- After a refused handshake (unknown key, or keys on one side only) ZeroMQ never reconnects, and a send waits for
  ever or goes nowhere: hence no send waits at all, and whoever connects can ask the socket's `monitor`.
- ZMTP heartbeats lose gradients without any fault (a PULL under back-pressure is taken for dead): none are used.
- With IPv6 on, a name is tried at its IPv6 address alone, even if only IPv4 answers there: hence `_wants_ipv6`.
"""

from __future__ import annotations

import errno
import os
import socket as resolver
from typing import Protocol, TypeAlias

import zmq

from distgrad import addresses
from distgrad.errors import ConfigError
from distgrad.malloc import keep_freed_memory
from distgrad.owned_sockets import Link, LinkMonitor, OwnedSocket, monitor, parse_event

__all__ = [
    "Context",
    "Link",
    "LinkMonitor",
    "OwnedSocket",
    "PeerKeys",
    "ServerKeys",
    "client_keys",
    "control_client",
    "control_server",
    "curve_pair",
    "gradient_client",
    "gradient_server",
    "monitor",
    "open_context",
    "parse_event",
    "pipelined_control_client",
]

Context: TypeAlias = zmq.Context[zmq.Socket[bytes]]

ZAP_DOMAIN = b"distgrad"

MAX_FRAME_BYTES = 4 * 1024 * 1024
# Room for the header of a maximal frame and for what CURVE adds to it (33 bytes).
_FRAME_SLACK_BYTES = 64 * 1024
# Replies that one client lets pile up. A client has a few requests under way; what does not fit is dropped and asked
# for again. Each may hold 16 MiB, so the mark is low.
_CONTROL_MARK = 32
# Grants bound the bytes of gradients in flight; a mark that counts messages would only add a second, wrong bound.
_NO_MARK = 0
_HANDSHAKE_MS = 2000
_CONNECT_MS = 5000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 1000
# A silent peer is given up after 15 + 3 * 5 seconds, unless data is under way (then the protocol notices).
_KEEPALIVE_IDLE_S = 15
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 3
_BACKLOG = 1024


class ServerKeys(Protocol):
    """What a listening socket needs of a broker's keys."""

    @property
    def secret(self) -> bytes:
        """Secret key of the broker, Z85."""


class PeerKeys(Protocol):
    """What a connecting socket needs of a client's keys."""

    @property
    def public(self) -> bytes:
        """Public key of the client, Z85."""

    @property
    def secret(self) -> bytes:
        """Secret key of the client, Z85."""

    @property
    def broker_public(self) -> bytes:
        """Public key of the broker, Z85."""


def client_keys(keys: str | os.PathLike[str] | PeerKeys | None) -> PeerKeys | None:
    """Accept a client's keys in any of the forms in which users give them.

    Parameters
    ----------
    keys : path, ClientKeys or None
        A file to load, keys that are loaded, or none.

    Returns
    -------
    PeerKeys or None
        The keys.

    Raises
    ------
    KeyFileError
        As `distgrad.keys.ClientKeys.load`.
    """
    if keys is None:
        return None
    from distgrad.keys import ClientKeys  # only who has keys pays for it

    return ClientKeys.load(keys) if isinstance(keys, (str, os.PathLike)) else keys


def open_context() -> Context:
    """Make a ZeroMQ context with one I/O thread, after telling malloc to keep freed memory.

    Returns
    -------
    zmq.Context
        Its sockets linger 0 unless told otherwise, so that ``term`` does not hang.
    """
    keep_freed_memory()
    context: Context = zmq.Context(io_threads=1)
    context.blocky = False
    return context


def curve_pair() -> tuple[bytes, bytes]:
    """Make a new CURVE key pair from the system's random numbers.

    Returns
    -------
    public, secret : bytes
        Both as 40 characters of Z85.
    """
    return zmq.curve_keypair()


def control_server(context: Context, endpoint: str, *, keys: ServerKeys | None = None) -> OwnedSocket:
    """Bind the broker's control channel.

    Parameters
    ----------
    context : zmq.Context
        The broker's.
    endpoint : str
        Where to listen; port 0 takes a free one, which `OwnedSocket.endpoint` then tells.
    keys : ServerKeys, optional
        The broker's secret key. Its authenticator must be bound in the same context before a client comes.

    Returns
    -------
    OwnedSocket
        A ROUTER that never waits; a reply to a client that is gone or does not read is dropped and reported.

    Raises
    ------
    ConfigError
        If nothing can listen there.
    """
    socket = _new(context, zmq.ROUTER, mark=_CONTROL_MARK, linger_ms=1000)
    socket.router_mandatory = True
    return _bound(socket, endpoint, keys)


def gradient_server(context: Context, endpoint: str, *, keys: ServerKeys | None = None) -> OwnedSocket:
    """Bind the channel on which the broker receives gradients.

    Parameters
    ----------
    context, endpoint, keys
        As for `control_server`.

    Returns
    -------
    OwnedSocket
        A PULL that never waits and takes all that the grants allow.

    Raises
    ------
    ConfigError
        If nothing can listen there.
    """
    return _bound(_new(context, zmq.PULL, mark=_NO_MARK, linger_ms=0), endpoint, keys)


def control_client(context: Context, endpoint: str, *, keys: PeerKeys | None = None) -> OwnedSocket:
    """Connect to a broker's control channel.

    Parameters
    ----------
    context : zmq.Context
        The client's.
    endpoint : str
        Where the broker listens. Nobody needs to listen there yet.
    keys : PeerKeys, optional
        The client's keys.

    Returns
    -------
    OwnedSocket
        A REQ that may send again without having received; replies to earlier requests are then dropped. It is
        monitored: `monitor` tells everything since before it connected.

    Raises
    ------
    ConfigError
        If it is not an address that one can connect to.
    """
    socket = _new(context, zmq.REQ, mark=_CONTROL_MARK, linger_ms=0)
    socket.req_relaxed = True
    socket.req_correlate = True
    return _connected(socket, endpoint, keys)


def pipelined_control_client(context: Context, endpoint: str, *, keys: PeerKeys | None = None) -> OwnedSocket:
    """Connect to a broker's control channel, for several requests at a time.

    Parameters
    ----------
    context, endpoint, keys
        As for `control_client`.

    Returns
    -------
    OwnedSocket
        A DEALER. Messages begin with an empty frame in both directions, which a REQ adds and takes away by itself, and
        replies must be told apart by their ids. It is monitored, as a control client is.

    Raises
    ------
    ConfigError
        If it is not an address that one can connect to.
    """
    return _connected(_new(context, zmq.DEALER, mark=_CONTROL_MARK, linger_ms=0), endpoint, keys)


def gradient_client(context: Context, endpoint: str, *, keys: PeerKeys | None = None) -> OwnedSocket:
    """Connect to the channel on which a broker receives gradients.

    Parameters
    ----------
    context, endpoint, keys
        As for `control_client`.

    Returns
    -------
    OwnedSocket
        A PUSH that takes messages at once, connected or not, and drops what it still has when it is closed:
        what was not settled is the window's to send again. It is monitored, as a control client is.

    Raises
    ------
    ConfigError
        If it is not an address that one can connect to.
    """
    return _connected(_new(context, zmq.PUSH, mark=_NO_MARK, linger_ms=0), endpoint, keys)


def _new(context: Context, kind: int, *, mark: int, linger_ms: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = linger_ms
    socket.sndhwm = socket.rcvhwm = mark
    # Nothing waits inside ZeroMQ: waiting is done in a poll that can be woken.
    socket.sndtimeo = socket.rcvtimeo = 0
    socket.maxmsgsize = MAX_FRAME_BYTES + _FRAME_SLACK_BYTES
    socket.handshake_ivl = _HANDSHAKE_MS
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = _KEEPALIVE_IDLE_S
    socket.tcp_keepalive_intvl = _KEEPALIVE_INTERVAL_S
    socket.tcp_keepalive_cnt = _KEEPALIVE_COUNT
    return socket


def _bound(socket: zmq.Socket[bytes], endpoint: str, keys: ServerKeys | None) -> OwnedSocket:
    try:
        address = addresses.parse(endpoint, 0)
        address = address._replace(host=_host_to_bind(address.host))
        socket.ipv6 = address.host == "*" or ":" in address.host
        socket.backlog = _BACKLOG
        if keys is not None:
            socket.curve_server = True
            socket.curve_secretkey = keys.secret
            socket.zap_domain = ZAP_DOMAIN
            # Without it a missing authenticator would let every key in.
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.bind(address.endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise _cannot_listen(address, error) from error
    except BaseException:
        socket.close(0)
        raise
    return OwnedSocket(socket)


def _connected(socket: zmq.Socket[bytes], endpoint: str, keys: PeerKeys | None) -> OwnedSocket:
    owned = OwnedSocket(socket)
    try:
        address = addresses.parse(endpoint, 0)
        if address.port == 0 or address.host == "*":
            raise ConfigError(f"cannot connect to {address.endpoint}: it needs the host and port of a broker")
        socket.ipv6 = _wants_ipv6(address.host)
        socket.reconnect_ivl = _RECONNECT_MS
        socket.reconnect_ivl_max = _RECONNECT_MAX_MS
        socket.connect_timeout = _CONNECT_MS
        if keys is not None:
            socket.curve_serverkey = keys.broker_public
            socket.curve_publickey = keys.public
            socket.curve_secretkey = keys.secret
        # Before connecting: a refusal takes less than a millisecond, comes once, and must not be missed.
        monitor(owned)
        socket.connect(address.endpoint)
    except zmq.ZMQError as error:
        owned.close(0)
        raise ConfigError(f"cannot connect to {address.endpoint}: {error.strerror}") from error
    except BaseException:
        owned.close(0)
        raise
    return owned


def _host_to_bind(host: str) -> str:
    """Turn a name into an address, IPv4 first: ZeroMQ binds to addresses and interface names only."""
    if addresses.is_localhost(host):
        return "127.0.0.1"
    if host == "*" or ":" in host:
        return host
    try:
        found = resolver.getaddrinfo(host, None, type=resolver.SOCK_STREAM)
    except OSError:
        return host
    return str(min(found, key=lambda entry: entry[0] != resolver.AF_INET)[4][0])


def _wants_ipv6(host: str) -> bool:
    """Tell whether to switch IPv6 on: for IPv6 addresses, and for names that have no IPv4 address (yet)."""
    if ":" in host:
        return True
    if addresses.is_localhost(host):
        return False
    try:
        return not resolver.getaddrinfo(host, None, resolver.AF_INET, resolver.SOCK_STREAM)
    except OSError:
        return True


def _cannot_listen(address: addresses.Address, error: zmq.ZMQError) -> ConfigError:
    if error.errno == zmq.EADDRINUSE:
        return ConfigError(
            f"cannot listen on {address.endpoint}: the port is taken",
            hint="choose another port, or port 0 for a free one",
        )
    if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
        return ConfigError(
            f"cannot listen on {address.endpoint}: this machine has no such address",
            hint="use 127.0.0.1 for this machine alone, or * for every interface",
        )
    return ConfigError(f"cannot listen on {address.endpoint}: {error.strerror}")
