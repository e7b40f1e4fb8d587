"""Measure how long a broker needs until its first answer, and what importing the worker's side adds.

Seconds, not ratios: what a user waits for. A broker is started as users start it; its first answer is that to
``status``. With numba its cache is warm, as it is from the second start on; without it the import of numba
fails. What importing adds is timed in a process of its own, behind ``import numpy, zmq, msgpack``. All of it has its
bytecode, as whatever pip installs has, also where the environment keeps Python from writing any.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import harness
from distgrad import Admin

_NO_NUMBA = """
import sys
sys.modules["numba"] = None
from distgrad.command import main
main()
"""
_IMPORT = """
import time
import numpy, zmq, msgpack
started = time.perf_counter()
import distgrad_worker
took_s = time.perf_counter() - started
import sys
print(took_s, *sorted({"click", "rich", "numba", "safetensors"} & set(sys.modules)))
"""


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    rounds = 2 if tiny else 9
    with _bytecode_is_kept():
        return [
            _report("start with numba", 1.5, rounds, _start),
            _report("start without numba", 0.5, rounds, lambda: _start("-c", _NO_NUMBA)),
            _report("import distgrad_worker", 0.04, rounds, _import),
        ]


@contextmanager
def _bytecode_is_kept() -> Iterator[None]:
    """Have the processes that are started write bytecode, once, into a folder of their own."""
    kept = {name: os.environ.pop(name, None) for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        try:
            yield
        finally:
            del os.environ["PYTHONPYCACHEPREFIX"]
            os.environ.update({name: value for name, value in kept.items() if value is not None})


def _start(*program: str) -> float:
    started = time.perf_counter()
    with harness.Broker(program=program or ("-m", "distgrad")) as broker, Admin(broker.address) as admin:
        admin.status()
        return time.perf_counter() - started


def _import() -> float:
    told = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout.split()
    if told[1:]:
        raise RuntimeError(f"import distgrad_worker loads {', '.join(told[1:])}")
    return float(told[0])


def _report(question: str, limit_s: float, rounds: int, once: Callable[[], float]) -> dict[str, Any]:
    once()  # fills caches
    taken = [once() for _ in range(rounds)]
    return {
        "question": question,
        "target": f"<= {limit_s} s",
        "value": statistics.median(taken),
        "low": min(taken),
        "high": max(taken),
        "met": statistics.median(taken) <= limit_s,
        "rounds": rounds,
        "cores": os.cpu_count(),
    }
