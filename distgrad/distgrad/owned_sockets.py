"""Sockets that know their owner, and what happens to their connections.

What the two classes guard against was measured on pyzmq 27.3 / libzmq 4.3.5:

- A socket used by two threads interleaves messages silently, and one used after ``fork`` "sends" into nothing:
  hence `OwnedSocket`.
- A monitor at its default mark of 1000 events blocks ZeroMQ's I/O thread, and with it every connection, once 2000
  events wait: hence `LinkMonitor`, which has no mark and asks for few events.
- A socket whose every event is monitored goes on reconnecting for ever if it is closed before its monitor is switched
  off: hence the order in `OwnedSocket.close`.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Sequence
from threading import get_ident
from typing import Any

import zmq

from distgrad.errors import Forked

# As plain numbers: pyzmq's flags are enums, and joining two of those takes longer than sending a small frame.
_LAST = int(zmq.DONTWAIT)
_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
# But as an option pyzmq looks a number up.
_EVENTS, _READABLE = zmq.EVENTS, int(zmq.POLLIN)


class Link(enum.StrEnum):
    """What happened to a connection."""

    UP = "up"
    """The handshake is done."""
    LOST = "lost"
    """It was connected, at least on the TCP level, and is not any more."""
    ABSENT = "absent"
    """Nobody answered there; it is tried again."""
    REFUSED = "refused"
    """The broker does not accept the key. The socket does not try again: make another."""
    NO_KEYS = "no_keys"
    """One side has keys and the other has none. A client's socket does not try again, and what it takes is lost."""
    OTHER_KEYS = "other_keys"
    """Seen by a broker: the client means a broker with another key."""
    UNFINISHED = "unfinished"
    """The handshake ended for another reason: too slow, cut, or not ZeroMQ. It is tried again."""


