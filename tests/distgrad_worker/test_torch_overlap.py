"""Tests of `distgrad_worker.torch.ahead`: a step that goes on while the program does."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import distgrad
from distgrad import Admin
from distgrad.errors import GradientRefused, StateError

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
DistributedOptimizer: Any = pytest.importorskip("distgrad_worker.torch").DistributedOptimizer
models: Any = pytest.importorskip("support.torch_models")


def backward(model: Any) -> None:
    images, labels = models.batches(1)[0]
    torch.nn.functional.cross_entropy(model(images), labels).backward()


def test_a_step_returns_before_its_gradient_counts_and_the_next_forward_pass_waits_for_it() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (broker, worker), Admin(broker.address) as admin:
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker, overlap=True)
        before = models.values(model)
        backward(model)
        admin.stop()

        optimizer.step()

        assert admin.status()["version"] == 0  # it has returned nevertheless
        began, ended = threading.Event(), threading.Event()

        def forward() -> None:
            began.set()
            model(torch.zeros(1, 1, 8, 8))
            ended.set()

        waiting = threading.Thread(target=forward)
        waiting.start()
        began.wait()
        assert not ended.wait(0.05)
        admin.start()
        waiting.join()
        after = models.values(model)
        assert all(not torch.equal(value, after[name]) for name, value in before.items())
        assert optimizer.version == 1


def test_a_state_dict_has_what_the_last_step_brought() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker, overlap=True)
        backward(model)
        optimizer.step()

        saved = models.values(model)

        for name, array in worker.pull().parameters.items():
            assert (saved[name].numpy() == array).all()


def test_a_gradient_that_is_changed_after_it_was_copied_is_refused() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker, overlap=True)
        backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

        with pytest.raises(StateError, match=r"was changed between backward\(\) and step\(\)"):
            optimizer.step()


def test_several_backward_passes_are_refused() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        DistributedOptimizer(model, worker, overlap=True)
        backward(model)

        with pytest.raises(StateError, match="second gradient before step"):
            backward(model)


def test_without_overlap_they_add_up_and_clipping_counts() -> None:
    def train(model: Any, optimizer: Any) -> Any:
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            backward(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return models.values(model)

    plain = models.small_cnn()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))

    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        found = train(model, DistributedOptimizer(model, worker))

    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_what_goes_wrong_meanwhile_is_raised_where_it_is_waited_for() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker, overlap=True)
        (model(torch.ones(1, 1, 8, 8)).sum() * float("inf")).backward()
        optimizer.step()

        with pytest.raises(GradientRefused, match="holds"):
            model(torch.ones(1, 1, 8, 8))

        optimizer.synchronize()  # told once
        assert optimizer.version == 0


def test_parameters_that_a_backward_pass_left_out_count_as_zero() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker, overlap=True)
        before = models.values(model)
        model[0](torch.ones(1, 1, 8, 8)).sum().backward()

        optimizer.step()

        after = models.values(model)
        assert not torch.equal(before["0.weight"], after["0.weight"])
        assert torch.equal(before["5.weight"], after["5.weight"])


def test_a_closed_optimizer_leaves_the_model_alone() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker, overlap=True)

        optimizer.close()

        backward(model)
        backward(model)
        assert len(model._forward_pre_hooks) == 0


def test_gradients_that_are_cleared_are_not_sent() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker, overlap=True)
        backward(model)

        optimizer.zero_grad()

        with pytest.raises(StateError, match="no parameter has a gradient"):
            optimizer.step()
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.version == 1
