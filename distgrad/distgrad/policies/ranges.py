"""Refuse settings that are no numbers of their kind: they also come over the wire, where anything may stand for one."""

from __future__ import annotations

from typing import Any

from distgrad.errors import ConfigError


def check_whole(name: str, value: Any, least: int, why: str = "") -> None:
    """Refuse what is no whole number, or too small.

    Parameters
    ----------
    name : str
        The setting.
    value : object
        Its value.
    least : int
        The smallest that is allowed.
    why : str
        Why not smaller.

    Raises
    ------
    ConfigError
        If it is out of range.
    """
    if type(value) is not int:
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}{why and ': '}{why}")


def check_seconds(name: str, value: Any) -> None:
    """Refuse what is no finite time.

    Parameters
    ----------
    name : str
        The setting.
    value : object
        Its value.

    Raises
    ------
    ConfigError
        If it is out of range.
    """
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ConfigError(f"{name} must be at least 0 seconds, got {value!r}")
