"""Synchronous steps of a fixed set of workers: the same as one process on the whole batch, whatever the order."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import distgrad
from distgrad.codec import encode
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.policies import Synchronous
from support.core_kit import Kit

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install '.[demo]'")

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ("w0", "w1", "w2", "w3")
STEPS = 200
BATCH = 64
RULES = {"sgd": distgrad.SGD(lr=0.1, momentum=0.9), "adam": distgrad.Adam(lr=0.001)}


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_of_this_test", ROOT / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(digits: ModuleType, dtype: Any) -> dict[str, Any]:
    return {name: value.astype(dtype) for name, value in digits.new_parameters().items()}


def parameters_of(holder: ParameterHolder) -> Any:
    assert holder.storage is not None
    assert holder.layout is not None
    return holder.layout.nest(holder.layout.views(holder.storage.arenas))


def train(digits: ModuleType, rule: distgrad.Rule, seed: int, threads: int, steps: int, dtype: Any) -> Kit:
    """Run a core under `sync` with a fixed set whose gradients arrive in an order drawn from the seed."""
    nest = start(digits, dtype)
    layout = Layout.of(nest)
    kit = Kit(layout, policy=Synchronous(workers=len(WORKERS)), rule=rule)
    kit.holder._executor.threads = threads
    kit.holder.set_nest(nest)
    order = np.random.default_rng(seed)
    for worker in WORKERS:
        kit.hello(worker)
    for worker in WORKERS:
        kit.beat(worker)  # all have heard of their smaller shares now
    for step, shards in enumerate(batches(digits, dtype, steps), start=1):
        parameters = parameters_of(kit.holder)
        gradients = [digits.gradient(parameters, x, y)[1] for x, y in shards]
        for worker in order.permutation(len(WORKERS)):
            parts = [bytes(part) for part in encode(layout, layout.pack_gradient(gradients[worker]))]
            name = kit.core.name
            kit.push(step, worker=WORKERS[worker], layout=layout, parts=parts, base=list(name))
            kit.work()
        assert kit.holder.version == step
    return kit


def batches(digits: ModuleType, dtype: Any, steps: int) -> Any:
    """For each step one equal shard of the batch for every worker."""
    (x, y), _ = digits.load_data()
    rng = np.random.default_rng(5)
    for _ in range(steps):
        rows = rng.choice(len(x), BATCH, replace=False)
        yield [(x[part].astype(dtype), y[part]) for part in np.split(rows, len(WORKERS))]


@pytest.mark.parametrize("name", RULES)
def test_a_fixed_set_gives_bit_for_bit_what_a_sum_in_the_same_order_gives(digits: ModuleType, name: str) -> None:
    kits = [train(digits, RULES[name], seed, threads, STEPS, np.float32) for seed, threads in ((0, 1), (1, 2), (2, 4))]
    nest = start(digits, np.float32)
    layout = Layout.of(nest)
    reference = ParameterHolder(rule=RULES[name], executor="numpy")
    reference.set_nest(nest)
    for shards in batches(digits, np.float32, STEPS):
        parameters = parameters_of(reference)
        gradients = [layout.pack_gradient(digits.gradient(parameters, x, y)[1])[0] for x, y in shards]
        quarter = np.float32(0.25)
        total: np.ndarray[Any, Any] = gradients[0] * quarter
        for gradient in gradients[1:]:
            total = total + gradient * quarter
        reference.apply([total])

    assert reference.storage is not None
    for kit in kits:
        assert kit.holder.storage is not None
        assert kit.holder.storage.arenas[0].tobytes() == reference.storage.arenas[0].tobytes()


@pytest.mark.parametrize("name", RULES)
def test_a_fixed_set_agrees_with_training_on_the_whole_batch(digits: ModuleType, name: str) -> None:
    kit = train(digits, RULES[name], 0, 1, STEPS, np.float32)
    whole = ParameterHolder(rule=RULES[name], executor="numpy")
    whole.set_nest(start(digits, np.float32))
    layout = whole.layout
    assert layout is not None
    for shards in batches(digits, np.float32, STEPS):
        x, y = (np.concatenate(column) for column in zip(*shards, strict=True))
        whole.apply(layout.pack_gradient(digits.gradient(parameters_of(whole), x, y)[1]))

    ours, theirs = parameters_of(kit.holder), parameters_of(whole)
    for leaf in theirs:
        assert np.linalg.norm(ours[leaf] - theirs[leaf]) <= 1e-6 * np.linalg.norm(theirs[leaf])
