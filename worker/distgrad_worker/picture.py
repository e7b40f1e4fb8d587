"""Draw how loss and accuracy went. Needs matplotlib, so only the demo imports it, when it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from distgrad_worker.demo_view import Point

_TRAIN, _TEST, _GOAL, _GRID = "#9aa7b4", "#1f5fa8", "#c0504d", "#e3e6ea"


def draw(points: Sequence[Point], path: Path, *, title: str, goal: float) -> None:
    """Write a picture with the loss on the left and the test accuracy on the right.

    Parameters
    ----------
    points : sequence of Point
        At least one, in order.
    path : Path
        Of the PNG file; replaced if it is there.
    title : str
        Stands above both panels.
    goal : float, 0 to 1
        Accuracy that a line marks.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no window system is needed, and no state outside this figure is touched
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2)
    versions = [p.version for p in points]

    trained = [(p.version, p.train_loss) for p in points if p.train_loss is not None]
    left.plot([v for v, _ in trained], [loss for _, loss in trained], color=_TRAIN, lw=1.2, label="last batches")
    left.plot(versions, [p.test_loss for p in points], color=_TEST, lw=2, label="test images")
    left.set_ylabel("loss (mean cross-entropy)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)

    last = points[-1]
    right.plot(versions, [p.accuracy for p in points], color=_TEST, lw=2)
    right.plot([last.version], [last.accuracy], "o", color=_TEST, clip_on=False)
    right.annotate(
        f"{last.accuracy:.1%}",
        (last.version, last.accuracy),
        xytext=(-6, -24),
        textcoords="offset points",
        ha="right",
        color=_TEST,
        fontsize=12,
        fontweight="bold",
    )
    right.axhline(goal, color=_GOAL, lw=1, ls="--")
    right.annotate(
        f"goal: {goal:.0%}",
        (0.5, goal),
        xycoords=("axes fraction", "data"),
        xytext=(0, -16),
        textcoords="offset points",
        ha="center",
        color=_GOAL,
    )
    right.set_ylabel("accuracy on test images")
    right.set_ylim(0, 1.05)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    for axes in (left, right):
        axes.set_xlabel("gradients applied")
        axes.set_xlim(0, max(last.version, 1))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
