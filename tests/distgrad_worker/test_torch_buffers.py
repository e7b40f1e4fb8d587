"""Tests of `distgrad_worker.torch.buffers`: batch-norm statistics of several workers."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import distgrad
from distgrad.errors import ConfigError, LayoutError
from distgrad_worker import Worker

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
adapter: Any = pytest.importorskip("distgrad_worker.torch")
models: Any = pytest.importorskip("support.torch_models")


def norm(mean: float) -> Any:
    layer = torch.nn.BatchNorm1d(2)
    layer.running_mean.fill_(mean)
    return layer


def test_without_a_policy_each_worker_keeps_its_own() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (broker, first), Worker(broker.address) as second:
        one, other = models.small_cnn(norm=True), models.small_cnn(norm=True)
        adapter.DistributedOptimizer(other, second)
        models.train(one, adapter.DistributedOptimizer(one, first), models.batches(2))

    assert one[4].running_mean.abs().max() > 0
    assert other[4].running_mean.abs().max() == 0


def test_average_is_the_mean_of_all_workers_buffers_after_each_step() -> None:
    with models.connected(policy="sync", workers=2) as (broker, first), Worker(broker.address, timeout=20) as second:
        layers = [norm(0), norm(7)]
        shared = [adapter.SharedBuffers(layers[0], first), adapter.SharedBuffers(layers[1], second)]
        assert layers[1].running_mean.tolist() == [0, 0]  # the first one's
        layers[0].running_mean.fill_(1)
        layers[1].running_mean.fill_(4)

        other = threading.Thread(target=shared[1].synchronize)
        other.start()
        shared[0].synchronize()
        other.join()

    assert [layer.running_mean.tolist() for layer in layers] == [[2.5, 2.5]] * 2
    assert [layer.running_var.tolist() for layer in layers] == [[1, 1]] * 2


def test_first_is_what_the_first_worker_has() -> None:
    with models.connected() as (broker, first), Worker(broker.address, timeout=20) as second:
        layers = [norm(0), norm(7)]
        shared = [
            adapter.SharedBuffers(layers[0], first, "first"),
            adapter.SharedBuffers(layers[1], second, "first", is_first=False),
        ]
        layers[0].running_mean.fill_(1)
        layers[1].running_mean.fill_(4)

        shared[0].synchronize()
        shared[1].synchronize()

    assert [layer.running_mean.tolist() for layer in layers] == [[1, 1]] * 2


def test_a_step_of_the_optimizer_shares_them() -> None:
    with models.connected(optimizer=distgrad.Adam()) as (_, worker), models.connected() as (_, for_buffers):
        model = models.small_cnn(norm=True)
        buffers = adapter.SharedBuffers(model, for_buffers)
        optimizer = adapter.DistributedOptimizer(model, worker, buffers=buffers)

        models.train(model, optimizer, models.batches(3))

        shared = for_buffers.pull()
        assert shared.version == 3
        torch.testing.assert_close(torch.from_numpy(shared.parameters["4.running_mean"]), model[4].running_mean)
        assert model[4].num_batches_tracked == 3


def test_what_cannot_work_is_refused() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        with pytest.raises(ConfigError, match="one of average, first, got 'mean'"):
            adapter.SharedBuffers(norm(0), worker, "mean")
        with pytest.raises(ConfigError, match="must have no rule"):
            adapter.SharedBuffers(norm(0), worker)
    with models.connected(policy="sync") as (_, worker):
        with pytest.raises(ConfigError, match="must have --policy async"):
            adapter.SharedBuffers(norm(0), worker, "first")
        with pytest.raises(LayoutError, match="no floating-point buffer"):
            adapter.SharedBuffers(torch.nn.Linear(1, 1), worker)
        adapter.SharedBuffers(norm(0), worker)
        with pytest.raises(LayoutError, match=r"no 'running_mean' of shape \(3,\)"):
            adapter.SharedBuffers(torch.nn.BatchNorm1d(3), worker)
