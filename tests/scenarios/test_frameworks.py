"""Several frameworks train one model together, and the examples of each do as well as their twins in one process."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from distgrad import Admin
from distgrad_worker import Worker
from support import three_frameworks
from support.broker_process import broker_process
from support.processes import Process, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ONE_POINT = 0.01
TIME_S = 240.0


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_of_this_test", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alone(steps: int) -> three_frameworks.Arrays:
    """Train in this process, with NumPy, on the whole batch of all three workers."""
    parameters = three_frameworks.new_parameters()
    for step in range(steps):
        batches = [three_frameworks.batch(step, rank) for rank in range(three_frameworks.WORKERS)]
        x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        _, gradients = three_frameworks.numpy_gradient(parameters, x, y)
        parameters = {name: array - 0.1 * gradients[name] for name, array in parameters.items()}
    return parameters


def test_numpy_torch_and_jax_train_one_model_together() -> None:
    """The first offer may be any one's; by its names each finds its leaves, and the steps are those of one process."""
    for name in ("jax", "optax", "torch"):
        pytest.importorskip(name, reason="needs torch and JAX: pip install '.[jax]' torch")
    targets = ("train_numpy", "train_torch", "train_jax")
    folder = Path(three_frameworks.__file__).parent

    with broker_process("--policy", "sync", "--workers", "3", "--optimizer", "sgd", "--lr", "0.1") as (address, _):
        with ExitStack() as stack:
            workers = [
                stack.enter_context(
                    Process(
                        *("worker", address, f"three_frameworks:{target}"),
                        *("--id", target, "--first-rank", rank, "--world", 3),
                        cwd=folder,
                    )
                )
                for rank, target in enumerate(targets)
            ]
            for process in workers:
                assert process.wait(TIME_S) == 0, process.output()
        with Admin(address) as admin:
            status, trained = admin.status(), named(admin.get_model_parameters())

    assert (status["version"], status["applied"]) == (three_frameworks.STEPS, 3 * three_frameworks.STEPS)
    for name, array in alone(three_frameworks.STEPS).items():
        np.testing.assert_allclose(trained[name], array, rtol=1e-9, atol=1e-12)


def named(parameters: Any) -> three_frameworks.Arrays:
    """Return all leaves by their names, whoever's nest the broker has."""
    flat: three_frameworks.Arrays = {}
    for key, value in parameters.items():
        flat |= {f"{key}.{inner}": leaf for inner, leaf in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def test_the_example_with_jax_does_as_well_as_its_twin() -> None:
    for name in ("jax", "optax", "sklearn"):
        pytest.importorskip(name, reason="needs JAX and scikit-learn: pip install '.[jax,sklearn]'")
    digits = example("jax_digits")
    _, test_data = digits.load_data()

    options = ("--optimizer", "adam", "--lr", digits.LEARNING_RATE, "--policy", "sync", "--workers", "2")
    with broker_process(*map(str, options)) as (address, _), Admin(address) as admin:
        done = run("worker", address, "jax_digits:train", "--processes", "2", cwd=EXAMPLES, timeout=TIME_S)
        assert done.returncode == 0, done.stdout + done.stderr
        assert admin.status()["version"] == digits.STEPS
        together = digits.accuracy(admin.get_model_parameters(), test_data)

    assert together >= digits.accuracy(digits.train_alone(), test_data) - ONE_POINT


@pytest.mark.parametrize(("target", "make"), [("train", "network"), ("train_linear", "linear")])
def test_the_example_with_scikit_learn_does_as_well_as_its_twin(target: str, make: str) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install '.[sklearn]'")
    from distgrad_worker.sklearn import pull

    digits = example("sklearn_digits")
    _, test_data = digits.load_data()
    twin = digits.train_alone(getattr(digits, make)())
    expected = twin.score(*test_data)

    with broker_process("--policy", "sync", "--workers", "2") as (address, _):
        options = ("--processes", "2", "--id", "member")
        done = run("worker", address, f"sklearn_digits:{target}", *options, cwd=EXAMPLES, timeout=TIME_S)
        assert done.returncode == 0, done.stdout + done.stderr
        with Worker(address, worker_id="member-0") as worker:
            trained = pull(worker, twin)

    assert trained.version == digits.ROUNDS
    assert twin.score(*test_data) >= expected - ONE_POINT
