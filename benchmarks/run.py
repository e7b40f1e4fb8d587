"""Run every benchmark, or those that are named: ``python -m benchmarks.run [--tiny] [NAME ...]``."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from benchmarks import (
    bench_checkpoint,
    bench_journal,
    bench_leaves,
    bench_many_workers,
    bench_memory,
    bench_pull,
    bench_push_large,
    bench_push_small,
    bench_readers,
    bench_recovery,
    bench_slot,
    bench_start,
    bench_torch_step,
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
    "torch_step": bench_torch_step.measure,
    "slot": bench_slot.measure,
    "leaves": bench_leaves.measure,
    "many_workers": bench_many_workers.measure,
    "start": bench_start.measure,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Benchmarks, each beside its floor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; without, all")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the scripts work; keeps nothing")
    asked = parser.parse_args(arguments)
    unknown = set(asked.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    names = asked.names or list(BENCHMARKS)
    if "torch_step" in names and importlib.util.find_spec("torch") is None:
        if asked.names:
            parser.error("torch_step needs PyTorch: pip install '.[torch]'")
        names.remove("torch_step")
        print("torch_step is left out: PyTorch is not installed", file=sys.stderr)
    results = []
    for name in names:
        measured = BENCHMARKS[name](tiny=asked.tiny)
        harness.keep(measured, name, tiny=asked.tiny)
        results += measured
    print(harness.HEADING)
    for result in results:
        print(harness.row(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
