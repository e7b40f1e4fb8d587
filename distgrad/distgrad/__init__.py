"""Many machines compute gradients; distgrad applies each exactly once to one set of parameters.

This package holds what every side shares: the in-process class `DistributedGradients`, the update rules, the wire
format, and the clients `Admin` and `Reader`. The broker is in ``distgrad_broker``, the worker in ``distgrad_worker``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distgrad.version import __version__

if TYPE_CHECKING:
    from distgrad.admin import Admin
    from distgrad.errors import (
        AlreadyRunning,
        BrokerRestarted,
        BrokerUnreachable,
        CheckpointError,
        ConfigError,
        ControlError,
        DataDamaged,
        DataFolderInUse,
        DeliveryFailed,
        Destroyed,
        DistgradError,
        Fenced,
        Forbidden,
        Forked,
        GradientRefused,
        HistoryLost,
        InvalidMode,
        KeyFileError,
        LayoutError,
        MalformedMessage,
        NoParameters,
        PeerError,
        QueueFull,
        SnapshotRevoked,
        StateError,
        UpdaterFailed,
        WrongProtocol,
    )
    from distgrad.in_process import DistributedGradients
    from distgrad.reader import Reader
    from distgrad.rules import SGD, Adam, AdamW, Rule

# Imported when first used: a worker needs neither rules nor Admin nor Reader, and importing distgrad must stay cheap.
_HOMES = {
    "distgrad.admin": ("Admin",),
    "distgrad.in_process": ("DistributedGradients",),
    "distgrad.reader": ("Reader",),
    "distgrad.rules": ("SGD", "Adam", "AdamW", "Rule"),
    "distgrad.errors": (
        "AlreadyRunning",
        "BrokerRestarted",
        "BrokerUnreachable",
        "CheckpointError",
        "ConfigError",
        "ControlError",
        "DataDamaged",
        "DataFolderInUse",
        "DeliveryFailed",
        "Destroyed",
        "DistgradError",
        "Fenced",
        "Forbidden",
        "Forked",
        "GradientRefused",
        "HistoryLost",
        "InvalidMode",
        "KeyFileError",
        "LayoutError",
        "MalformedMessage",
        "NoParameters",
        "PeerError",
        "QueueFull",
        "SnapshotRevoked",
        "StateError",
        "UpdaterFailed",
        "WrongProtocol",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Admin",
    "AlreadyRunning",
    "BrokerRestarted",
    "BrokerUnreachable",
    "CheckpointError",
    "ConfigError",
    "ControlError",
    "DataDamaged",
    "DataFolderInUse",
    "DeliveryFailed",
    "Destroyed",
    "DistgradError",
    "DistributedGradients",
    "Fenced",
    "Forbidden",
    "Forked",
    "GradientRefused",
    "HistoryLost",
    "InvalidMode",
    "KeyFileError",
    "LayoutError",
    "MalformedMessage",
    "NoParameters",
    "PeerError",
    "QueueFull",
    "Reader",
    "Rule",
    "SnapshotRevoked",
    "StateError",
    "UpdaterFailed",
    "WrongProtocol",
    "__version__",
]


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'distgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
