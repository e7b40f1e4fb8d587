"""What a broker's numbers were over time: rates from differences, and a bounded series of points.

The broker keeps no history. Whoever looks on asks for `status` and `workers` again and again, and keeps it here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Ten minutes at one look a second.
MAX_POINTS = 600


@dataclass(frozen=True)
class Point:
    """What is drawn of one look.

    Attributes
    ----------
    at : float
        Seconds since the epoch.
    rate : float or None
        Gradients applied each second since the look before; None if there is none to compare with.
    loss : float or None
        Mean of the last losses of the live workers.
    queued : int
        Gradients in the queue.
    version : int
        Of the parameters.
    """

    at: float
    rate: float | None
    loss: float | None
    queued: int
    version: int


@dataclass(frozen=True)
class Sight:
    """What one look has shown.

    Attributes
    ----------
    at : float
        Seconds since the epoch.
    error : str or None
        Why there was no answer; then `status` and `workers` are those of the last one.
    status : mapping
        As `distgrad.Admin.status` gives it; empty before the first answer.
    workers : sequence of mapping
        As `distgrad.Admin.workers` gives them, each with ``rate``: gradients settled each second, or None.
    """

    at: float
    error: str | None = None
    status: Mapping[str, Any] = field(default_factory=dict)
    workers: Sequence[Mapping[str, Any]] = ()


class History:
    """The last looks at one broker; not for several threads at once.

    Parameters
    ----------
    max_points : int, > 0
        How many are remembered; older ones are forgotten.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.points: deque[Point] = deque(maxlen=max_points)
        self.sight = Sight(0.0)

    def add(self, at: float, status: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]) -> Sight:
        """Take in an answer.

        Parameters
        ----------
        at : float
            Seconds since the epoch.
        status : mapping
            As `distgrad.Admin.status` gives it.
        workers : sequence of mapping
            As `distgrad.Admin.workers` gives them.

        Returns
        -------
        Sight
            With rates.
        """
        last = self.sight
        # Another process of the broker may count from 0 again: nothing is compared with the former one's numbers.
        is_same = bool(last.status) and last.status.get("incarnation") == status.get("incarnation")
        seconds = at - last.at if is_same and not last.error else 0.0
        former = {worker["id"]: worker for worker in last.workers}
        rows = [{**worker, "rate": _rate(worker, former.get(worker["id"]), "settled", seconds)} for worker in workers]
        self.points.append(
            Point(at, _rate(status, last.status, "applied", seconds), mean_loss(rows), status["queued"],
                  status["version"])
        )  # fmt: skip
        self.sight = Sight(at, None, status, rows)
        return self.sight

    def miss(self, at: float, error: str) -> Sight:
        """Note that there was no answer.

        Parameters
        ----------
        at : float
            Seconds since the epoch.
        error : str
            Why.

        Returns
        -------
        Sight
            The last one, with the error.
        """
        self.sight = Sight(at, error, self.sight.status, self.sight.workers)
        return self.sight


def mean_loss(workers: Sequence[Mapping[str, Any]]) -> float | None:
    """Average the last losses of the live workers; of all, if none is live.

    Parameters
    ----------
    workers : sequence of mapping
        As `distgrad.Admin.workers` gives them.

    Returns
    -------
    float or None
        None if no worker has told a finite loss.
    """
    told = [worker for worker in workers if worker["loss"] is not None and math.isfinite(worker["loss"])]
    losses = [worker["loss"] for worker in told if worker["state"] == "live"] or [worker["loss"] for worker in told]
    return sum(losses) / len(losses) if losses else None


def _rate(now: Mapping[str, Any], before: Mapping[str, Any] | None, key: str, seconds: float) -> float | None:
    if before is None or seconds <= 0:
        return None
    done = float(now[key] - before[key])
    return max(0.0, done / seconds)
