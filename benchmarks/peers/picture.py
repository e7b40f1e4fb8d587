"""Draw rates against sizes, both logarithmic, one panel for each number of workers; floors are lines without marks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.contender import FLOOR, OURS
from benchmarks.peers.report import Result, size_label

# Okabe and Ito's colours, which people tell apart however they see colours; marks and dashes differ as well.
_OURS: list[object] = ["#0072B2", "#56B4E9", "#004466"]
_PEERS: list[object] = ["#D55E00", "#CC79A7", "#E69F00", "#009E73", "#000000", "#8B4513", "#7F6FBF", "#B0A000"]
_MARKS: list[object] = ["s", "^", "v", "D", "P", "X", "<", ">"]
_DASHES: list[object] = ["--", ":", "-.", (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1))]


def draw(results: Sequence[Result], work: str, path: Path) -> None:
    """Draw one work.

    Parameters
    ----------
    results : sequence of dict
        Those that have a rate are drawn.
    work : str
        Of W1, W2 and W3.
    path : Path
        Of the picture, PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if result["work"] == work and "rate" in result]
    numbers = sorted({result["workers"] for result in shown})
    sizes = sorted({result["size"] for result in shown})
    styles = _styles(shown)
    figure, panels = pyplot.subplots(
        1, len(numbers), figsize=(4.2 * len(numbers) + 2.6, 5.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, workers in zip(panels[0], numbers, strict=True):
        for name, style in styles.items():
            of_name = sorted(
                (r for r in shown if r["name"] == name and r["workers"] == workers), key=lambda r: int(r["size"])
            )
            if of_name:
                rates = [r["rate"] for r in of_name]
                spread = [[r["rate"] - r["low"] for r in of_name], [r["high"] - r["rate"] for r in of_name]]
                line = axes.plot([r["size"] for r in of_name], rates, **style)[0]
                if of_name[0]["kind"] != FLOOR:
                    axes.errorbar(
                        [r["size"] for r in of_name], rates, spread, fmt="none", color=line.get_color(), capsize=2, lw=1
                    )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [size_label(size) for size in sizes])
        axes.set_xticks([], minor=True)
        axes.set_title(f"{workers} worker{'s' if workers > 1 else ''}")
        axes.set_xlabel("parameters (float32)")
        axes.grid(True, which="major", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("steps a second" if work == "W3" else "gradients a second")
    handles = dict(pair for axes in panels[0] for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _styles(results: Sequence[Result]) -> dict[str, dict[str, object]]:
    """Give each contender its looks, the same in every panel."""
    ours, peers, marks, dashes = (itertools.cycle(looks) for looks in (_OURS, _PEERS, _MARKS, _DASHES))
    styles: dict[str, dict[str, object]] = {}
    for result in results:
        if result["name"] in styles:
            continue
        if result["kind"] == OURS:
            look: dict[str, object] = {"color": next(ours), "marker": "o", "lw": 2.4, "ms": 7, "zorder": 3}
        elif result["kind"] == FLOOR:
            look = {"color": "#777777", "linestyle": next(dashes), "lw": 1.2, "zorder": 1}
        else:
            look = {"color": next(peers), "marker": next(marks), "lw": 1.3, "ms": 6, "zorder": 2}
        styles[result["name"]] = {"label": result["label"], **look}
    return styles
