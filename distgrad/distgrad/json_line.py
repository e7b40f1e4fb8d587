"""What a command prints with ``--json``: one line that every reader of JSON takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_line(value: Any) -> str:
    """Write a value as one line of JSON.

    Parameters
    ----------
    value : object
        Mappings, sequences, numbers, text, bytes; others are written as their text.

    Returns
    -------
    str
        Without a line end. Bytes are hexadecimal. Floats that are no finite number are ``null``: JSON has none, and
        Python's own ``NaN`` is refused by other readers.
    """
    return json.dumps(_plain(value), allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
