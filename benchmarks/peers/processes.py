"""What processes cost, and that none is left behind; Linux only, elsewhere both are unknown."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_ENDING_S = 10.0


def cpu_s(roots: Sequence[int]) -> float:
    """Add up the processor time of processes and of all that they started.

    Parameters
    ----------
    roots : sequence of int
        Process ids.

    Returns
    -------
    float
        Seconds, without those of processes that have ended; 0 where there is no ``/proc``.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    known = {pid: (parent, used) for pid, parent, used in _processes()}
    return sum(used for pid, (_, used) in known.items() if _descends(pid, set(roots), known)) / ticks


def signal_all(roots: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to processes and to all that they started.

    Parameters
    ----------
    roots : sequence of int
        Process ids.
    number : Signals
        SIGSTOP or SIGCONT.
    """
    known = {pid: (parent, used) for pid, parent, used in _processes()}
    for pid in [pid for pid in known if _descends(pid, set(roots), known)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def adopt_orphans() -> None:
    """Become the parent of whatever children leave behind, so that `end_orphans` finds it."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans(kept: Sequence[int]) -> list[int]:
    """End every child of this process but some, and wait for it.

    Parameters
    ----------
    kept : sequence of int
        Children that are to go on.

    Returns
    -------
    list of int
        The ids of those that were ended.
    """
    ended: list[int] = []
    deadline = time.monotonic() + _ENDING_S
    # What an ended process had started becomes a child in its turn.
    while orphans := [pid for pid in children() if pid not in kept]:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        ended += orphans
        if time.monotonic() > deadline:
            break
    return ended


def children() -> list[int]:
    """List the children of this process."""
    return [pid for pid, parent, _ in _processes() if parent == os.getpid()]


def _processes() -> Iterator[tuple[int, int, int]]:
    """Yield id, parent and clock ticks used, of every process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # Counted behind the name, which may hold spaces (proc(5)).
            fields = path.read_text().rpartition(")")[2].split()
            yield int(path.parent.name), int(fields[1]), int(fields[11]) + int(fields[12])


def _descends(pid: int, roots: set[int], known: dict[int, tuple[int, int]]) -> bool:
    while pid in known:
        if pid in roots:
            return True
        pid = known[pid][0]
    return False
