"""A broker's numbers in words, for people; the same on every view in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# A sign beside the word: the meaning is never in the colour alone. A worker whose lease ran out is lost to onlookers.
_STATES = {"live": "● live", "silent": "▲ lost", "left": "○ left"}


def decimal(value: float | None) -> str:
    """Write a number short.

    Parameters
    ----------
    value : float or None
        Any; None is not known.

    Returns
    -------
    str
        At most four digits that matter.
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(n_bytes: float) -> str:
    """Write a size.

    Parameters
    ----------
    n_bytes : float, bytes
        Any.

    Returns
    -------
    str
        Such as ``1.5 MiB``.
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def policy(status: Mapping[str, Any]) -> str:
    """Tell the policy and the update rule.

    Parameters
    ----------
    status : mapping
        As `distgrad.Admin.status` gives it.

    Returns
    -------
    str
        One line.
    """
    settings = dict(status["policy"])
    name = settings.pop("policy")
    rule = status["optimizer"]
    told = ", ".join(f"{key}={value}" for key, value in settings.items() if value not in (None, False))
    of_rule = "p - g" if rule is None else f"{rule['name']} lr={decimal(rule.get('lr'))}"
    return f"policy {name} ({told})  rule {of_rule}"


def numbers(status: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]) -> str:
    """Tell what was done, and what waits.

    Parameters
    ----------
    status : mapping
        As `distgrad.Admin.status` gives it.
    workers : sequence of mapping
        As `distgrad.Admin.workers` gives them.

    Returns
    -------
    str
        Two lines.
    """
    accepted, settled, repeated = (
        sum(worker[key] for worker in workers) for key in ("accepted", "settled", "repeated")
    )
    refused = sum(status["refused"].values())
    return (
        f"version {status['version']:,}  workers {status['workers_live']} live of {status['workers']}  "
        f"queue {status['queued']:,} ({size(status['queued_bytes'])} of {size(status['queue_bytes'])})  "
        f"held {status['held']:,}  received {size(status['received_bytes'])}\n"
        f"accepted {accepted:,} / settled {settled:,} / repeated {repeated:,} / refused {refused:,} / "
        f"lost: {status['lost']:,}"
    )


def disk(status: Mapping[str, Any]) -> str:
    """Tell how the data folder does.

    Parameters
    ----------
    status : mapping
        As `distgrad.Admin.status` gives it.

    Returns
    -------
    str
        One line.
    """
    told = status["disk"]
    if told is None:
        return "disk: no data folder"
    if told["trouble"]:
        return f"disk: TROUBLE: {told['trouble']}"
    last = "no checkpoint yet"
    if told["checkpoint"] is not None:
        last = f"checkpoint of version {told['checkpoint_version']:,}, {told['checkpoint_age_s']:.0f} s ago"
    return f"disk: {last}, journal {size(told['journal_bytes'])}, {told['unsettled']:,} waiting for the disk"


def state(worker: Mapping[str, Any]) -> str:
    """Tell a worker's state.

    Parameters
    ----------
    worker : mapping
        One of `distgrad.Admin.workers`.

    Returns
    -------
    str
        A sign and a word.
    """
    return _STATES.get(worker["state"], f"? {worker['state']}")


def worker(worker: Mapping[str, Any]) -> list[str]:
    """Tell a worker's numbers.

    Parameters
    ----------
    worker : mapping
        One of `distgrad.Admin.workers`, with ``rate``.

    Returns
    -------
    list of str
        Rate, staleness, loss, last seen, bytes, accepted, settled, repeated, refused.
    """
    return [
        decimal(worker["rate"]),
        decimal(worker["staleness"]),
        decimal(worker["loss"]),
        f"{worker['last_seen_s']:.1f} s",
        size(worker["received_bytes"]),
        *(f"{worker[key]:,}" for key in ("accepted", "settled", "repeated", "refused")),
    ]
