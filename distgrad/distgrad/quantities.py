"""Read sizes and times as people write them: ``256MiB``, ``30s``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distgrad.errors import ConfigError

_BYTES = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_BYTES |= {f"{letter}ib": size for letter, size in _BYTES.items() if letter not in ("", "b")}
_BYTES |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """Read a number of bytes.

    Parameters
    ----------
    text : str
        Such as ``4096``, ``256MiB`` or ``1.5G``. K, M, G and T, also with iB, are powers of 1024; KB, MB, GB and TB
        are powers of 1000.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ConfigError
        If it is something else, or no whole number of bytes.
    """
    size = _scaled(text, _BYTES, "a number of bytes such as 4096, 256MiB or 1G")
    if size != int(size):
        raise ConfigError(f"expected a whole number of bytes, got {text!r}")
    return int(size)


def parse_seconds(text: str) -> float:
    """Read a time.

    Parameters
    ----------
    text : str
        Such as ``30``, ``30s``, ``250ms``, ``5m``, ``2h`` or ``1d``.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    ConfigError
        If it is something else.
    """
    return _scaled(text, _SECONDS, "a time such as 30s, 250ms, 5m or 2h")


def checked_timeout(timeout: Any) -> float:
    """Return a time that somebody is willing to wait.

    Parameters
    ----------
    timeout : float, seconds
        As it was given to a client.

    Returns
    -------
    float
        The same.

    Raises
    ------
    ConfigError
        If it is no number above 0.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ConfigError(f"timeout must be more than 0 seconds, got {timeout!r}; leave it out for the default")
    checked: float = timeout
    return checked


def _scaled(text: str, units: Mapping[str, float], expected: str) -> float:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in units:
        raise ConfigError(f"expected {expected}, got {text!r}")
    # Whole numbers stay exact: a float has 53 bits.
    return int(match[1]) * units[unit] if match[1].isdigit() else float(match[1]) * units[unit]
