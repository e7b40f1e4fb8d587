"""What `status` tells: the broker's state as one map of names and numbers."""

from __future__ import annotations

from typing import Any

from distgrad.durable.books import LIVE
from distgrad.version import __version__
from distgrad_broker.state import CoreState

# A reply's header holds 64 KiB, and a worker's id may have 128 characters.
MAX_NAMES = 16


def describe(state: CoreState, now: float) -> dict[str, Any]:
    """Describe the broker's state.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    now : float
        Seconds on the shell's clock.

    Returns
    -------
    dict
        Ready for msgpack and JSON.
    """
    versions = state.versions
    layout = versions.layout
    rule = versions.holder.rule
    return {
        "distgrad": __version__,
        "incarnation": state.incarnation,
        "generation": state.generation,
        "version": versions.version,
        "running": state.is_running,
        "draining": state.drain_left,
        "has_parameters": layout is not None,
        "leaves": 0 if layout is None else len(layout.leaves),
        "parameter_bytes": 0 if layout is None else layout.parameter_bytes,
        "mode": versions.holder.mode,
        "optimizer": None if rule is None else {"name": rule.name, **rule.settings()},
        "policy": policy_settings(state),
        "held": len(state.held),
        "waits_for": list(state.policy.waits_for(state.situation(now)))[:MAX_NAMES],
        "queued": len(state.queue),
        "queued_bytes": state.queued_bytes,
        "queue_bytes": state.grants.budget_bytes,
        "granted_bytes": state.grants.committed_bytes(state.members),
        "waiting_for_turn": state.grants.waiting_for_turn,
        "workers": len(state.members),
        "workers_live": sum(member.state == LIVE for member in state.members),
        "applied": state.outcomes["applied"],
        "superseded": state.outcomes["superseded"],
        "cleared": state.outcomes["cleared"],
        "refused": dict(state.refused),
        "dropped": dict(state.dropped),
        "rejected": dict(state.rejected),
        "received_bytes": state.received_bytes,
        "staleness": _trimmed(state.staleness),
        "staleness_sum": state.staleness_sum,
        "lost": lost(state),
        "snapshots_held": versions.held,
        "snapshots_revoked": versions.revoked,
        "waiting_pulls": len(state.pulls),
        "durability": state.durability,
        "hooks": None if state.hooks is None else state.hooks._asdict(),
        "disk": _disk(state, now),
    }


def lost(state: CoreState) -> int:
    """Count the gradients that were accepted and are neither settled nor on their way to it: 0, or there is a bug.

    The workers' numbers are compared with what queues and lists really hold.

    Parameters
    ----------
    state : CoreState
        The core's memory.

    Returns
    -------
    int
        How many.
    """
    missing = -len(state.queue) - len(state.held) - len(state.unsettled)
    for member in state.members:
        missing += member.accepted - member.settled
        if member.ahead:
            # After a restart what was decided ahead may be numbers that are yet to be accepted again.
            missing -= sum(number <= member.accepted for number in member.ahead)
    return missing


def _trimmed(classes: list[int]) -> list[int]:
    """Cut the empty classes at the end."""
    n = len(classes)
    while n and not classes[n - 1]:
        n -= 1
    return classes[:n]


def _disk(state: CoreState, now: float) -> dict[str, Any] | None:
    """Describe how the data folder does; None if there is none."""
    if state.settings.data is None:
        return None
    checkpoints, records = state.checkpoints, state.records
    return {
        "trouble": state.trouble,
        "unsettled": len(state.unsettled),
        "records": None if records is None else records.sequence,
        "durable": None if records is None else records.durable,
        "journal_bytes": 0 if records is None else records.bytes - checkpoints.bytes,
        "checkpoint": checkpoints.path,
        "checkpoint_version": checkpoints.written_version,
        "checkpoint_age_s": None if checkpoints.path is None else round(now - checkpoints.written_at, 3),
        "checkpoint_under_way": checkpoints.is_under_way,
    }


def policy_settings(state: CoreState) -> dict[str, Any]:
    """Give the policy and the weighing in force.

    Parameters
    ----------
    state : CoreState
        The core's memory.

    Returns
    -------
    dict
        Names as in the configuration.
    """
    return {"policy": state.policy.name, **state.policy.settings(), **state.weighing.settings()}
