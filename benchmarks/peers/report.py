"""What is kept: JSON lines with machine, versions and commit, and Markdown tables made from them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.peers.contender import FLOOR, OURS

Result = dict[str, Any]

TITLES = {
    "W1": "W1: asynchronous push, SGD, parameters back (gradients a second)",
    "W2": "W2: the same with Adam (gradients a second)",
    "W3": "W3: one synchronous step of all workers (steps a second)",
    "W4": "W4: one worker's round trip (microseconds)",
}


def environment(packages: Iterable[str]) -> Result:
    """Name the machine, the commit, and the versions of ours and of other packages.

    Parameters
    ----------
    packages : iterable of str
        Distributions beside our own.

    Returns
    -------
    dict
        For each result.
    """
    known = harness.environment()
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known["versions"][package] = importlib.metadata.version(package)
    return known


def keep(results: Sequence[Result], path: Path) -> None:
    """Write results as JSON lines.

    Parameters
    ----------
    results : sequence of dict
        All of them.
    path : Path
        Replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(results))


def lines(results: Iterable[Result]) -> str:
    """Write results as JSON lines."""
    return "".join(json.dumps(result) + "\n" for result in results)


def load(path: Path) -> list[Result]:
    """Read what `keep` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(results: Sequence[Result]) -> str:
    """Make one Markdown table of each work.

    Parameters
    ----------
    results : sequence of dict
        With or without failures.

    Returns
    -------
    str
        Medians with half the distance between the lowest and the highest round; for W1 to W3 the best of a column's
        contenders, floors aside, in bold.
    """
    return "\n".join(
        _latencies(of_work) if work == "W4" else _rates(work, of_work)
        for work in TITLES
        if (of_work := [result for result in results if result["work"] == work])
    )


def _rates(work: str, results: Sequence[Result]) -> str:
    columns = sorted({(-result["size"], result["workers"]) for result in results})
    cells = {(result["name"], -result["size"], result["workers"]): result for result in results}
    heads = [f"{size_label(-size)}, {workers}" for size, workers in columns]
    lines = [f"### {TITLES[work]}", "", _row(["", *heads]), _row(["---", *["---:"] * len(heads)])]
    best = {
        column: max(
            (r["rate"] for r in results if "rate" in r and r["kind"] != FLOOR and _column(r) == column), default=0.0
        )
        for column in columns
    }
    for name, label in _labels(results).items():
        texts = []
        for column in columns:
            result = cells.get((name, *column))
            text = _rate(result)
            texts.append(f"**{text}**" if result and result.get("rate") == best[column] else text)
        lines.append(_row([label, *texts]))
    lines += ["", *_ratios(columns, cells, results)]
    return "\n".join(lines)


def _ratios(columns: Sequence[tuple[int, int]], cells: dict[Any, Result], results: Sequence[Result]) -> list[str]:
    """Add how many times as fast the first of ours is as each other row."""
    labels = _labels(results)
    ours = next((r["name"] for r in results if r["kind"] == OURS and "rate" in r), None)
    if ours is None:
        return []
    lines = [
        _row([f"{labels[ours]}, through", *[f"{size_label(-size)}, {workers}" for size, workers in columns]]),
        _row(["---", *["---:"] * len(columns)]),
    ]
    for name, label in labels.items():
        if name != ours:
            pairs = [(cells.get((ours, *column)), cells.get((name, *column))) for column in columns]
            lines.append(_row([label, *[_ratio(mine, theirs) for mine, theirs in pairs]]))
    return [*lines, ""]


def _latencies(results: Sequence[Result]) -> str:
    lines = [f"### {TITLES['W4']}", "", _row(["", "p50", "p99", "processor time"]), _row(["---", *["---:"] * 3])]
    for result in results:
        if "p50_s" in result:
            values = [f"{result[key] * 1e6:,.0f}" for key in ("p50_s", "p99_s", "cpu_s")]
        else:
            values = ["failed"] * 3
        lines.append(_row([result["label"], *values]))
    return "\n".join([*lines, ""])


def _labels(results: Sequence[Result]) -> dict[str, str]:
    return {result["name"]: result["label"] for result in results}


def _column(result: Result) -> tuple[int, int]:
    return -result["size"], result["workers"]


def _rate(result: Result | None) -> str:
    if result is None:
        return ""
    if "rate" not in result:
        return "failed"
    rate = result["rate"]
    spread = (result["high"] - result["low"]) / 2 / rate
    return f"{rate:,.0f} ±{spread:.0%}" if rate >= 100 else f"{rate:.1f} ±{spread:.0%}"


def _ratio(mine: Result | None, theirs: Result | None) -> str:
    if not mine or not theirs or "rate" not in mine or "rate" not in theirs:
        return ""
    return f"{mine['rate'] / theirs['rate']:.2f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def size_label(size: int) -> str:
    """Write a size as people say it: 25 M, 10 k."""
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return str(size)
