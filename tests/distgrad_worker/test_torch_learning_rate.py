"""Tests of `distgrad_worker.torch.learning_rate`: what schedulers do to a rule that is the broker's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distgrad
from distgrad import Admin
from distgrad.errors import ConfigError, Forbidden
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.key_folders import make_key_folder

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
DistributedOptimizer: Any = pytest.importorskip("distgrad_worker.torch").DistributedOptimizer
models: Any = pytest.importorskip("support.torch_models")

ADAM = distgrad.Adam(lr=1e-3)


def scheduled(model: Any, optimizer: Any) -> list[float]:
    """Train with a learning rate that halves every four steps."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    losses = []
    for batch in models.batches(12, dtype="float64"):
        losses += models.train(model, optimizer, [batch])
        scheduler.step()
    return losses


@pytest.mark.parametrize(
    ("rule", "plain", "lr"),
    [
        (None, lambda p: torch.optim.SGD(p, lr=0.05), 0.05),
        (distgrad.SGD(lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05), None),
        (distgrad.SGD(lr=0.5), lambda p: torch.optim.SGD(p, lr=0.05), 0.05),
        (distgrad.SGD(lr=0.01, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), None),
        (ADAM, lambda p: torch.optim.Adam(p, lr=1e-3), None),
        (ADAM, lambda p: torch.optim.Adam(p, lr=1e-2), 1e-2),
    ],
    ids=["no rule", "sgd", "sgd of another lr", "momentum", "adam", "adam of another lr"],
)
def test_a_scheduler_does_what_it_does_with_plain_pytorch(rule: Any, plain: Any, lr: float | None) -> None:
    model = models.small_cnn().double()
    expected = scheduled(model, plain(model.parameters()))

    with models.connected(optimizer=rule) as (_, worker):
        model = models.small_cnn().double()
        found = scheduled(model, DistributedOptimizer(model, worker, lr=lr))

    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rule", "lr", "warns"), [(None, None, True), (None, 0.1, False), (ADAM, None, False)])
def test_a_broker_without_a_rule_is_told_of_unless_an_lr_is_given(
    caplog: pytest.LogCaptureFixture, rule: Any, lr: float | None, warns: bool
) -> None:
    """Else everything is trained with the raw gradients, and nobody knows why it does not learn."""
    with models.connected(optimizer=rule) as (_, worker):
        DistributedOptimizer(models.small_cnn(), worker, lr=lr)

    assert any("no optimizer" in message for message in caplog.messages) == warns


def test_groups_have_learning_rates_of_their_own_where_the_rule_allows_it() -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        return [
            {"params": list(model[0].named_parameters("0"))},
            {"params": list(model[5].named_parameters("5")), "lr": 0.3},
        ]

    data = models.batches(10)
    plain = models.small_cnn()
    plain[2].requires_grad_(False)
    models.train(plain, torch.optim.SGD(groups(plain), lr=0.1), data)

    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        model[2].requires_grad_(False)
        models.train(model, DistributedOptimizer(groups(model), worker), data)

    for name, value in models.values(plain).items():
        torch.testing.assert_close(models.values(model)[name], value, rtol=0, atol=1e-6)


def test_groups_of_different_learning_rates_are_refused_where_the_rule_has_one() -> None:
    with models.connected(optimizer=ADAM) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(
            [{"params": [model[0].weight]}, {"params": [model[5].weight], "lr": 1}], worker
        )

        with pytest.raises(ConfigError, match=r"'adam' has one lr for all parameters, got 0\.001, 1"):
            models.train(model, optimizer, models.batches(1))


def test_what_an_operator_sets_holds_until_a_scheduler_changes_it() -> None:
    with models.connected(optimizer=ADAM) as (broker, worker), Admin(broker.address) as admin:
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        admin.set_parameters(lr=0.5)

        models.train(model, optimizer, models.batches(1))
        assert admin.status()["optimizer"]["lr"] == 0.5

        optimizer.param_groups[0]["lr"] = 0.25
        models.train(model, optimizer, models.batches(1))
        assert admin.status()["optimizer"]["lr"] == 0.25


def test_with_keys_an_operator_must_help(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    with (
        Broker(keys=keys.folder, optimizer=ADAM) as broker,
        Worker(broker.address, keys=keys.worker) as worker,
        Admin(broker.address, keys=keys.admin) as admin,
    ):
        model = models.small_cnn()
        alone = DistributedOptimizer(model, worker)
        alone.param_groups[0]["lr"] = 0.25
        helped = DistributedOptimizer(model, worker, lr=0.25, admin=admin)

        with pytest.raises(Forbidden, match=r"changed from 0\.001 to 0\.25.*pass admin=Admin"):
            models.train(model, alone, models.batches(1))
        models.train(model, helped, models.batches(1))

        assert admin.status()["optimizer"]["lr"] == 0.25


def test_the_state_dict_carries_learning_rates_and_names() -> None:
    with models.connected(optimizer=distgrad.SGD(lr=0.1)) as (_, worker):
        model = models.small_cnn()
        optimizer = DistributedOptimizer(model, worker)
        optimizer.param_groups[0]["lr"] = 0.01
        state = optimizer.state_dict()
        again = DistributedOptimizer(model, worker)

        again.load_state_dict(state)

        assert state["state"] == {}
        assert state["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
        assert again.param_groups[0]["lr"] == 0.01
