"""Tests of `distgrad_worker.torch`: the same training as with PyTorch's own optimizers, and whose memory it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import distgrad
from distgrad import Admin, Rule
from distgrad.errors import GradientRefused
from distgrad_broker import Broker
from distgrad_worker import Worker

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
DistributedOptimizer: Any = pytest.importorskip("distgrad_worker.torch").DistributedOptimizer
models: Any = pytest.importorskip("support.torch_models")

STEPS = 200
# Learning rates at which training is stable: beyond, one rounding grows to 0.05 within 200 steps, and PyTorch's own
# fused and plain SGD part just as far.
RULES: list[tuple[Rule, Callable[[Any], Any]]] = [
    (distgrad.SGD(lr=0.02), lambda p: torch.optim.SGD(p, lr=0.02)),
    (distgrad.SGD(lr=0.005, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9)),
    (
        distgrad.SGD(lr=0.005, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    (distgrad.Adam(lr=5e-4), lambda p: torch.optim.Adam(p, lr=5e-4)),
    (distgrad.AdamW(lr=5e-4, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=5e-4, weight_decay=0.1)),
]


def test_one_worker_has_the_losses_of_plain_pytorch() -> None:
    compare_with_plain_pytorch(*RULES[3], "float32", overlap=False)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "overlap"), [("float32", False), ("float32", True), ("float64", False)])
@pytest.mark.parametrize(("rule", "plain"), RULES, ids=["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_one_worker_has_the_losses_of_plain_pytorch_with_every_rule(
    rule: Rule, plain: Callable[[Any], Any], dtype: str, overlap: bool
) -> None:
    compare_with_plain_pytorch(rule, plain, dtype, overlap=overlap)


def compare_with_plain_pytorch(rule: Rule, plain: Callable[[Any], Any], dtype: str, *, overlap: bool) -> None:
    data = models.batches(STEPS, dtype=dtype)
    model = models.small_cnn().to(getattr(torch, dtype))
    expected = models.train(model, plain(model.parameters()), data)

    with models.connected(optimizer=rule) as (_, worker):
        model = models.small_cnn().to(getattr(torch, dtype))
        optimizer = DistributedOptimizer(model, worker, overlap=overlap)
        losses = models.train(model, optimizer, data)
        version = optimizer.version
        optimizer.close()

    assert version == STEPS
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6 if dtype == "float32" else 1e-9)


def test_float64_and_mixed_types_are_trained() -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2).double(), "b": torch.nn.Linear(3, 2)})

    def train(both: Any, optimizer: Any) -> Any:
        x = torch.ones(4, 3)
        for _ in range(5):
            optimizer.zero_grad()
            (both["a"](x.double()).square().mean() + both["b"](x).square().mean()).backward()
            optimizer.step()
        return models.values(both)

    plain = model()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))

    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        ours = model()
        found = train(ours, DistributedOptimizer(ours, worker))

    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)


def test_a_pull_writes_into_the_models_own_memory() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        places = [parameter.data_ptr() for parameter in model.parameters()]
        before = models.values(model)

        models.train(model, optimizer, models.batches(3))

        assert [parameter.data_ptr() for parameter in model.parameters()] == places
        assert all(not torch.equal(before[name], value) for name, value in models.values(model).items())


def test_other_memory_formats_and_shared_memory_stay_what_they_are() -> None:
    def model() -> Any:
        made = models.small_cnn().to(memory_format=torch.channels_last)
        made[-1].share_memory()
        return made

    data = models.batches(20)
    plain = model()
    expected = models.train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data)

    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        ours = model()
        losses = models.train(ours, DistributedOptimizer(ours, worker), data)

    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6)
    assert ours[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert ours[-1].weight.is_shared()


def test_the_first_model_becomes_the_brokers_and_later_ones_take_it() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (broker, worker), Worker(broker.address) as other:
        first, second = models.small_cnn(1), models.small_cnn(2)
        wanted = models.values(first)

        DistributedOptimizer(first, worker)
        DistributedOptimizer(second.named_parameters(), other)

        for model in (first, second):
            assert all(torch.equal(value, wanted[name]) for name, value in models.values(model).items())
        with Admin(broker.address) as admin:
            assert list(admin.get_model_parameters()) == [name for name, _ in first.named_parameters()]


def test_without_names_a_parameter_is_called_by_its_position() -> None:
    with models.connected() as (broker, worker):
        model = models.small_cnn()
        model[0].weight.requires_grad_(False)

        DistributedOptimizer(model.parameters(), worker, lr=0.1)

        with Admin(broker.address) as admin:
            assert list(admin.get_model_parameters()) == ["1", "2", "3", "4", "5"]


def test_parameters_that_an_admin_arranges_anew_are_found_by_their_names() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (broker, worker), Admin(broker.address) as admin:
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        values = admin.get_model_parameters()
        last = {"bias": values.pop("5.bias") + 1, "weight": values.pop("5.weight") + 1}

        admin.set_model_parameters({"5": last, **values})
        with pytest.raises(GradientRefused, match="another layout"):
            models.train(model, optimizer, models.batches(1))
        models.train(model, optimizer, models.batches(1))

        now = admin.get_model_parameters()
        np.testing.assert_array_equal(model[5].weight.detach().numpy(), now["5"]["weight"])
        np.testing.assert_array_equal(model[0].weight.detach().numpy(), now["0.weight"])


def test_tied_parameters_count_once() -> None:
    def tied() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False))
        model[1].weight = model[0].weight
        return model

    def train(model: Any, optimizer: Any) -> Any:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.arange(7)).square().mean().backward()
            optimizer.step()
        return model[1].weight.detach().clone()

    plain = tied()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.5))

    with models.connected(optimizer=distgrad.SGD(lr=0.5)) as (_, worker):
        model = tied()
        found = train(model, DistributedOptimizer(model, worker))

    assert model[1].weight is model[0].weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        before = models.values(model)

        model[0](torch.ones(1, 1, 8, 8)).sum().backward()
        optimizer.step()

        after = models.values(model)
        assert not torch.equal(before["0.weight"], after["0.weight"])
        assert torch.equal(before["5.weight"], after["5.weight"])


def test_a_closure_is_called_once_with_gradients_and_its_loss_is_returned() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        images, labels = models.batches(1)[0]
        calls = []

        def closure() -> Any:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            calls.append(loss)
            return loss

        with torch.no_grad():
            returned = optimizer.step(closure)

        assert [returned] == calls
        assert worker.pull().version == 1


def test_what_a_step_is_told_reaches_the_broker() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (broker, worker), Admin(broker.address) as admin:
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        loss = model(torch.ones(1, 1, 8, 8)).sum()
        loss.backward()

        optimizer.step(loss=loss, examples=7, cursor="c")

        (told,) = admin.workers()
        assert told["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert told["examples"] == 7


def test_a_refused_gradient_is_told_by_its_own_step_and_the_next_one_counts() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        data = models.batches(2)
        before = models.values(model)
        (model(data[0][0]).sum() * float("nan")).backward()

        with pytest.raises(GradientRefused, match=r"'0\.weight'"):
            optimizer.step()

        assert all(torch.equal(value, before[name]) for name, value in models.values(model).items())
        models.train(model, optimizer, data[1:])
        assert optimizer.version == 1


def test_a_version_that_a_backward_pass_needs_is_not_replaced_unnoticed() -> None:
    """As with other optimizers: PyTorch itself refuses to compute gradients of what was changed since."""
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        images, labels = models.batches(1)[0]
        stale = torch.nn.functional.cross_entropy(model(images), labels)
        models.train(model, optimizer, [(images, labels)])

        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shares_memory", [False, True])
def test_a_model_that_is_large_enough_for_shared_memory_trains_as_well(shares_memory: bool, overlap: bool) -> None:
    def train(model: Any, optimizer: Any) -> Any:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 300), 0.1 * step)).square().mean().backward()
            optimizer.step()
        return model.weight.detach().clone()

    def layer() -> Any:
        torch.manual_seed(0)
        return torch.nn.Linear(300, 300)

    plain = layer()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))

    with (
        Broker(optimizer=distgrad.SGD(lr=0.1)) as broker,
        Worker(broker.address, shares_memory=shares_memory) as worker,
    ):
        model = layer()
        optimizer = DistributedOptimizer(model, worker, overlap=overlap)
        train(model, optimizer)
        optimizer.synchronize()

    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-6)
