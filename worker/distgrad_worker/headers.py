"""The header of a gradient, from what a `push` was given."""

from __future__ import annotations

from typing import Any

from distgrad.errors import ConfigError
from distgrad.wire import GRADIENT, MAX_CURSOR_BYTES, PROTOCOL_VERSION, State


def gradient_header(
    worker_id: str, fingerprint: int, base: State | None, loss: float | None, examples: int, cursor: object
) -> dict[str, Any]:
    """Check what goes into a header, and build it.

    Parameters
    ----------
    worker_id : str
        Who pushes.
    fingerprint : int
        Of the layout of the payload.
    base : State or None
        What the gradient was computed on.
    loss : float or None
        For display.
    examples : int
        Training examples behind it, at least 0.
    cursor : bytes, str or None
        Where the worker stands in its data.

    Returns
    -------
    dict
        The header, but for session, attempt and number. What has its default is left out: each key costs time at
        both ends.

    Raises
    ------
    ConfigError
        If `examples` or `cursor` is impossible.
    """
    header: dict[str, Any] = {
        "v": PROTOCOL_VERSION,
        "kind": GRADIENT,
        "worker": worker_id,
        "base": base,
        "fingerprint": fingerprint,
    }
    if examples != 1:
        if examples < 0:
            raise ConfigError(f"examples must be at least 0, got {examples}")
        header["examples"] = int(examples)
    if loss is not None:
        header["loss"] = float(loss)
    if cursor is not None:
        if not (isinstance(cursor, bytes | str) and len(cursor) <= MAX_CURSOR_BYTES):
            raise ConfigError(f"cursor must be bytes or str of at most {MAX_CURSOR_BYTES}, got {cursor!r:.80}")
        header["cursor"] = cursor
    return header
