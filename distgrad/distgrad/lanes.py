"""Lanes: a second way for short messages between a worker and a broker on one host.

Through ZeroMQ a message passes two more threads, each of which has to be woken, and TCP. That is most of what a small
gradient that is pushed and waited for takes. A lane is a socket of the kernel that keeps messages apart
(``SOCK_SEQPACKET``), whose other end the broker's loop reads itself. It carries what is also understood by the other
way, and nothing depends on it: what does not fit, or finds the lane full or gone, goes through ZeroMQ.

The broker listens under an abstract name: nothing is left behind by whoever dies, and only processes of the same
network namespace find it. Each side accepts only a peer of its own user, as for shared memory. Linux only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import weakref
from collections.abc import Sequence
from typing import Any

# The longest message. Two fit where Linux limits what waits in a socket to its usual 208 KiB.
MAX_BYTES = 96 * 1024
_MAX_FRAMES = 255
# Errors of a peer that is still there.
_HAS_NO_ROOM = frozenset({errno.EAGAIN, errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM})
_PREFIX = "\0distgrad-"
_WAITING_BYTES = 1 << 20
_CREDENTIALS = struct.Struct("iII")


def new_name() -> str:
    """Think of a name for a broker's lanes.

    Returns
    -------
    str
        Random; for `listen` and, at the worker, `connect`.
    """
    return os.urandom(16).hex()


def listen(name: str) -> socket.socket | None:
    """Listen for lanes.

    Parameters
    ----------
    name : str
        From `new_name`.

    Returns
    -------
    socket or None
        Which does not block; None where there are no lanes.
    """
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.setblocking(False)
        listener.bind(_PREFIX + name)
        listener.listen(1024)
        stack.pop_all()
        return listener
    return None


def accept(listener: socket.socket) -> Lane | None:
    """Take the next connection.

    Parameters
    ----------
    listener : socket
        From `listen`.

    Returns
    -------
    Lane or None
        None if there was none, or its peer is not of this process's user.

    Raises
    ------
    OSError
        If there are no more descriptors.
    """
    try:
        peer, _ = listener.accept()
    except (BlockingIOError, ConnectionError):
        return None
    return _checked(peer)


def connect(name: object) -> Lane | None:
    """Open a lane to a broker.

    Parameters
    ----------
    name : object
        As it came over the wire.

    Returns
    -------
    Lane or None
        None if that is not possible.
    """
    if sys.platform != "linux" or type(name) is not str or len(name) != 32 or not name.isalnum():
        return None
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer.setblocking(False)
        peer.connect(_PREFIX + name)
        stack.pop_all()
        return _checked(peer)
    return None


def _checked(peer: socket.socket) -> Lane | None:
    """Make a lane of a connection, if its peer is of this process's user."""
    with contextlib.suppress(OSError):
        _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if user == os.geteuid():
            peer.setblocking(False)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WAITING_BYTES)
            return Lane(peer)
    peer.close()
    return None


class Lane:
    """One end of a connection; used under whatever lock or by whatever thread owns it.

    Parameters
    ----------
    peer : socket
        Connected, not blocking; it belongs to the lane from now on.

    Attributes
    ----------
    is_open : bool
        Whether the other end was there when it was last looked for.
    has_received : bool
        Whether anything has come by it.
    """

    __slots__ = ("__weakref__", "_peer", "fd", "has_received", "is_open")

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self.fd = peer.fileno()
        self.is_open = True
        self.has_received = False
        # One thread sends, another one receives: the descriptor must stay theirs as long as either may use it.
        weakref.finalize(self, peer.close).atexit = False

    def send(self, frames: Sequence[Any]) -> bool:
        """Send a message, whole, or not at all.

        Parameters
        ----------
        frames : sequence of buffers
            At least one.

        Returns
        -------
        bool
            False if there is no room for it, or it is too long, or nobody is there (`is_open` is then false).
        """
        count, lengths = len(frames), [*map(len, frames)]
        if count > _MAX_FRAMES or 1 + 4 * count + sum(lengths) > MAX_BYTES or not self.is_open:
            return False
        beginning = struct.pack(f"<B{count}I", count, *lengths)
        try:
            self._peer.sendmsg((beginning, *frames))
        except OSError as error:
            if error.errno not in _HAS_NO_ROOM:
                # The other end finds that out too.
                self.end()
            return False
        return True

    def receive(self, buffer: memoryview) -> list[memoryview] | None:
        """Take the next message, if there is one.

        Parameters
        ----------
        buffer : memoryview, writable
            `MAX_BYTES` to receive it into.

        Returns
        -------
        list of memoryview or None
            Its frames, which lie in `buffer`; empty if it is none of ours. None if nothing is there (`is_open` tells
            whether more can come).
        """
        try:
            size = self._peer.recv_into(buffer)
        except BlockingIOError:
            return None
        except OSError:
            size = 0
        if not size:
            self.is_open = False
            return None
        count = buffer[0]
        at = 1 + 4 * count
        if at > size:
            return []
        frames = []
        for length in struct.unpack_from(f"<{count}I", buffer, 1):
            frames.append(buffer[at : at + length])
            at += length
        if at != size:
            return []
        self.has_received = True
        return frames

    def end(self) -> None:
        """End the connection at both ends; whoever waits at either finds that out."""
        self.is_open = False
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
