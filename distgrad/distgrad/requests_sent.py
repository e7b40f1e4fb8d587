"""A client's requests: what was asked, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distgrad import wire


class Reply(NamedTuple):
    """A successful reply.

    Attributes
    ----------
    header : dict
        Its header; values are not checked beyond ``v``, ``id`` and ``ok``.
    frames : list of memoryview
        Its raw frames, still in the memory that ZeroMQ received them into.
    """

    header: dict[str, Any]
    frames: list[memoryview]

    @property
    def state(self) -> wire.State:
        """Name of the parameters' state when the reply was written."""
        get = self.header.get
        return wire.parse_state([get("incarnation"), get("generation"), get("version")])


@dataclass(slots=True, eq=False)
class Pending:
    """A request under way; made by `ControlClient.send`, and to be given back as it is."""

    op: str
    id: int
    header: dict[str, Any]
    frames: Sequence[Any]
    timeout_s: float
    wait_s: float
    transfer_bytes: int
    patience_s: float
    asked_at: float
    retry_s: float
    sent_at: float = 0.0
    # What the client had received when this was sent: replies to earlier requests share the link with this one's.
    received_before: int = 0
    # Whether only something else has asked for it so far.
    is_reserved: bool = True
    reply: Reply | None = None

    @property
    def message(self) -> list[Any]:
        """Its frames. What something else has asked for mostly never needs them."""
        return [b"", wire.pack(self.header), *self.frames]
