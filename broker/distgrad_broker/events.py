"""What goes into the core and what comes out of it: plain values, no sockets, no clocks.

A gradient goes in as the `distgrad.wire.Gradient` that the wire made, without a wrapper, because it is the one
event that comes by the hundred thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from distgrad.durable.disk_events import CheckpointEnded, DiskTroubled, RecordsWritten, WriteCheckpoint
from distgrad.layout import Layout

# The frames before a request's header, up to and including the empty one; copied verbatim in front of the reply.
Envelope = tuple[bytes, ...]


class RequestReceived(NamedTuple):
    """A request came on the control channel and its header could be decoded."""

    envelope: Envelope
    header: dict[str, Any]
    frames: Sequence[Any] = ()
    # None stands for "no keys in use", which allows everything.
    role: str | None = None
    user: str | None = None


class BadRequestReceived(NamedTuple):
    """Something came on the control channel that is no request; the envelope may still allow an answer."""

    envelope: Envelope
    message: str
    code: str = "malformed"


class MessageRejected(NamedTuple):
    """The shell dropped a message before the core could see it."""

    reason: str


class WorkDue(NamedTuple):
    """The shell has time to apply some gradients: so many, or until somebody must be told of one."""

    gradients: int = 1


class TimePassed(NamedTuple):
    """A turn of the loop; requests whose deadline has come are due."""


class SocketsDrained(NamedTuple):
    """A turn that left nothing to read; the loop was busy, and deaf, for `busy_s` since the last such event.

    Leases are judged only now: what would renew them may still have waited in a socket before.
    """

    busy_s: float


class SaveEnded(NamedTuple):
    """The file thread finished a save; `error` says why it failed, or is None."""

    ticket: int
    path: str
    error: str | None


class HooksCounted(NamedTuple):
    """How often users' hooks were called, how many of the calls failed, and what was dropped as they are too slow."""

    called: int
    failed: int
    dropped: int


class ShutdownAsked(NamedTuple):
    """The process is to end: accept nothing new, apply what is queued."""


Event = (
    RequestReceived
    | BadRequestReceived
    | MessageRejected
    | WorkDue
    | TimePassed
    | SocketsDrained
    | SaveEnded
    | RecordsWritten
    | CheckpointEnded
    | DiskTroubled
    | HooksCounted
    | ShutdownAsked
)


class Reply(NamedTuple):
    """Send this reply, before the next event: the frames may be views of the parameters, to be copied unless lent.

    With a session it may go by that session's lane instead of to its envelope.
    """

    envelope: Envelope
    header: dict[str, Any]
    frames: Sequence[Any] = ()
    lends: bool = False
    session: str | None = None


class SaveParameters(NamedTuple):
    """Write these arenas to the file that the broker was told of; they do not change until `SaveEnded`."""

    ticket: int
    layout: Layout
    arenas: Sequence[Any]
    version: int


class Log(NamedTuple):
    """One line about the broker's life."""

    level: int
    phrase: str
    fields: dict[str, Any]


class Shutdown(NamedTuple):
    """End the process after this many seconds, in which replies still go out."""

    after_s: float


Effect = Reply | SaveParameters | WriteCheckpoint | Log | Shutdown