class OwnedSocket:
    """A ZeroMQ socket that only its owner may touch.

    The owner is the thread that made it. The methods check that on each call (0.4 µs, beside 5 µs for a small
    message's way through ZeroMQ). Loops take `raw` once per turn and use that: it checks once.

    Parameters
    ----------
    socket : zmq.Socket
        The socket; it belongs to the wrapper from now on.
    """

    __slots__ = ("_monitor", "_pid", "_poller", "_socket", "_thread", "_watched")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._thread = get_ident()
        self._pid = os.getpid()
        self._monitor: LinkMonitor | None = None
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._watched: int | None = None

    def __enter__(self) -> OwnedSocket:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def raw(self) -> zmq.Socket[bytes]:
        """Return the socket itself, after checking that the caller owns it.

        Returns
        -------
        zmq.Socket
            For the caller's thread only, and not to be closed: `close` does more.

        Raises
        ------
        RuntimeError
            If another thread owns the socket; that is a bug in the caller.
        Forked
            If another process made it.
        """
        if get_ident() != self._thread or os.getpid() != self._pid:
            self._complain()
        return self._socket

    def adopt(self) -> None:
        """Make the calling thread the owner.

        Right only where a lock has ordered this call after the former owner's last one: ZeroMQ allows a socket to
        change threads across such a barrier, and only then.

        Raises
        ------
        Forked
            If another process made the socket.
        """
        if os.getpid() != self._pid:
            self._complain()
        self._thread = get_ident()
        if self._monitor is not None:
            self._monitor.adopt()

    @property
    def endpoint(self) -> str:
        """Return where the socket is bound or connected, with its real port.

        Returns
        -------
        str
            Such as ``tcp://127.0.0.1:5556``.
        """
        return bytes(self.raw().getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    @property
    def closed(self) -> bool:
        """Tell whether `close` was called.

        Returns
        -------
        bool
            True from then on.
        """
        return bool(self._socket.closed)

    def send_multipart(self, frames: Sequence[Any], *, copy: bool = False) -> bool:
        """Hand a message to ZeroMQ, or to nobody, without waiting.

        Parameters
        ----------
        frames : sequence of bytes or buffers
            The message. With `copy` false, large buffers are sent from where they are and must not change until
            ZeroMQ has let go of them.
        copy : bool
            Copy all buffers first.

        Returns
        -------
        bool
            False if the message was dropped whole: the peer is gone, its mark is reached, or the connection was
            refused for good. True promises nothing about its arrival.
        """
        send = self.raw().send
        try:
            for frame in frames[:-1]:
                send(frame, _MORE, copy)
            send(frames[-1], _LAST, copy)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def recv_multipart(self, *, copy: bool = False) -> list[Any]:
        """Take the next message; call it when `poll` says that there is one.

        Parameters
        ----------
        copy : bool
            Return bytes instead of frames.

        Returns
        -------
        list of zmq.Frame, or of bytes
            The message. Empty if there is none: no message has no frames.
        """
        recv = self.raw().recv
        # As frames: they know whether more follow, and asking the socket costs as much again as receiving.
        try:
            frames = [recv(_LAST, False)]
        except zmq.Again:
            return []
        # All frames of a message have arrived when its first one has, so none of these waits.
        while frames[-1].more:
            frames.append(recv(_LAST, False))
        return [frame.bytes for frame in frames] if copy else frames

    def watch(self, fd: int | None) -> None:
        """Have `poll` wait for something else as well.

        Parameters
        ----------
        fd : int or None
            A descriptor, instead of any before; to be taken back before it is closed.
        """
        if fd == self._watched:
            return
        if self._watched is not None:
            self._poller.unregister(self._watched)
        if fd is not None:
            self._poller.register(fd, zmq.POLLIN)
        self._watched = fd

    def poll(self, timeout_ms: int) -> bool:
        """Wait for a message.

        Parameters
        ----------
        timeout_ms : int, milliseconds, >= 0
            How long.

        Returns
        -------
        bool
            True if `recv_multipart` will return one, or what is watched beside is readable.
        """
        self.raw()
        return bool(self._poller.poll(timeout_ms))

    def close(self, linger_ms: int | None = None) -> None:
        """Close the socket and its monitor. Idempotent.

        In a child of ``fork`` it does nothing, because the connection is the parent's.

        Parameters
        ----------
        linger_ms : int, milliseconds, optional
            How long ZeroMQ may go on sending what waits; 0 drops it. By default as the socket was made.

        Raises
        ------
        RuntimeError
            If another thread owns the socket.
        """
        if self.closed or os.getpid() != self._pid:
            return
        socket = self.raw()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        socket.close(linger_ms)

    def _complain(self) -> None:
        if os.getpid() != self._pid:
            raise Forked("this socket belongs to the parent process; make a new one after fork")
        raise RuntimeError(f"a socket of thread {self._thread} was used by thread {get_ident()}")


def is_readable(socket: Any) -> bool:
    """Tell whether there may be a message: to look first is cheaper than the exception of a socket that has none.

    Parameters
    ----------
    socket : zmq.Socket
        The caller's.

    Returns
    -------
    bool
        False if there is none. Where a new connection has a key, ZeroMQ says yes as soon as it knows whose it is,
        though the first message has not arrived.
    """
    return bool(socket.getsockopt(_EVENTS) & _READABLE)


class LinkMonitor:
    """Notices what happens to the connections of one socket; made by `monitor`.

    Parameters
    ----------
    socket : zmq.Socket
        The socket to watch. Nothing else may monitor it.
    only_failures : bool
        Tell failed handshakes alone, for a listening socket with many connections that come and go.
    """

    _FAILURES = (
        zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    )
    _ALL = _FAILURES | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED

    def __init__(self, socket: zmq.Socket[bytes], *, only_failures: bool = False) -> None:
        self._watched = socket
        endpoint = f"inproc://distgrad-monitor-{os.urandom(8).hex()}"
        socket.monitor(endpoint, self._FAILURES if only_failures else self._ALL)
        pair = socket.context.socket(zmq.PAIR)
        pair.linger = 0
        pair.rcvhwm = 0
        pair.connect(endpoint)
        self._pair = OwnedSocket(pair)

    def raw(self) -> zmq.Socket[bytes]:
        """Return the socket to poll, after checking that the caller owns it.

        Returns
        -------
        zmq.Socket
            Readable when `drain` will return something.
        """
        return self._pair.raw()

    def drain(self) -> list[Link]:
        """Return what has happened since the last call, oldest first, without waiting.

        Returns
        -------
        list of Link
            May be empty; it is once the monitor is closed.
        """
        links: list[Link] = []
        if self._pair.closed:
            return links
        while is_readable(self._pair.raw()) and (frames := self._pair.recv_multipart(copy=True)):
            links.append(parse_event(frames))
        return links

    def adopt(self) -> None:
        """Make the calling thread the owner, under the condition of `OwnedSocket.adopt`."""
        self._pair.adopt()

    def close(self) -> None:
        """Switch the monitor off; `OwnedSocket.close` does it too. Idempotent."""
        if not self._pair.closed:
            self._pair.raw()
            self._watched.disable_monitor()
            self._pair.close()


def monitor(socket: OwnedSocket, *, only_failures: bool = False) -> LinkMonitor:
    """Return the monitor of a socket, which is made if there is none yet.

    A monitor tells nothing of what happened before it was made; sockets that connect are made with one.

    Parameters
    ----------
    socket : OwnedSocket
        The socket; its `close` closes the monitor too.
    only_failures : bool
        Tell failed handshakes alone, for a listening socket with many connections that come and go. It has no
        effect on a monitor that there is.

    Returns
    -------
    LinkMonitor
        The socket's only monitor.
    """
    if socket._monitor is None:
        socket._monitor = LinkMonitor(socket.raw(), only_failures=only_failures)
    return socket._monitor


_LINKS = {
    int(zmq.EVENT_HANDSHAKE_SUCCEEDED): Link.UP,
    int(zmq.EVENT_DISCONNECTED): Link.LOST,
    int(zmq.EVENT_CLOSED): Link.ABSENT,
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): Link.REFUSED,
}
_PROTOCOL_ERRORS = {
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): Link.OTHER_KEYS,
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): Link.NO_KEYS,
}


def parse_event(frames: Sequence[bytes]) -> Link:
    """Read a message of a monitor.

    Parameters
    ----------
    frames : sequence of bytes
        Event number (16 bits) and value (32 bits), native byte order; then an endpoint (zmq_socket_monitor(3)).

    Returns
    -------
    Link
        What happened.
    """
    event, value = struct.unpack("=HI", frames[0])
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return _PROTOCOL_ERRORS.get(value, Link.UNFINISHED)
    return _LINKS.get(event, Link.UNFINISHED)
