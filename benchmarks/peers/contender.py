"""What there is to measure: a name, what it is, which work it does, and how to start it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager

from benchmarks.peers.team import Team
from benchmarks.peers.work import Cell

OURS, PEER, FLOOR = "ours", "peer", "floor"


def _nothing_missing() -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the table.

    Parameters
    ----------
    name : str
        For ``--only``.
    label : str
        For tables and pictures.
    kind : str
        `OURS`, `PEER` or `FLOOR`.
    works : tuple of str
        What it can do, of `benchmarks.peers.work.WORKS`.
    start : callable
        Starts its processes for a cell; they end with the ``with`` block.
    missing : callable
        Tells why it cannot run here, or None.
    listens : bool
        Whether it listens beyond loopback by itself, and so runs only in a network of its own.
    is_restless : bool
        Whether its processes keep a core busy while they wait for their turn; then they are stopped meanwhile.
    packages : tuple of str
        Distributions whose versions belong in the record.
    note : str
        What a reader of the table must know about it.
    """

    name: str
    label: str
    kind: str
    works: tuple[str, ...]
    start: Callable[[Cell], AbstractContextManager[Team]]
    missing: Callable[[], str | None] = _nothing_missing
    listens: bool = False
    is_restless: bool = False
    packages: tuple[str, ...] = ()
    note: str = ""


def needs(*modules: str) -> Callable[[], str | None]:
    """Make a `Contender.missing` for a peer that needs modules which may not be installed.

    Parameters
    ----------
    *modules : str
        Names of top-level modules.

    Returns
    -------
    callable
        Tells which of them are missing.
    """

    def missing() -> str | None:
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        return f"{', '.join(absent)} not installed (make bench-peers installs the peers)" if absent else None

    return missing
