"""What the demo shows: progress while it trains, and tables at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

#: Over how long the rate is taken, in seconds.
_RATE_WINDOW_S = 1.0

#: Where nobody watches (a file, a pipe), how often a line is printed, in seconds.
_LINE_EVERY_S = 1.0


@dataclass(frozen=True)
class Point:
    """One look at the training.

    Attributes
    ----------
    seconds : float
        Since the first parameters were there.
    version : int
        Gradients applied.
    train_loss : float or None
        Mean of the workers' last losses.
    test_loss : float
        Mean cross-entropy on the test images.
    accuracy : float, 0 to 1
        Fraction of the test images named correctly.
    """

    seconds: float
    version: int
    train_loss: float | None
    test_loss: float
    accuracy: float


class ProgressView:
    """A live bar on a terminal, a line each second elsewhere; a context manager.

    Parameters
    ----------
    console : rich Console
        Where to show it.
    total : int
        Gradients that will be applied.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._points: list[Point] = []
        self._line_due_s = 0.0
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, text="starting")

    def __enter__(self) -> ProgressView:
        """Begin to draw."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._bar.stop()

    def show(self, point: Point) -> None:
        """Show the newest state.

        Parameters
        ----------
        point : Point
            Later than all before.
        """
        self._points.append(point)
        while len(self._points) > 2 and self._points[1].seconds <= point.seconds - _RATE_WINDOW_S:
            del self._points[0]
        text = f"{point.version:>5,} of {self._total:,} gradients {rate(self._points):>5,.0f}/s"
        if point.train_loss is not None:
            text += f"  loss {point.train_loss:.3f}"
        text += f"  accuracy {point.accuracy:5.1%}"
        self._bar.update(self._task, completed=point.version, text=text)
        is_last = point.version >= self._total
        if not self._console.is_terminal and (point.seconds >= self._line_due_s or is_last):
            self._line_due_s = point.seconds + _LINE_EVERY_S
            self._console.print(text, highlight=False, soft_wrap=True)


def rate(points: Sequence[Point]) -> float:
    """Return how many gradients were applied per second.

    Parameters
    ----------
    points : sequence of Point
        In order of time.

    Returns
    -------
    float
        From the first point to the last; 0 if no time lies between them.
    """
    if not points or points[-1].seconds <= points[0].seconds:
        return 0.0
    return (points[-1].version - points[0].version) / (points[-1].seconds - points[0].seconds)


def workers_table(workers: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out what each worker did.

    Parameters
    ----------
    workers : sequence of mapping
        As `distgrad.Admin.workers` gives them.

    Returns
    -------
    rich Table
        One row for each worker, and one for all of them.
    """
    table = Table(show_footer=True)
    applied = sum(w["applied"] for w in workers)
    mean = sum(w["applied"] * w["staleness_mean"] for w in workers) / applied if applied else 0.0
    table.add_column("worker", "all")
    for title, key in (("applied", "applied"), ("settled", "settled"), ("refused", "refused")):
        table.add_column(title, f"{sum(w[key] for w in workers):,}", justify="right")
    table.add_column("staleness mean", f"{mean:.1f}", justify="right")
    table.add_column("max", f"{max((w['staleness_max'] for w in workers), default=0)}", justify="right")
    table.add_column("last loss", justify="right")
    for w in sorted(workers, key=lambda w: (len(w["id"]), w["id"])):  # worker-2 before worker-10
        loss = "" if w["loss"] is None else f"{w['loss']:.3f}"
        counts = (f"{w[key]:,}" for key in ("applied", "settled", "refused"))
        table.add_row(w["id"], *counts, f"{w['staleness_mean']:.1f}", f"{w['staleness_max']}", loss)
    return table
