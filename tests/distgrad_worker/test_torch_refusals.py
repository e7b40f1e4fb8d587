"""Tests of `distgrad_worker.torch`: what it does not take, and how it says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import distgrad
from distgrad.errors import ConfigError, GradientRefused, LayoutError, StateError
from distgrad_worker import Worker
from distgrad_worker.slot import Slot
from support.broker_process import wait_until

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
DistributedOptimizer: Any = pytest.importorskip("distgrad_worker.torch").DistributedOptimizer
models: Any = pytest.importorskip("support.torch_models")


@pytest.fixture
def worker() -> Iterator[Worker]:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, connected):
        yield connected


def parameter(*shape: int, dtype: Any = None) -> Any:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


def tied_by_memory() -> Any:
    whole = torch.zeros(4)
    return [("a", torch.nn.Parameter(whole[:3])), ("b", torch.nn.Parameter(whole[2:]))]


def frozen() -> Any:
    return [("a", torch.nn.Parameter(torch.zeros(1), requires_grad=False))]


def twice() -> Any:
    one = parameter(1)
    return [("a", one), ("b", one)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [("a", parameter(1, dtype=torch.complex64))], "'a' must be one of float32, .*got complex64"),
        (lambda: [("a", torch.nn.Parameter(torch.zeros(2, device="meta")))], "'a' has no values yet"),
        (lambda: torch.nn.LazyLinear(3), "'weight' has no values yet"),
        (lambda: [("a", torch.nn.Parameter(torch.zeros(2, 2).to_sparse()))], "'a' must be dense"),
        (lambda: [("a", parameter(1)), ("a", parameter(2))], "two parameters are called 'a'"),
        (tied_by_memory, "'a' and 'b' share memory: tie them"),
        (twice, "given twice"),
        (frozen, "no parameter that requires a gradient"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused_by_name(worker: Worker, make: Any, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        DistributedOptimizer(make(), worker)


def test_neighbours_in_one_piece_of_memory_are_no_ties(worker: Worker) -> None:
    whole = torch.arange(4.0)
    first, second = torch.nn.Parameter(whole[:2]), torch.nn.Parameter(whole[2:])

    DistributedOptimizer([("a", first), ("b", second)], worker)

    assert first.tolist() == [0, 1]
    assert second.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("broker", "words"),
    [
        ({"b": np.zeros(2, np.float32)}, "have no 'a', which this model trains"),
        ({"a": np.zeros(3, np.float32)}, r"broker's 'a' is float32 of shape \(3,\), this model's is float32 .*\(2,\)"),
        ({"a": np.zeros(2, np.float64)}, "broker's 'a' is float64"),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(1)}, "trains 'b', which this model has not, or has frozen"),
    ],
)
def test_a_broker_with_another_model_is_refused(broker: dict[str, Any], words: str) -> None:
    with models.connected(parameters=broker) as (_, worker), pytest.raises(LayoutError, match=words):
        DistributedOptimizer([("a", parameter(2))], worker, lr=0.1)


def test_what_the_broker_carries_and_nobody_trains_does_not_matter() -> None:
    parameters = {"a": np.ones(2, np.float32), "epoch": np.array(3)}
    with models.connected(parameters=parameters) as (_, worker):
        own = parameter(2)
        optimizer = DistributedOptimizer([("a", own)], worker, lr=0.5)

        own.grad = torch.ones(2)
        optimizer.step()

        assert own.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1}, "lr must be at least 0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"overlap": True}, "pass the model"),
    ],
)
def test_impossible_arguments_are_refused(worker: Worker, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DistributedOptimizer([parameter(1)], worker, **arguments)


def test_settings_of_a_rule_belong_to_the_broker(worker: Worker) -> None:
    with pytest.raises(ConfigError, match="a group may set lr only, got betas, weight_decay"):
        DistributedOptimizer([{"params": [parameter(1)], "weight_decay": 0.1, "betas": (0, 0)}], worker)


def test_parameters_cannot_be_added_later(worker: Worker) -> None:
    optimizer = DistributedOptimizer([parameter(1)], worker)

    with pytest.raises(StateError, match="make a new DistributedOptimizer"):
        optimizer.add_param_group({"params": [parameter(2)]})


def test_a_sparse_gradient_is_refused_with_the_way_out(worker: Worker) -> None:
    model = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = DistributedOptimizer(model, worker)
    model(torch.arange(2)).sum().backward()

    with pytest.raises(LayoutError, match=r"'weight' is sparse.*sparse=False"):
        optimizer.step()


def test_a_step_without_any_gradient_is_a_mistake(worker: Worker) -> None:
    optimizer = DistributedOptimizer(models.small_cnn(), worker)

    with pytest.raises(StateError, match=r"call loss\.backward"):
        optimizer.step()


def test_the_state_of_another_optimizer_is_not_taken(worker: Worker) -> None:
    model = models.small_cnn()
    other = torch.optim.Adam(model.parameters())
    models.train(model, other, models.batches(1))
    optimizer = DistributedOptimizer(model.parameters(), worker)

    with pytest.raises(ConfigError, match="here the broker keeps it"):
        optimizer.load_state_dict(other.state_dict())


def test_a_refusal_that_is_told_before_a_step_looks_is_that_steps(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = DistributedOptimizer(torch.nn.Linear(2, 1), worker)
    push_pull = Slot.push_pull

    def late(slot: Slot, *args: Any, **keys: Any) -> Any:
        snapshot = push_pull(slot, *args, **keys)
        number = slot.number
        assert number is not None
        wait_until(lambda: worker.settled >= number)
        return snapshot

    monkeypatch.setattr(Slot, "push_pull", late)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, float("nan"))

    with pytest.raises(GradientRefused):
        optimizer.step()
