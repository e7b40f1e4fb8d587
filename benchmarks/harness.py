"""Measure distgrad beside a floor: processes, rounds taken in turns, one line of JSON and one of a table.

Both sides stay up for the whole measurement and take turns, round by round (A B A B), so that a change in the
machine's load meets both. What is reported is the median, over the rounds, of the floor's time through ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START_S = 60.0
ROUND_S = 300.0


class Child:
    """A process that runs ``function(connection, *arguments)``; it is spawned, and ended with the ``with`` block.

    Parameters
    ----------
    function : callable
        Of a module, so that the new process can import it.
    *arguments : object
        Are pickled.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None  # it was started
        return self._process.pid

    def hear(self, timeout_s: float = START_S) -> Any:
        """Wait for the next thing that the process tells."""
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"a process of the benchmark told nothing for {timeout_s} s")
        return self._connection.recv()

    def tell(self, count: int) -> None:
        """Have a process in `take_rounds` do its thing `count` times."""
        self._connection.send(count)

    def run(self, count: int) -> float:
        """Do the same and wait for the end; return the seconds."""
        self.tell(count)
        return float(self.hear(ROUND_S))

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        self._process.join(5.0 if kind is None else 0.0)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


@contextlib.contextmanager
def several(function: Callable[..., None], count: int, *arguments: Any) -> Iterator[list[Child]]:
    """Run `Child` several times at once."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Child(function, *arguments)) for _ in range(count)]


def take_rounds(connection: Connection, run: Callable[[int], None]) -> None:
    """In a child: say that it is ready, then run as often as it is told, and tell how long that took."""
    connection.send("ready")
    while (count := connection.recv()) is not None:
        started = time.perf_counter()
        run(count)
        connection.send(time.perf_counter() - started)


class Broker:
    """``distgrad broker`` as users run it, in a process of its own.

    Parameters
    ----------
    *options : str
        More options of the command.
    program : sequence of str
        What Python is to run as ``distgrad``.
    """

    def __init__(self, *options: str, program: Sequence[str] = ("-m", "distgrad")) -> None:
        command = [sys.executable, *program, "broker", "--log-level", "warning", *options]
        free = ["--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DISTGRAD_")}
        self._process = subprocess.Popen([*command, *free], stdout=subprocess.PIPE, text=True, env=kept)
        assert self._process.stdout is not None  # asked for
        line = self._process.stdout.readline()
        match = re.search(r"control=(\S+)", line)
        if match is None:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"the broker did not start: {line!r}")
        self.address = match.group(1)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def peak_bytes(self) -> int:
        """Most memory that the process ever had (VmHWM); Linux only."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match is not None  # proc(5)
        return int(match.group(1)) * 1024

    def __enter__(self) -> Broker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Together:
    """Children that take their rounds at the same time, seen as one.

    Parameters
    ----------
    children : sequence of Child
        All in `take_rounds`.
    """

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children

    def run(self, count: int) -> float:
        """Have all do their thing `count` times; return the seconds until the last is done."""
        started = time.perf_counter()
        for child in self._children:
            child.tell(count)
        for child in self._children:
            child.hear(ROUND_S)
        return time.perf_counter() - started


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison: who is told to run, and which processes' work that is."""

    child: Child | Together
    pids: Sequence[int]

    def run(self, count: int) -> tuple[float, float]:
        """Run one round; return seconds of wall clock and of processors, each for one time."""
        before = self._cpu_s()
        seconds = self.child.run(count)
        return seconds / count, (self._cpu_s() - before) / count

    def _cpu_s(self) -> float:
        total = 0.0
        for pid in self.pids:
            with contextlib.suppress(OSError):  # no /proc but on Linux
                # Fields 14 and 15 of proc(5), counted behind the name, which may hold spaces.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total


def compare(
    question: str, target: float, ours: Side, floor: Side, *, count: int, rounds: int, **about: Any
) -> dict[str, Any]:
    """Take rounds in turns and report the ratio of speeds, floor's time through ours.

    Parameters
    ----------
    question : str
        What is measured; also the name of the result.
    target : float
        Smallest ratio that was promised.
    ours, floor : Side
        Both ready.
    count : int
        How often each side does it in one round.
    rounds : int
        How many rounds of each; one more is taken first and not counted.
    **about : object
        Sizes and settings for the record.
    """
    taken = take_turns({"ours": ours, "floor": floor}, count=count, rounds=rounds)
    return judge(question, target, taken["ours"], taken["floor"], count=count, **about)


def take_turns(sides: Mapping[str, Side], *, count: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Take rounds in turns; return for each side what `Side.run` told, without the first round.

    Parameters
    ----------
    sides : mapping of str to Side
        All ready.
    count, rounds : int
        As for `compare`.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            measured = side.run(count)
            if number:
                times[name].append(measured)
    return times


def judge(
    question: str,
    target: float,
    ours: Sequence[tuple[float, float]],
    floor: Sequence[tuple[float, float]],
    *,
    count: int,
    **about: Any,
) -> dict[str, Any]:
    """Report the ratio of two sides of `take_turns`; parameters are those of `compare`."""
    ratios = [f[0] / o[0] for o, f in zip(ours, floor, strict=True)]
    result = {
        "question": question,
        "target": f">= {target}",
        "value": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "met": statistics.median(ratios) >= target,
        "ours_s": statistics.median(wall for wall, _ in ours),
        "floor_s": statistics.median(wall for wall, _ in floor),
        "ours_cpu_s": statistics.median(cpu for _, cpu in ours),
        "floor_cpu_s": statistics.median(cpu for _, cpu in floor),
        "rounds": len(ratios),
        "count": count,
    }
    return result | about


def keep(results: Sequence[dict[str, Any]], name: str, *, tiny: bool) -> None:
    """Print results as JSON lines, and keep them in a file unless they mean nothing.

    Parameters
    ----------
    results : sequence of dict
        From `compare`, or of the same form.
    name : str
        Of the file.
    tiny : bool
        Sizes were too small to mean anything: nothing is kept.
    """
    lines = "".join(json.dumps(result | environment()) + "\n" for result in results)
    print(lines, end="", flush=True)
    if not tiny:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(lines)


HEADING = f"{'question':<26}{'promised':>12}{'median':>9}{'lowest':>9}{'highest':>9}{'ours':>12}{'floor':>12}  "


def row(result: dict[str, Any]) -> str:
    """Format a result as a line under `HEADING`."""
    numbers = "".join(f"{result[key]:>9.2f}" for key in ("value", "low", "high"))
    times = "".join(_time(result.get(key)) for key in ("ours_s", "floor_s"))
    return f"{result['question']:<26}{result['target']:>12}{numbers}{times}  {'met' if result['met'] else 'NOT MET'}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return f"{'':>12}"
    return f"{seconds * 1e3:>9.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:>9.1f} us"


def environment() -> dict[str, Any]:
    """Name the machine, the versions and the commit."""
    versions = {}
    for package in ("distgrad", "numpy", "pyzmq", "msgpack", "numba", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "load": load,
        },
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "distgrad", "broker", "worker")),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if match is not None:
            return match.group(1)
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""  # an unpacked archive
