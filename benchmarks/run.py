"""Run every benchmark, or those that are named: ``python -m benchmarks.run [--tiny] [NAME ...]``."""

from __future__ import annotations

import argparse
import sys

from benchmarks import (
    bench_checkpoint,
    bench_journal,
    bench_memory,
    bench_pull,
    bench_push_large,
    bench_push_small,
    bench_readers,
    bench_recovery,
    harness,
)

BENCHMARKS = {
    "checkpoint": bench_checkpoint.measure,
    "journal": bench_journal.measure,
    "push_large": bench_push_large.measure,
    "push_small": bench_push_small.measure,
    "pull": bench_pull.measure,
    "memory": bench_memory.measure,
    "readers": bench_readers.measure,
    "recovery": bench_recovery.measure,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Benchmarks, each beside its floor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; without, all")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the scripts work; keeps nothing")
    asked = parser.parse_args(arguments)
    unknown = set(asked.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    results = []
    for name in asked.names or BENCHMARKS:
        measured = BENCHMARKS[name](tiny=asked.tiny)
        harness.keep(measured, name, tiny=asked.tiny)
        results += measured
    print(harness.HEADING)
    for result in results:
        print(harness.row(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
