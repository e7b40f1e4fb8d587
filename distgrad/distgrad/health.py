"""Whether a broker does its work, told from its status: what probes of containers and services ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def obstacles(status: Mapping[str, Any]) -> list[str]:
    """Tell what keeps a broker from settling gradients.

    That there are no parameters yet is no obstacle: workers bring them.

    Parameters
    ----------
    status : mapping
        As `Admin.status` gives it.

    Returns
    -------
    list of str
        One sentence each; empty if it settles what comes.
    """
    found = []
    if not status.get("running", False):
        found.append("it was stopped; `distgrad admin ADDRESS start` lets it go on")
    trouble = (status.get("disk") or {}).get("trouble")
    if trouble is not None:
        found.append(f"nothing is settled, because of the disk: {trouble}")
    return found
