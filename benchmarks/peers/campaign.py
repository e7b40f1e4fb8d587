"""Measure one cell of the table: every contender warmed up, rounds taken in turns, what came out checked.

All contenders are up at once and take turns, round by round (A B C A B C), so that a change in the machine's load
meets all of them; those that wait do nothing, or are stopped (SIGSTOP) if they would spin. Where memory does not hold
all of them, each is started anew for each of its rounds, in the same turns, and the record says so (``apart``). What
warms up is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.peers.contender import Contender
from benchmarks.peers.processes import end_orphans, signal_all
from benchmarks.peers.team import Report, Round, Team
from benchmarks.peers.work import Cell

_PROCESS_BYTES = 60 << 20
_MIN_EXCHANGES = 3
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long to measure.

    Parameters
    ----------
    rounds : int
        That count.
    round_s : float
        How long one round should take.
    kept : sequence of int
        Children of this process that are not contenders'.
    """

    rounds: int
    round_s: float
    kept: Sequence[int] = ()


@dataclasses.dataclass
class Record:
    """What is known of one contender in one cell."""

    contender: Contender
    count: int = 0
    rounds: list[Round] = dataclasses.field(default_factory=list)
    report: Report = dataclasses.field(default_factory=lambda: Report(None))
    failure: str | None = None
    processes: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)


def measure(cell: Cell, contenders: Sequence[Contender], settings: Settings) -> list[dict[str, Any]]:
    """Measure contenders in one cell.

    Parameters
    ----------
    cell : Cell
        What to do.
    contenders : sequence of Contender
        Those that can.
    settings : Settings
        How long.

    Returns
    -------
    list of dict
        A result for each; one that failed says how.
    """
    load = os.getloadavg()[0]
    records = [Record(contender) for contender in contenders]
    apart = not _fits(cell, len(contenders))
    if apart:
        _measure_apart(cell, records, settings)
    else:
        _measure_together(cell, records, settings)
    return [_result(cell, record, apart, load) for record in records]


def _measure_together(cell: Cell, records: list[Record], settings: Settings) -> None:
    with contextlib.ExitStack() as stack:
        teams: list[tuple[Record, Team]] = []
        for record in records:
            with _failing(record):
                stack.enter_context(record.processes)
                team = record.processes.enter_context(_running(record.contender, cell))
                with _turn(record, team):
                    teams.append((record, team))
        for record, team in teams:
            with _failing(record), _turn(record, team):
                record.count = _warm_up(team, settings.round_s)
        for number in range(settings.rounds):
            for record, team in _rotated(teams, number):
                if record.failure is None:
                    with _failing(record), _turn(record, team):
                        record.rounds.append(team.run(record.count))
        for record, team in teams:
            if record.failure is None:
                with _failing(record), _turn(record, team):
                    record.report = team.check()
                    record.failure = record.report.problem
    end_orphans(settings.kept)


def _measure_apart(cell: Cell, records: list[Record], settings: Settings) -> None:
    for number in range(settings.rounds):
        for record in _rotated(records, number):
            if record.failure is not None:
                continue
            with _failing(record), _running(record.contender, cell) as team:
                if record.count:
                    team.run(record.count)
                else:
                    record.count = _warm_up(team, settings.round_s)
                record.rounds.append(team.run(record.count))
                report = team.check()
                report.lag = max(report.lag, record.report.lag)
                record.report, record.failure = report, report.problem
            end_orphans(settings.kept)


@contextlib.contextmanager
def _running(contender: Contender, cell: Cell) -> Iterator[Team]:
    with contender.start(cell) as team:
        try:
            yield team
        finally:
            if contender.is_restless:
                signal_all(team.pids, signal.SIGCONT)  # or it could not end
            team.end()


@contextlib.contextmanager
def _turn(record: Record, team: Team) -> Iterator[None]:
    """Let a contender's processes run, if they must be stopped while others have their turn."""
    if not record.contender.is_restless:
        yield
        return
    signal_all(team.pids, signal.SIGCONT)
    try:
        yield
    finally:
        signal_all(team.pids, signal.SIGSTOP)


def _rotated(all_of_them: list[_T], number: int) -> list[_T]:
    """Begin with another one in each round: who comes after whom should not matter, but may."""
    first = number % len(all_of_them) if all_of_them else 0
    return all_of_them[first:] + all_of_them[:first]


@contextlib.contextmanager
def _failing(record: Record) -> Iterator[None]:
    """Note a failure and end the contender's processes; the others go on."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        record.failure = f"{type(error).__name__}: {error}".rstrip(": ")
        print(f"{record.contender.name} failed: {record.failure}", file=sys.stderr, flush=True)
        record.processes.close()


def _warm_up(team: Team, round_s: float) -> int:
    """Run for about as long as a round, and find how many exchanges fill one."""
    count, spent_s = 1, 0.0
    while True:
        seconds = team.run(count).seconds
        spent_s += seconds
        fitting = max(_MIN_EXCHANGES, int(count * round_s / seconds))
        if seconds >= round_s / 4 or spent_s >= 4 * round_s:
            return fitting
        count = min(fitting, 10 * count)


def _result(cell: Cell, record: Record, apart: bool, load: float) -> dict[str, Any]:
    contender = record.contender
    result: dict[str, Any] = {
        "name": contender.name,
        "label": contender.label,
        "kind": contender.kind,
        **dataclasses.asdict(cell),
        "unit": "steps/s" if cell.steps_together else "gradients/s",
        "rounds": len(record.rounds),
        "count": record.count,
        "apart": apart,
        "load_before": load,
        "failure": record.failure,
    }
    if record.failure is not None or not record.rounds:
        return result
    done = cell.done(record.count)
    rates = [done / one.seconds for one in record.rounds]
    result |= {
        "rate": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "cpu_s": statistics.median(one.cpu_s / done for one in record.rounds),
        "lag": record.report.lag,
        **record.report.notes,
    }
    if cell.work == "W4":
        for name, percent in (("p50_s", 50), ("p99_s", 99)):
            values = [float(np.percentile(one.exchanges_s, percent)) for one in record.rounds]
            result |= {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    return result


def _fits(cell: Cell, n_contenders: int) -> bool:
    """Tell whether memory holds all contenders at once: arrays of theirs, messages under way, Python and libraries."""
    n_arrays = 3 + 3 * cell.workers + 2 * (cell.work == "W2")
    each = n_arrays * cell.n_bytes + (1 + cell.workers) * _PROCESS_BYTES
    match = re.search(r"MemAvailable:\s+(\d+) kB", _meminfo())
    return match is None or n_contenders * each < 0.8 * int(match.group(1)) * 1024


def _meminfo() -> str:
    try:
        return Path("/proc/meminfo").read_text()
    except OSError:
        return ""
