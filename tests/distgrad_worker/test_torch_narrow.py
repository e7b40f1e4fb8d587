"""Tests of `distgrad_worker.torch`: models of 16 bits."""

from __future__ import annotations

from typing import Any

import pytest

import distgrad

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes: pip install '.[bfloat16]'")
DistributedOptimizer: Any = pytest.importorskip("distgrad_worker.torch").DistributedOptimizer
models: Any = pytest.importorskip("support.torch_models")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("lr", [0.125, 0.25])  # the broker's, and one that multiplies the gradient
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_is_that_of_float32_rounded_once(dtype: str, lr: float, overlap: bool) -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.125)) as (_, worker):
        model = models.small_cnn().to(getattr(torch, dtype))
        optimizer = DistributedOptimizer(model, worker, lr=lr, overlap=overlap)
        images, labels = models.batches(1, dtype=dtype)[0]
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        wanted = [(p.float() - lr * p.grad.float()).to(p.dtype) for p in model.parameters()]

        optimizer.step()
        optimizer.synchronize()

        for parameter, expected in zip(model.parameters(), wanted, strict=True):
            assert parameter.dtype == expected.dtype
            assert torch.equal(parameter, expected)
        assert worker.pull().parameters["0.weight"].dtype.name == dtype


@pytest.mark.parametrize("rule", [distgrad.SGD(lr=0.02, momentum=0.9), distgrad.Adam(lr=2e-3)])
def test_a_model_of_bfloat16_learns(rule: distgrad.Rule) -> None:
    with models.connected(optimizer=rule) as (_, worker):
        model = models.small_cnn().to(torch.bfloat16)

        losses = models.train(model, DistributedOptimizer(model, worker), models.batches(100, dtype="bfloat16"))

    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_layers_of_different_types_go_together() -> None:
    """As in mixed precision, where normalization stays in float32."""
    with models.connected(optimizer=distgrad.SGD(lr=0.5)) as (_, worker):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3).to(torch.bfloat16), "b": torch.nn.LayerNorm(3)})
        optimizer = DistributedOptimizer(model, worker)
        before = models.values(model)

        model["b"](model["a"](torch.ones(2, 3, dtype=torch.bfloat16)).float()).pow(3).sum().backward()
        optimizer.step()

        assert {name: value.dtype for name, value in models.values(model).items()} == {
            name: value.dtype for name, value in before.items()
        }
        assert not torch.equal(before["b.bias"], model["b"].bias)
