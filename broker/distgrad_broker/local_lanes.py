"""The broker's ends of lanes: gradients of this host come in, and answers to those that ask go out (`distgrad.lanes`).

A lane belongs to one session, and begins with a message that names it. Who runs as the broker's user is believed that
the session is its own, as with shared memory; what comes in is checked like what comes through ZeroMQ, and has to be of
that session.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from typing import Any

from distgrad import lanes
from distgrad.errors import MalformedMessage, WrongProtocol
from distgrad.wire import Gradient, field, pack, unpack
from distgrad_broker.channels import GradientChannel
from distgrad_broker.events import MessageRejected, Reply

# Lanes that are open at once, and the share of the process's descriptors that they may take: connections need them
# more. A worker without a lane is as well off as one of another host.
MAX_LANES = 1024
_SHARE = 8

# Finds the user whose session this is, by worker and session; raises KeyError if it is nobody's.
UserOf = Callable[[str, str], str | None]


class _End:
    """One lane, and whose it is."""

    __slots__ = ("lane", "session", "user", "worker")

    def __init__(self, lane: lanes.Lane) -> None:
        self.lane = lane
        self.worker = ""
        self.session = ""
        self.user: str | None = None


class LocalLanes:
    """All lanes of a broker; used by its loop alone.

    Parameters
    ----------
    name : str
        From `lanes.new_name`.
    channel : GradientChannel
        Makes gradients of what comes in.
    user_of : callable
        Tells whose a session is.

    Attributes
    ----------
    is_used : bool
        Whether there is any lane.
    """

    def __init__(self, name: str, channel: GradientChannel, user_of: UserOf) -> None:
        self._channel = channel
        self._user_of = user_of
        self._buffer = memoryview(bytearray(lanes.MAX_BYTES))
        self._ends: dict[int, _End] = {}
        self._by_session: dict[str, _End] = {}
        self._most = 0
        self._listener = lanes.listen(name)
        self._poll: Any = None
        if self._listener is not None:
            self._most = _most_lanes()
            self._poll = select.epoll()
            self._poll.register(self._listener.fileno(), select.EPOLLIN)

    @property
    def is_used(self) -> bool:
        """Whether there is any lane."""
        return bool(self._ends)

    @property
    def fd(self) -> int | None:
        """What is readable when there is something to `receive`; None where there are no lanes."""
        return None if self._poll is None else int(self._poll.fileno())

    def receive(self) -> list[Sequence[Gradient] | MessageRejected]:
        """Take the next message of each lane that has one.

        Returns
        -------
        list of (sequence of Gradient, or MessageRejected)
            For each message what it has, in order.
        """
        received: list[Sequence[Gradient] | MessageRejected] = []
        if self._poll is None:
            return received
        for fd, _ in self._poll.poll(0):
            end = self._ends.get(fd)
            if end is None:
                self._accept()
                continue
            frames = end.lane.receive(self._buffer)
            if frames is not None:
                received.append(taken := self._take(end, frames))
                if isinstance(taken, MessageRejected):
                    # Nobody who means well sends that; by the other way it is told why.
                    end.lane.end()
            if not end.lane.is_open:
                self._forget(fd, end)
        return received

    def send(self, reply: Reply) -> bool:
        """Send a reply to a session by its lane.

        Parameters
        ----------
        reply : Reply
            With a session.

        Returns
        -------
        bool
            False if it has to take the other way.
        """
        end = self._by_session.get(reply.session or "")
        return end is not None and end.lane.send([pack(reply.header), *reply.frames])

    def close(self) -> None:
        """Close all."""
        for fd, end in list(self._ends.items()):
            self._forget(fd, end)
        self._stop_listening()
        if self._poll is not None:
            self._poll.close()

    def _accept(self) -> None:
        assert self._listener is not None  # nothing else is polled for that is no lane
        try:
            lane = lanes.accept(self._listener)
        except OSError:
            # There are no descriptors left. Whoever would connect has the other way.
            self._stop_listening()
            return
        if lane is not None and len(self._ends) < self._most:
            self._poll.register(lane.fd, select.EPOLLIN)
            self._ends[lane.fd] = _End(lane)

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            # By itself it only leaves when the last copy is closed, and a forked child may have one.
            self._poll.unregister(listener.fileno())
            listener.close()

    def _take(self, end: _End, frames: Sequence[memoryview]) -> Sequence[Gradient] | MessageRejected:
        """Make gradients of a message; the first one of a lane names the session."""
        try:
            if not frames:
                raise MalformedMessage("a message on a lane has no frames, or others than it says")
            header = unpack(frames[0])
            if not end.session:
                self._greet(end, header)
                return ()
        except WrongProtocol:
            return MessageRejected("protocol")
        except MalformedMessage:
            return MessageRejected("malformed")
        except KeyError:
            return MessageRejected("forbidden")
        if not self._channel.admits(end.user):
            return MessageRejected("forbidden")
        parts = [bytes(frame) for frame in frames[1:]]
        gradients = self._channel.join(frames[0], header, parts, sum(map(len, parts)), end.user)
        if isinstance(gradients, MessageRejected):
            return gradients
        if gradients[0].session != end.session or gradients[0].worker != end.worker:
            return MessageRejected("forbidden")
        return gradients

    def _greet(self, end: _End, header: dict[str, Any]) -> None:
        worker, session = field(header, "worker", str), field(header, "session", str)
        end.user = self._user_of(worker, session)
        end.worker, end.session = worker, session
        self._by_session[session] = end

    def _forget(self, fd: int, end: _End) -> None:
        self._poll.unregister(fd)
        del self._ends[fd]
        if self._by_session.get(end.session) is end:
            del self._by_session[end.session]
        end.lane.end()


def _most_lanes() -> int:
    import resource  # which Windows lacks, and there are no lanes

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_LANES if soft == resource.RLIM_INFINITY else min(MAX_LANES, soft // _SHARE)
