"""Key folders with one client of each role."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distgrad.keys import Role, add_client
from distgrad.sockets import curve_pair


class KeyFolder(NamedTuple):
    """Paths: the broker's folder, and the files of its clients."""

    folder: Path
    worker: Path
    admin: Path
    read: Path


def make_key_folder(parent: Path, name: str = "keys") -> KeyFolder:
    """Make ``parent/name`` with the clients ``worker``, ``admin`` and ``read``; their files lie in ``parent``."""
    folder = parent / name
    files = [add_client(folder, role, role, curve_pair, out=parent / f"{name}-{role}.key")[1] for role in Role]
    return KeyFolder(folder, *files)
