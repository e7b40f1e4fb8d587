"""Run a campaign: ``python -m simulation.run --seeds 10000``, from the folder of the tests; or one seed with its trace.

The first seed that fails is told with its trace and with a plan from which all was left out that it does not need.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from typing import NamedTuple

from simulation.plan import make_plan
from simulation.world import World, make_world, run_world

# Lines of a trace that are shown.
MAX_LINES = 120
# Seeds that a process runs before another takes over.
CHUNK = 200


class Failure:
    """A seed that failed, and the world in which it did."""

    def __init__(self, world: World, error: BaseException) -> None:
        self.world = world
        self.error = error
        self.told = f"{type(error).__name__}: {error}"

    @property
    def kind(self) -> str:
        """What failed, without its numbers: where it was raised."""
        frame = traceback.extract_tb(self.error.__traceback__)[-1]
        return f"{type(self.error).__name__} {frame.filename} {frame.lineno}"


def try_seed(seed: int, *, without: frozenset[int] = frozenset(), traces: bool = False) -> tuple[World, Failure | None]:
    """Run a seed, and tell how it failed, if it did."""
    world = make_world(seed, without=without, traces=traces)
    try:
        run_world(world)
    # Whatever the code under test raises is a finding.
    except Exception as error:
        return world, Failure(world, error)
    return world, None


def shrink(seed: int, failure: Failure) -> tuple[frozenset[int], Failure]:
    """Leave out incidents, one after the other, as long as the seed fails in the same way."""
    without: frozenset[int] = frozenset()
    for incident in reversed(make_plan(seed).incidents):
        smaller = without | {incident.index}
        _, other = try_seed(seed, without=smaller)
        if other is not None and other.kind == failure.kind:
            without, failure = smaller, other
    return without, failure


def report(seed: int, failure: Failure, *, lines: int) -> None:
    """Print what is known of a failure."""
    print(f"\nseed {seed} failed: {failure.told}")
    without, failure = shrink(seed, failure)
    left = [f"{each.index}: {each.kind}" for each in make_plan(seed).incidents if each.index not in without]
    print(f"it still fails with only these incidents: {', '.join(left) or 'none'}")
    if without:
        print(f"(--seed {seed} --without {','.join(map(str, sorted(without)))})")
    world, again = try_seed(seed, without=without, traces=True)
    trace = world.trace or []
    print(f"broker: {world.plan.broker}")
    print("\n".join(["..."] * (len(trace) > lines) + trace[-lines:]))
    if again is None:
        print("it did not fail again: the simulation is not deterministic")
        return
    traceback.print_exception(again.error)


class Chunk(NamedTuple):
    """What came of some seeds, one after the other."""

    done: int
    counts: Counter[str]
    failures: list[tuple[int, str]]


def run_chunk(seeds: range, *, is_patient: bool) -> Chunk:
    """Run seeds in a process that ends with them, and takes their garbage along: looking for it takes a tenth."""
    gc.disable()
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    done = 0
    for seed in seeds:
        world, failure = try_seed(seed)
        done += 1
        counts.update(world.counts)
        if failure is not None:
            failures.append((seed, failure.told))
            if not is_patient:
                break
    return Chunk(done, counts, failures)


def run_seeds(seeds: range, *, jobs: int, lines: int, is_patient: bool = False, seconds: float = math.inf) -> bool:
    """Run seeds, as many as there is time for; tell whether all went well."""
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    failures = done = 0
    try_seed(seeds[0])  # what it imports, the processes inherit
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
        for chunk in pool.imap(functools.partial(run_chunk, is_patient=is_patient), chunks):
            done += chunk.done
            counts.update(chunk.counts)
            failures += len(chunk.failures)
            for seed, told in chunk.failures:
                print(f"seed {seed} failed: {told[:200]}", flush=True)
            if time.perf_counter() - started > seconds or (failures and not is_patient):
                break
    took_s = time.perf_counter() - started
    print(f"{done} seeds in {took_s:.1f} s, {done / took_s:.1f} a second, {failures} failed; in each:")
    print(", ".join(f"{name} {number / done:.2f}" for name, number in sorted(counts.items())), flush=True)
    if failures and not is_patient and lines:
        seed = chunk.failures[0][0]
        _, failure = try_seed(seed)
        if failure is not None:
            report(seed, failure, lines=lines)
    return not failures


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes to share them")
    parser.add_argument("--seed", type=int, help="run only this one, and show its trace")
    parser.add_argument("--without", default="", help="incidents to leave out of it, by number: 0,3,4")
    parser.add_argument(
        "--lines", type=int, default=MAX_LINES, help="lines of a trace to show; with 0 a failure is only named"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing more after this time")
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    options = parser.parse_args()
    if options.seed is not None:
        without = frozenset(int(index) for index in options.without.split(",") if index)
        world, failure = try_seed(options.seed, without=without, traces=True)
        print("\n".join((world.trace or [])[-options.lines :]))
        if failure is not None:
            traceback.print_exception(failure.error)
        return int(failure is not None)
    seeds = range(options.first, options.first + options.seeds)
    is_good = run_seeds(seeds, jobs=options.jobs, lines=options.lines, is_patient=options.all, seconds=options.seconds)
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
