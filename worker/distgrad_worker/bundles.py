"""Several small gradients in one message, when a worker pushes faster than one by one is worth it.

What a gradient of a few kilobytes costs is mostly its message: a call of ZeroMQ at each end, the wake-up of two
threads, two calls of the kernel, a header. A worker that pushes one after the other at once therefore lets them wait
for each other, until a message is full. One that computes in between sends each at once; whoever waits for anything
(`flush`, `pull`, a push without a grant) sends what is there; and the thread that keeps the lease does so whenever it
looks whether there is news, which is soon while something waits.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from distgrad.wire import INLINE_BYTES, MAX_TOGETHER
from distgrad_worker.window import Entry, Window

# Of payloads and details in one message: with the rest of the header it stays below its limit of 64 KiB.
BUNDLE_BYTES = 56 * 1024
# A push that comes so soon after the one before it is one of many, seconds.
HASTE_S = 200e-6
# What the names of an entry's details take at most, beside a cursor's bytes.
_DETAILS_BYTES = 64


class Pace:
    """Tells whether what was just pushed may wait for more; not thread-safe."""

    def __init__(self) -> None:
        self._pushed_at = 0.0
        self._bytes = 0

    def may_wait(self, window: Window, payload_bytes: int, now: float) -> bool:
        """Take note of a push.

        Parameters
        ----------
        window : Window
            It was added to.
        payload_bytes : int
            Bytes of its payload.
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        bool
            Whether to send later. Something is on the way then, so that news of it will come.
        """
        is_hasty = now - self._pushed_at < HASTE_S
        self._pushed_at = now
        if not (is_hasty and payload_bytes <= INLINE_BYTES and window.sent > window.settled):
            return False
        n_waiting = window.last - window.sent
        return n_waiting < MAX_TOGETHER and (n_waiting + 1) * (payload_bytes + _DETAILS_BYTES) <= BUNDLE_BYTES


def messages(entries: Sequence[Entry], shared: Container[int] = ()) -> list[list[Any]]:
    """Build the messages of gradients; `Header.address` comes first.

    Parameters
    ----------
    entries : sequence of Entry
        In order.
    shared : container of int
        The slots that the broker knows.

    Returns
    -------
    list of list of buffers
        Frames of each message, in order.
    """
    if len(entries) == 1:
        return [entries[0].frames(shared)]
    made: list[list[Any]] = []
    together: list[Entry] = []
    n_bytes = 0
    for entry in entries:
        size = _size_in_bundle(entry)
        if together and not (
            size is not None
            and entry.header is together[0].header
            and len(entry.parts[0]) == len(together[0].parts[0])
            and n_bytes + size <= BUNDLE_BYTES
            and len(together) < MAX_TOGETHER
        ):
            made.append(_message(together, shared))
            together, n_bytes = [], 0
        if size is None:
            made.append(entry.frames(shared))
        else:
            together.append(entry)
            n_bytes += size
    if together:
        made.append(_message(together, shared))
    return made


def _message(entries: Sequence[Entry], shared: Container[int]) -> list[Any]:
    first = entries[0]
    if len(entries) == 1:
        return first.frames(shared)
    return first.header.bundle(
        first.number, [entry.details for entry in entries], [entry.parts[0] for entry in entries]
    )


def _size_in_bundle(entry: Entry) -> int | None:
    """Tell what an entry takes in a message with others; None if it goes alone."""
    if entry.slot is not None or entry.asks is not None or len(entry.parts) != 1:
        return None
    size = len(entry.parts[0])
    if not 0 < size <= INLINE_BYTES:
        return None
    if not entry.details:
        return size + _DETAILS_BYTES
    cursor = entry.details.get("cursor", b"")
    return size + _DETAILS_BYTES + (len(cursor) if isinstance(cursor, bytes) else 4 * len(cursor))
