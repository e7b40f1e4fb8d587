"""Records of the journal in words: their kind and what they tell, for people and for JSON.

Most of it was written by peers: `distgrad.log` escapes it on its way to a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

from distgrad.durable.replay import APPLIED, OUTCOMES, REFUSED, is_gradient

GRADIENT, DECIDED = "gradient", "decided"
UNREADABLE = "unreadable"
"""Kind of a record that was not written by a distgrad of this version."""


class Told(NamedTuple):
    """What one record tells.

    Attributes
    ----------
    kind : str
        As in `distgrad.durable.replay`.
    message : mapping
        Its own content: of a gradient the header from the wire.
    """

    kind: str
    message: Mapping[str, Any]


def read_header(header: Any) -> Told:
    """Read what a record tells.

    Parameters
    ----------
    header : bytes-like
        As stored.

    Returns
    -------
    Told
        Of the kind `UNREADABLE` if it cannot be read.
    """
    try:
        content = msgpack.unpackb(header, strict_map_key=False)
        if is_gradient(header):
            return Told(GRADIENT, {"worker": content["worker"], "number": content["number"], **content})
        kind, message = content
        return Told(str(kind), dict(message))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, msgpack.UnpackException):
        return Told(UNREADABLE, {})


def decisions(message: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, int]], str | None]]:
    """Go through the decisions of a record.

    Parameters
    ----------
    message : mapping
        Of a record of the kind ``decided``.

    Yields
    ------
    outcome : str
        One of `distgrad.durable.replay.OUTCOMES`.
    gradients : list of (str, int)
        Worker and number; several if they were one update.
    reason : str or None
        Why they were refused.
    """
    for decision in message["decisions"]:
        outcome = OUTCOMES[decision[0]]
        if decision[0] == APPLIED:
            yield outcome, [(worker, number) for worker, number in decision[1]], None
        else:
            yield outcome, [(decision[1], decision[2])], decision[3] if decision[0] == REFUSED else None


def fields(told: Told, payload_bytes: int) -> dict[str, Any]:
    """Give what a record tells as fields with short values.

    Parameters
    ----------
    told : Told
        From `read_header`.
    payload_bytes : int
        Bytes behind its header.

    Returns
    -------
    dict
        Text, numbers, true, false and None.
    """
    message = dict(told.message)
    if told.kind == GRADIENT:
        inline = message.pop("payload", None)
        payload_bytes += len(inline) if isinstance(inline, bytes) else 0
        for name in ("v", "kind", "fingerprint", "attempt"):
            message.pop(name, None)
    elif told.kind == DECIDED:
        made: dict[str, list[str]] = {}
        for outcome, gradients, reason in decisions(message):
            names = "+".join(f"{worker}:{number}" for worker, number in gradients)
            made.setdefault(outcome, []).append(names if reason is None else f"{names}({reason})")
        del message["decisions"]
        message |= {outcome: ",".join(names) for outcome, names in made.items()}
    elif told.kind == "set":
        message.pop("layout", None)  # long, and nothing to read
    flat = dict(_flat("", message))
    return flat | {"bytes": payload_bytes} if payload_bytes else flat


def _flat(prefix: str, message: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in message.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", _short(value)


def _short(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_short(each)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(str(_short(each)) for each in value)
    return value
