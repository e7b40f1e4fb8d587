"""Leases: a worker on this host computes on a version where it is, until its next gradient or pull.

A lease is a hold as a reader's (`versions`): it keeps the buffer from being written to, counts as one of the versions
that are read, and may be taken back, which its worker finds out by the stamp.
"""

from __future__ import annotations

from distgrad_broker.state import CoreState


def may_lease(state: CoreState, worker: str | None, user: str | None) -> bool:
    """Tell whether a worker of this name is known, and is this key's.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    worker : str or None
        The id.
    user : str or None
        Identity of the key that asks.

    Returns
    -------
    bool
        True if it may have a lease.
    """
    member = None if worker is None else state.members.get(worker)
    return member is not None and member.user == user


def lease(state: CoreState, worker: str, now: float) -> str | None:
    """Lease the current version to a worker, instead of what it had.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    worker : str
        The id.
    now : float
        Seconds on the shell's clock.

    Returns
    -------
    str or None
        The token; None if too many versions are being read: it has to copy.
    """
    end(state, worker)
    hold = state.versions.lease(now)
    if hold is None:
        return None
    state.leases[worker] = hold
    return hold.token


def end(state: CoreState, worker: str) -> None:
    """End a worker's lease, if it has one.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    worker : str
        The id.
    """
    hold = state.leases.pop(worker, None)
    if hold is not None:
        state.versions.release(hold.token)


def renew(state: CoreState, worker: str, now: float) -> None:
    """Note that a worker is alive: its lease goes on.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    worker : str
        The id.
    now : float
        Seconds on the shell's clock.
    """
    hold = state.leases.get(worker)
    if hold is not None:
        hold.last_used = now
