"""Measure what each policy makes of a slow worker, and what staleness costs: ``python -m benchmarks.stragglers``.

Two questions, both on scikit-learn's handwritten digits with the network of ``examples/digits.py`` and plain SGD with
the same learning rate under every policy:

- *stragglers*: 4 workers, of which one takes ten times as long for a gradient (100 ms against 10 ms, waited and not
  computed, so that the machine's cores do not blur it). How many examples a second go into the parameters, and how
  long until 95 % of the test images are recognised?
- *quality*: 8 workers that push as fast as they can, 4,000 gradients in all. How good are the parameters in the end?

Results go to ``benchmarks/results/stragglers.json``, and a picture of the first question to
``docs/images/stragglers.png``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np

from benchmarks import harness
from distgrad import Admin
from distgrad_worker import Worker

LR = "0.3"
GOAL = 0.95
POLICIES = {
    "sync": ("--policy", "sync"),
    "sync, quorum 3": ("--policy", "sync", "--quorum", "3"),
    "bounded, 4 steps": ("--policy", "bounded", "--bound", "4"),
    "buffered, 4": ("--policy", "buffered", "--buffer-size", "4"),
    "async": (),
    "async, inverse scaling": ("--staleness-scaling", "inverse"),
    "async, square-root scaling": ("--staleness-scaling", "sqrt"),
}
PICTURE = harness.ROOT / "docs" / "images" / "stragglers.png"


def digits() -> Any:
    """Load ``examples/digits.py``."""
    spec = importlib.util.spec_from_file_location("digits", harness.ROOT / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["digits"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work(address: str, rank: int, world: int, pause_s: float, gradients: int, seed: int, end: Event) -> None:
    """Be one worker: pull, compute, take `pause_s` in all, push; until the end."""
    model = digits()
    (x, y), _ = model.load_data()
    x, y = x[rank::world], y[rank::world]
    rng = np.random.default_rng([seed, rank])
    with Worker(address, worker_id=f"w{rank}") as worker:
        worker.initialize(model.new_parameters())
        for _ in range(gradients):
            if end.is_set():
                break
            batch = rng.choice(len(x), model.BATCH, replace=False)
            now = worker.pull()
            if pause_s:
                end.wait(pause_s)
            _, gradient = model.gradient(now.parameters, x[batch], y[batch])
            worker.push(gradient, examples=model.BATCH, base_version=now.version)


def run(
    options: tuple[str, ...], pauses: list[float], gradients: int, seed: int, goal: float, limit_s: float
) -> dict[str, Any]:
    """Train until the goal is reached, the workers are done, or the limit has come."""
    model = digits()
    _, test = model.load_data()
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    reached_s = None
    with harness.Broker("--optimizer", "sgd", "--lr", LR, *options) as broker:
        arguments = [
            (broker.address, rank, len(pauses), pause, gradients, seed, end) for rank, pause in enumerate(pauses)
        ]
        children = [context.Process(target=work, args=each) for each in arguments]
        for child in children:
            child.start()
        with Admin(broker.address) as admin:
            while sum(known["accepted"] > 0 for known in admin.workers()) < len(children):
                time.sleep(0.01)
            started = time.monotonic()
            before = sum(known["examples"] for known in admin.workers())
            while time.monotonic() < started + limit_s and any(child.is_alive() for child in children):
                time.sleep(0.02)
                if model.evaluate(admin.get_model_parameters(), test)[1] >= goal:
                    reached_s = time.monotonic() - started
                    break
            seconds = time.monotonic() - started
            workers = admin.workers()
            end.set()
            for child in children:
                child.join()
            accuracy = model.evaluate(admin.get_model_parameters(), test)[1]
            status = admin.status()
    return {
        "examples_per_s": (sum(known["examples"] for known in workers) - before) / seconds,
        "reached_s": reached_s,
        "accuracy": accuracy,
        "updates": status["version"],
        "superseded": status["superseded"],
        "staleness": statistics.fmean(known["staleness_mean"] for known in workers) if workers else 0.0,
    }


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Draw both measures of the first question, one bar a policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(reversed(results))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axes, key, title in (
        (left, "examples_per_s", "examples a second (more is better)"),
        (right, "reached_s", "seconds to 95 % (less is better)"),
    ):
        values = [results[name][key] or 0.0 for name in names]
        bars = axes.barh(names, values, color="#3b6ea5")
        axes.bar_label(
            bars, [f"{value:,.0f}" if key == "examples_per_s" else f"{value:.1f}" for value in values], padding=3
        )
        axes.set_title(title)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes that mean nothing, to see that it runs")
    tiny = parser.parse_args().tiny
    rounds = 1 if tiny else 3
    stragglers, quality = {}, {}
    for name, options in list(POLICIES.items())[: 2 if tiny else None]:
        pauses = [0.1, 0.01, 0.01, 0.01]
        limit_s, goal = (1.0, 0.2) if tiny else (40.0, GOAL)
        stragglers[name] = middle([run(options, pauses, 10**9, seed, goal, limit_s) for seed in range(rounds)])
        print(f"stragglers  {name:<28}{json.dumps(stragglers[name])}", flush=True)
    for name, options in list(POLICIES.items())[: 2 if tiny else None]:
        count = 10 if tiny else 500
        quality[name] = middle([run(options, [0.0] * 8, count, seed, 2.0, 120.0) for seed in range(rounds)])
        print(f"quality     {name:<28}{json.dumps(quality[name])}", flush=True)
    if not tiny:
        harness.RESULTS.mkdir(exist_ok=True)
        record = {"stragglers": stragglers, "quality": quality, "lr": LR, "rounds": rounds, **harness.environment()}
        (harness.RESULTS / "stragglers.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(stragglers)


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the median of each figure; what was not reached in every run was not reached."""
    keys = runs[0].keys()
    return {
        key: statistics.median(each[key] for each in runs) if all(each[key] is not None for each in runs) else None
        for key in keys
    }


if __name__ == "__main__":
    main()
