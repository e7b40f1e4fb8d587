"""Messages of gradients: a header that is checked, and a payload that nobody has looked at.

One message has one gradient, or several small ones of one worker that follow each other: what they have in common is
then decoded and checked once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distgrad.errors import MalformedMessage
from distgrad.wire import (
    GRADIENT,
    INT64_MAX,
    MAX_CURSOR_BYTES,
    MAX_ID_CHARACTERS,
    MAX_TOGETHER,
    MIN_CHARGE_BYTES,
    PROTOCOL_VERSION,
    RAW,
    Gradient,
    State,
    pack,
    parse_state,
)

# The key, and the type of its value: bytes, whose length follows in four.
_PAYLOAD_KEY = b"\xa7payload\xc6"


def parse_gradient(header: dict[str, Any], parts: Sequence[Any], size: int, user: str | None = None) -> Gradient:
    """Check a gradient's header and join it with its payload.

    Parameters
    ----------
    header : dict
        From `unpack`.
    parts : sequence of buffers
        The payload frames, unchecked; none if the header has the payload.
    size : int
        Their bytes in all.
    user : str, optional
        Identity that the connection's key gave.

    Returns
    -------
    Gradient
        Ready for the core.

    Raises
    ------
    MalformedMessage
        If a key is missing, or has the wrong type or an impossible value, or there is more than one payload: in the
        header, behind it, in a slot.
    """
    gradient = Gradient()
    get = header.get
    gradient.worker = worker = get("worker")  # type: ignore[assignment]  # checked below
    gradient.session = session = get("session")  # type: ignore[assignment]
    gradient.attempt = attempt = get("attempt")  # type: ignore[assignment]
    gradient.number = number = get("number")  # type: ignore[assignment]
    gradient.fingerprint = fingerprint = get("fingerprint")  # type: ignore[assignment]
    gradient.encoding = encoding = get("encoding", RAW)
    gradient.examples = examples = get("examples", 1)
    gradient.loss = loss = get("loss")
    gradient.cursor = cursor = get("cursor")
    gradient.slot = slot = get("slot")
    gradient.asks = asks = get("asks")
    base = get("base")
    payload = get("payload")
    # One expression over local names: this runs for every gradient, and looping over a table of fields costs 3 µs more.
    if not (
        type(worker) is str
        and 0 < len(worker) <= MAX_ID_CHARACTERS
        and type(session) is str
        and type(attempt) is int
        and attempt >= 1
        and type(number) is int
        and 1 <= number <= INT64_MAX
        and type(fingerprint) is int
        and type(encoding) is str
        and _are_details(examples, loss, cursor)
        and get("kind") == GRADIENT
        and (payload is None or (type(payload) is bytes and not parts))
        and (slot is None or (type(slot) is int and slot >= 0 and payload is None and not parts))
        and (asks is None or (type(asks) is int and 0 <= asks <= INT64_MAX))
    ):
        raise MalformedMessage("gradient header has a missing or impossible value; docs/wire.md has the table")
    gradient.base = None if base is None else parse_state(base)
    gradient.is_inline = payload is not None
    if payload is not None:
        parts, size = (payload,), len(payload)
    gradient.parts = parts
    gradient.size = size
    gradient.charge = size if size > MIN_CHARGE_BYTES else MIN_CHARGE_BYTES
    gradient.user = user
    return gradient


def parse_gradients(
    header: dict[str, Any], parts: Sequence[Any], size: int, user: str | None = None
) -> Sequence[Gradient]:
    """Check the header of a message with one or several gradients, and join each with its payload.

    Parameters
    ----------
    header, parts, size, user : object
        As for `parse_gradient`.

    Returns
    -------
    sequence of Gradient
        In order, ready for the core.

    Raises
    ------
    MalformedMessage
        As `parse_gradient`; none of them is believed then.
    """
    if "count" not in header:
        return (parse_gradient(header, parts, size, user),)
    count, each, payload, number = header["count"], header.get("each"), header.get("payload"), header.get("number")
    if not (
        type(count) is int
        and 1 <= count <= MAX_TOGETHER
        and type(number) is int
        and number <= INT64_MAX - count
        and type(payload) is bytes
        and len(payload) % count == 0
        and (each is None or (type(each) is list and len(each) == count))
    ):
        raise MalformedMessage("a message of several gradients has an impossible value; docs/wire.md has the table")
    size = len(payload) // count
    first = parse_gradient({**header, "payload": payload[:size]}, parts, 0, user)
    gradients = [first, *(_next(first, index, payload[index * size : (index + 1) * size]) for index in range(1, count))]
    if each is not None:
        for gradient, details in zip(gradients, each, strict=True):
            _take_details(gradient, details)
    return gradients


def _next(first: Gradient, index: int, payload: bytes) -> Gradient:
    """Make one that follows another in a message, and has all but number and payload in common with it."""
    gradient = Gradient()
    gradient.worker = first.worker
    gradient.session = first.session
    gradient.attempt = first.attempt
    gradient.number = first.number + index
    gradient.base = first.base
    gradient.fingerprint = first.fingerprint
    gradient.encoding = first.encoding
    gradient.examples = first.examples
    gradient.loss = first.loss
    gradient.cursor = first.cursor
    gradient.parts = (payload,)
    gradient.size = first.size
    gradient.charge = first.charge
    gradient.user = first.user
    gradient.is_inline = True
    gradient.slot = gradient.asks = None
    return gradient


def _take_details(gradient: Gradient, details: Any) -> None:
    """Check what one gradient of several has of its own, and put it in."""
    if type(details) is not dict:
        raise MalformedMessage("'each' must have a map for each gradient")
    gradient.examples = examples = details.get("examples", 1)
    gradient.loss = loss = details.get("loss")
    gradient.cursor = cursor = details.get("cursor")
    if not _are_details(examples, loss, cursor):
        raise MalformedMessage("'each' has an impossible value; docs/wire.md has the table")


def _are_details(examples: Any, loss: Any, cursor: Any) -> bool:
    return (
        type(examples) is int
        and 0 <= examples <= INT64_MAX
        and (loss is None or type(loss) is float or type(loss) is int)
        and (cursor is None or (type(cursor) in (bytes, str) and len(cursor) <= MAX_CURSOR_BYTES))
    )


def single_headers(gradients: Sequence[Gradient]) -> list[bytes]:
    """Pack the header frames with which gradients of one message would have come alone, for a journal.

    Parameters
    ----------
    gradients : sequence of Gradient
        From `parse_gradients`, with their payloads in the header.

    Returns
    -------
    list of bytes
        A frame for each.
    """
    first = gradients[0]
    common = {
        "v": PROTOCOL_VERSION,
        "kind": GRADIENT,
        "worker": first.worker,
        "session": first.session,
        "attempt": first.attempt,
        "base": first.base,
        "fingerprint": first.fingerprint,
        "encoding": first.encoding,
    }
    # A map's first byte counts its keys, which may come in any order.
    packed = pack(common)[1:]
    frames = []
    for gradient in gradients:
        own: dict[str, Any] = {"number": gradient.number}
        if gradient.examples != 1:
            own["examples"] = gradient.examples
        if gradient.loss is not None:
            own["loss"] = gradient.loss
        if gradient.cursor is not None:
            own["cursor"] = gradient.cursor
        count = bytes((0x80 | (len(common) + len(own) + 1),))
        payload = gradient.parts[0]
        beginning = _PAYLOAD_KEY + len(payload).to_bytes(4, "big")
        frames.append(b"".join((count, packed, pack(own)[1:], beginning, payload)))
    return frames


def stored_gradient(header: dict[str, Any], payload: Any) -> Gradient:
    """Join a gradient's header with its payload again; both were checked before, and a checksum vouches for them.

    Parameters
    ----------
    header : dict
        Of a gradient that `parse_gradient` made.
    payload : buffer
        What was behind it, in one piece; empty if there was nothing.

    Returns
    -------
    Gradient
        The same once more, but for `user` and the cuts of the payload.
    """
    gradient = Gradient()
    get = header.get
    gradient.worker = header["worker"]
    gradient.session = header["session"]
    gradient.attempt = header["attempt"]
    gradient.number = header["number"]
    gradient.fingerprint = header["fingerprint"]
    gradient.encoding = get("encoding", RAW)
    gradient.examples = get("examples", 1)
    gradient.loss = get("loss")
    gradient.cursor = get("cursor")
    base = get("base")
    gradient.base = None if base is None else State(*base)
    inline = get("payload")
    gradient.is_inline = inline is not None
    if inline is not None:
        payload = inline
    gradient.size = size = len(payload)
    gradient.parts = (payload,) if size else ()
    gradient.charge = size if size > MIN_CHARGE_BYTES else MIN_CHARGE_BYTES
    gradient.user = None
    gradient.slot = gradient.asks = None
    return gradient
