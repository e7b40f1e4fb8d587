"""The header frames of gradients: what those of many gradients have in common is packed once.

A header is a msgpack map (``docs/wire.md``): a byte that counts the keys, then the keys in any order. So the keys that
stay the same from one gradient to the next are kept as bytes, and the others are put behind them. A small payload goes
into the header too: each frame costs both ends, and ZeroMQ's threads, about a microsecond.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from distgrad.errors import ConfigError
from distgrad.wire import GRADIENT, INLINE_BYTES, INT64_MAX, PROTOCOL_VERSION, State, checked_cursor, pack

# The first byte of a map of so many keys; there are never more than 13.
_COUNTS = [bytes([0x80 | count]) for count in range(16)]
# A key and its value's type, then the value: an unsigned integer of 64 bits, and the length of what follows.
_NUMBER = struct.Struct(">8sQ")
_NUMBER_AND_PAYLOAD = struct.Struct(">8sQ9sI")
_ASKS = struct.Struct(">6sQ")
_NUMBER_KEY, _PAYLOAD_KEY, _ASKS_KEY = b"\xa6number\xcf", b"\xa7payload\xc6", b"\xa4asks\xcf"

_NO_DETAILS: Mapping[str, Any] = {}


class Header:
    """What the headers of a worker's gradients for one layout and one base have in common.

    Not thread-safe: `address` and `frames` belong under the lock that guards the session.

    Parameters
    ----------
    worker_id : str
        Who pushes.
    fingerprint : int
        Of the layout of the payloads.
    base : State or None
        What the gradients were computed on.
    """

    __slots__ = ("_attempt", "_common", "_count", "_packed", "_session", "base", "fingerprint")

    def __init__(self, worker_id: str, fingerprint: int, base: State | None) -> None:
        self.fingerprint = fingerprint
        self.base = base
        self._common = {
            **{"v": PROTOCOL_VERSION, "kind": GRADIENT, "worker": worker_id},
            **{"base": base, "fingerprint": fingerprint},
        }
        self._session: str | None = None
        self._attempt = 0
        self._packed = b""
        self._count = 0

    def address(self, session: str | None, attempt: int) -> None:
        """Put in what each new connection changes.

        Parameters
        ----------
        session : str
            As issued by `hello`.
        attempt : int
            Number of the connection.
        """
        if attempt != self._attempt or session != self._session:
            self._session, self._attempt = session, attempt
            common = {**self._common, "session": session, "attempt": attempt}
            self._packed = pack(common)[1:]
            # And the number, which each gradient has.
            self._count = len(common) + 1

    def frames(
        self, number: int, details: Mapping[str, Any], parts: Sequence[Any], asks: int | None = None
    ) -> list[Any]:
        """Build the message of one gradient.

        Parameters
        ----------
        number : int
            Its number.
        details : mapping
            From `checked_details`.
        parts : sequence of buffers
            Its payload.
        asks : int, optional
            The pull that the message stands for.

        Returns
        -------
        list of buffers
            The header, and the parts that are not in it.
        """
        count, more = self._count, b""
        if details:
            count += len(details)
            more = pack(details)[1:]
        if asks is not None:
            count += 1
            more += _ASKS.pack(_ASKS_KEY, asks)
        if len(parts) == 1 and len(parts[0]) <= INLINE_BYTES:
            (payload,) = parts
            own = _NUMBER_AND_PAYLOAD.pack(_NUMBER_KEY, number, _PAYLOAD_KEY, len(payload))
            return [b"".join((_COUNTS[count + 1], self._packed, more, own, payload))]
        return [b"".join((_COUNTS[count], self._packed, more, _NUMBER.pack(_NUMBER_KEY, number))), *parts]

    def bundle(self, number: int, details: Sequence[Mapping[str, Any]], payloads: Sequence[Any]) -> list[Any]:
        """Build one message of several gradients with numbers that follow each other.

        Parameters
        ----------
        number : int
            Of the first.
        details : sequence of mapping
            Of each, from `checked_details`.
        payloads : sequence of buffers
            Of each, all of one length.

        Returns
        -------
        list of buffers
            The header, which has everything.
        """
        more: dict[str, Any] = {"count": len(payloads)}
        if any(details):
            more["each"] = details
        n_bytes = sum(map(len, payloads))
        own = _NUMBER_AND_PAYLOAD.pack(_NUMBER_KEY, number, _PAYLOAD_KEY, n_bytes)
        count = _COUNTS[self._count + len(more) + 1]
        return [b"".join((count, self._packed, pack(more)[1:], own, *payloads))]


def checked_details(loss: float | None, examples: int, cursor: object) -> Mapping[str, Any]:
    """Check what `push` was given beside the gradient, for its header.

    Parameters
    ----------
    loss : float or None
        For display.
    examples : int
        Training examples behind the gradient, at least 0.
    cursor : bytes, str or None
        Where the worker stands in its data.

    Returns
    -------
    mapping
        The keys. What has its default is left out: each key costs time at both ends.

    Raises
    ------
    ConfigError
        If one of them is impossible.
    """
    if loss is None and cursor is None and examples == 1:
        return _NO_DETAILS
    details: dict[str, Any] = {}
    if examples != 1:
        try:
            details["examples"] = number = int(examples)
        except (TypeError, ValueError, OverflowError):
            number = -1
        if number != examples or not 0 <= number <= INT64_MAX:
            raise ConfigError(f"examples must be a whole number from 0 to 2**63 - 1, got {examples!r:.80}")
    if loss is not None:
        try:
            details["loss"] = float(loss)
        except (TypeError, ValueError):
            raise ConfigError(f"loss must be one number, got {loss!r:.80}") from None
    if cursor is not None:
        details["cursor"] = checked_cursor(cursor)
    return details
