"""Measure distgrad, its peers and floors on the same work: ``python -m benchmarks.peers [--tiny]``.

``--only`` and ``--work`` choose, ``--help`` tells the rest. Everything runs in a network namespace that has loopback
alone, which this program makes; without one, those that would listen on every interface are left out. README.md beside
this file says what the numbers show and what not.
"""

from __future__ import annotations

import argparse
import multiprocessing.resource_tracker
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.peers import campaign, namespace, picture, processes, report
from benchmarks.peers.contender import Contender
from benchmarks.peers.registry import CONTENDERS
from benchmarks.peers.work import MAX_WORKERS, WORKS, Cell

RESULTS = harness.RESULTS / "peers.json"
IMAGES = harness.ROOT / "docs" / "images"
SIZES, WORKERS, LATENCY_SIZE = (10_000, 1_000_000, 25_000_000), (1, 2, 4), 10_000
TINY_SIZES, TINY_WORKERS = (2_000, 300_000), (1, 2)
ROUNDS, ROUND_S, TINY_ROUNDS, TINY_ROUND_S = 5, 1.0, 2, 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parse(given)
    if asked.report is not None:
        results = report.load(asked.report)
        print(report.tables(results))
        draw(results, asked.images)
        return 0
    without = namespace.enter("benchmarks.peers", given)
    if without is not None:
        print(f"without a network of its own: {without}", file=sys.stderr)
    able = [CONTENDERS[name] for name in asked.only if can_run(CONTENDERS[name], is_isolated=without is None)]
    processes.adopt_orphans()
    multiprocessing.resource_tracker.ensure_running()  # a child that stays; any other that is left over is not ours
    settings = campaign.Settings(asked.rounds, asked.seconds, tuple(processes.children()))
    packages = sorted({package for contender in able for package in contender.packages})
    results = []
    for cell in cells(asked):
        contenders = [contender for contender in able if cell.work in contender.works]
        about = report.environment(packages)
        measured = [result | about for result in campaign.measure(cell, contenders, settings)]
        print(report.lines(measured), end="", flush=True)
        results += measured
        if asked.output is not None:
            report.keep(results, asked.output)
    print(report.tables(results), flush=True)
    if asked.images is not None:
        draw(results, asked.images)
    return 1 if any(result["failure"] for result in results) else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what is not given depends on whether it is all of the benchmark, and not tiny."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs; keeps nothing")
    parser.add_argument("--only", type=names_of(CONTENDERS), metavar="NAMES", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--work", type=names_of(WORKS), metavar="WORKS", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--sizes", type=numbers_up_to(10**9), metavar="N,…", help="elements of the parameters")
    parser.add_argument("--workers", type=numbers_up_to(MAX_WORKERS), metavar="N,…", help=f"at most {MAX_WORKERS}")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"that count, for each contender; {ROUNDS}")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"one round takes about so long; {ROUND_S}")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep JSON lines here; of a whole run in results/")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="draw here; a whole run in docs/images/")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="measure nothing: tables, pictures of what was kept"
    )
    asked = parser.parse_args(arguments)
    if not (asked.tiny or asked.only or asked.work or asked.sizes or asked.workers or asked.report):
        asked.output, asked.images = asked.output or RESULTS, asked.images or IMAGES
    asked.only, asked.work = asked.only or list(CONTENDERS), asked.work or list(WORKS)
    asked.latency_size = LATENCY_SIZE if asked.sizes is None and not asked.tiny else min(asked.sizes or TINY_SIZES)
    asked.sizes = asked.sizes or (TINY_SIZES if asked.tiny else SIZES)
    asked.workers = asked.workers or (TINY_WORKERS if asked.tiny else WORKERS)
    asked.rounds = asked.rounds or (TINY_ROUNDS if asked.tiny else ROUNDS)
    asked.seconds = asked.seconds or (TINY_ROUND_S if asked.tiny else ROUND_S)
    return asked


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Make a type for a list of names, separated by commas, that come back in the order in which they are known."""

    def parse_names(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return [name for name in known if name in given]

    return parse_names


def numbers_up_to(largest: int) -> Callable[[str], list[int]]:
    """Make a type for a list of whole numbers from 1, separated by commas."""

    def parse_numbers(text: str) -> list[int]:
        numbers = [int(part) for part in text.split(",")]
        if not all(1 <= number <= largest for number in numbers):
            raise argparse.ArgumentTypeError(f"must be from 1 to {largest}")
        return numbers

    return parse_numbers


def can_run(contender: Contender, *, is_isolated: bool) -> bool:
    """Tell whether a contender can run here, and say so if not."""
    reason = contender.missing()
    if reason is None and contender.listens and not is_isolated:
        reason = "it would listen on every interface"
    if reason is not None:
        print(f"skipped {contender.name}: {reason}", file=sys.stderr, flush=True)
    return reason is None


def cells(asked: argparse.Namespace) -> list[Cell]:
    """List the cells of the tables, small ones first."""
    wide = [
        Cell(work, size, workers)
        for work in asked.work
        if work != "W4"
        for size in sorted(asked.sizes)
        for workers in asked.workers
        if work != "W3" or workers > 1  # a step of one worker has nobody to wait for
    ]
    return [*wide, *([Cell("W4", asked.latency_size, 1)] if "W4" in asked.work else [])]


def draw(results: Sequence[report.Result], folder: Path | None) -> None:
    """Draw a picture of each work that has rates."""
    for work in WORKS if folder is not None else ():
        if work != "W4" and any(result["work"] == work and "rate" in result for result in results):
            picture.draw(results, work, (folder or IMAGES) / f"peers-{work.lower()}.png")


if __name__ == "__main__":
    sys.exit(main())
