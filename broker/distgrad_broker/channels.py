"""Reading and writing the broker's two channels: frames in, events out, and effects' frames back.

Nothing is believed here and nothing is decided: frames are counted, headers decoded, senders named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import zmq

from distgrad.errors import MalformedMessage, WrongProtocol
from distgrad.gradient_messages import parse_gradients, single_headers
from distgrad.owned_sockets import OwnedSocket, is_readable
from distgrad.wire import MAX_HEADER_BYTES, Gradient, pack, unpack
from distgrad_broker.events import BadRequestReceived, Envelope, Event, MessageRejected, Reply, RequestReceived
from distgrad_broker.shared_slots import SharedSlots

# A routing id, perhaps a correlation frame, and the empty one: more belongs to no client of ours, some to proxies.
MAX_ENVELOPE_FRAMES = 8
# Below this a copy out of ZeroMQ's buffer (aligned, and its own) is cheaper than a frame object around it.
COPY_BELOW_BYTES = 64 * 1024

# Tells the role of a connection's user; None stands for a broker without keys.
RoleOf = Callable[[str], str | None]

_NO_ROLE = ""


class GradientChannel:
    """The PULL side.

    Parameters
    ----------
    socket : OwnedSocket
        Bound; used on one thread.
    role_of : callable, optional
        With keys: names the role of a user.
    keeps_frames : bool
        Give each gradient its header's frame, for the journal.
    slots : SharedSlots, optional
        Where gradients lie that are not sent.
    """

    def __init__(
        self,
        socket: OwnedSocket,
        role_of: RoleOf | None,
        *,
        keeps_frames: bool = False,
        slots: SharedSlots | None = None,
    ) -> None:
        self.socket = socket
        self._slots = slots or SharedSlots()
        self._keeps_frames = keeps_frames
        # Its owner is checked here, and not again for each message: the channel is made by the thread that reads it.
        self._raw: Any = socket.raw()
        self._role_of = role_of

    def receive(self) -> Sequence[Gradient] | MessageRejected | None:
        """Take one message, if there is one.

        Returns
        -------
        sequence of Gradient, MessageRejected or None
            What the message has, in order; None if there is nothing to read.
        """
        socket = self._raw
        user: str | None = None
        if not is_readable(socket):
            return None
        # As frames: they know whether more follow, and asking the socket costs as much again as receiving.
        try:
            frame = socket.recv(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        try:
            if self._role_of is not None:
                user = _user_of(frame)
                if not self.admits(user):
                    self._skip(socket, frame)
                    return MessageRejected("forbidden")
            first = frame.bytes if self._keeps_frames else frame
            header = unpack(first)
        except WrongProtocol:
            self._skip(socket, frame)
            return MessageRejected("protocol")
        except MalformedMessage:
            self._skip(socket, frame)
            return MessageRejected("malformed")
        parts: list[Any] = []
        size = 0
        # All frames of a message have arrived when its first one has, so none of these waits.
        while frame.more:
            frame = socket.recv(copy=False)
            length = len(frame)
            parts.append(frame.buffer if length >= COPY_BELOW_BYTES else frame.bytes)
            size += length
        return self.join(first, header, parts, size, user)

    def admits(self, user: str | None) -> bool:
        """Tell whether a user may push.

        Parameters
        ----------
        user : str or None
            As the connection's key tells; None without keys.

        Returns
        -------
        bool
            True for workers, and for everybody where there are no keys.
        """
        return self._role_of is None or (user is not None and self._role_of(user) == "worker")

    def join(
        self, first: Any, header: dict[str, Any], parts: Sequence[Any], size: int, user: str | None
    ) -> Sequence[Gradient] | MessageRejected:
        """Make gradients of a message.

        Parameters
        ----------
        first : bytes or buffer
            The header's frame, copied if it is to be kept and is no bytes.
        header : dict
            The header, of this protocol's version.
        parts : sequence of buffers
            The frames behind it.
        size : int
            Their bytes in all.
        user : str or None
            Who sent it.

        Returns
        -------
        sequence of Gradient, or MessageRejected
            In order, with what lies in slots.
        """
        try:
            gradients = parse_gradients(header, parts, size, user)
        except MalformedMessage:
            return MessageRejected("malformed")
        if gradients[0].slot is not None:
            self._slots.find(gradients[0])
        if self._keeps_frames:
            frames = (bytes(first),) if len(gradients) == 1 else single_headers(gradients)
            for gradient, own in zip(gradients, frames, strict=True):
                gradient.frame = own
        return gradients

    @staticmethod
    def _skip(socket: zmq.Socket[bytes], frame: Any) -> None:
        while frame.more:
            frame = socket.recv(copy=False)


class ControlChannel:
    """The ROUTER side.

    Parameters
    ----------
    socket : OwnedSocket
        Bound; used on one thread.
    role_of : callable, optional
        With keys: names the role of a user.

    Attributes
    ----------
    by_lane : callable or None
        Sends a reply to a session by its lane, if that can be.
    """

    def __init__(self, socket: OwnedSocket, role_of: RoleOf | None) -> None:
        self.socket = socket
        self.by_lane: Callable[[Reply], bool] | None = None
        self._role_of = role_of
        self.dropped_replies = 0

    def receive(self) -> Event | None:
        """Take one message, if there is one.

        Returns
        -------
        Event or None
            None if there is nothing to read.
        """
        if not is_readable(self.socket.raw()):
            return None
        frames = self.socket.recv_multipart()
        if not frames:
            return None
        envelope: list[bytes] = []
        for frame in frames[:MAX_ENVELOPE_FRAMES]:
            envelope.append(frame.bytes)
            if not frame.bytes:
                break
        else:
            return MessageRejected("malformed")
        rest = frames[len(envelope) :]
        return self._request(tuple(envelope), rest)

    def send(self, reply: Reply) -> None:
        """Send a reply, or drop it if its client is gone or does not read.

        Parameters
        ----------
        reply : Reply
            Its frames are copied into ZeroMQ unless they are lent, so that readers, however slow, pin one version.
        """
        if reply.session is not None and self.by_lane is not None and self.by_lane(reply):
            return
        if not self.socket.send_multipart([*reply.envelope, pack(reply.header), *reply.frames], copy=not reply.lends):
            self.dropped_replies += 1

    def _request(self, envelope: Envelope, rest: list[Any]) -> Event:
        if not rest:
            return BadRequestReceived(envelope, "a request needs a header frame")
        user: str | None = None
        role: str | None = None
        if self._role_of is not None:
            user = _user_of(rest[0])
            role = (None if user is None else self._role_of(user)) or _NO_ROLE
        if len(rest[0]) > MAX_HEADER_BYTES:
            return BadRequestReceived(envelope, f"header must be at most {MAX_HEADER_BYTES} bytes")
        try:
            header = unpack(rest[0].bytes)
        except WrongProtocol as error:
            return BadRequestReceived(envelope, error.message, "protocol")
        except MalformedMessage as error:
            return BadRequestReceived(envelope, error.message)
        return RequestReceived(envelope, header, [frame.buffer for frame in rest[1:]], role, user)


def _user_of(frame: Any) -> str | None:
    try:
        user: str = frame.get("User-Id")
    except (zmq.ZMQError, KeyError):
        return None
    return user or None
