"""A small convolutional network, its data, and one way to train it, for tests of the PyTorch adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from distgrad_broker import Broker
from distgrad_worker import Worker

# Sums are then made in one order; and a model this small only loses by threads, most of all on cores that are busy.
torch.set_num_threads(1)


def small_cnn(seed: int = 0, *, norm: bool = False) -> Any:
    """Make the network; the same values for the same seed."""
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU()]
    if norm:
        layers.append(torch.nn.BatchNorm2d(8))
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8 * 16, 10))


def batches(count: int, size: int = 16, seed: int = 1, dtype: str = "float32") -> list[tuple[Any, Any]]:
    """Make images whose label can be learned: which tenth of the range their mean is in."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        labels = rng.integers(0, 10, size)
        images = rng.normal(0, 0.3, (size, 1, 8, 8)) + labels[:, None, None, None] / 5
        made.append((torch.from_numpy(images).to(getattr(torch, dtype)), torch.from_numpy(labels)))
    return made


def train(model: Any, optimizer: Any, data: list[tuple[Any, Any]]) -> list[float]:
    """Make one step for each batch; return the losses."""
    losses = []
    for images, labels in data:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: Any) -> dict[str, Any]:
    """Copy what a model's ``state_dict`` has."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@contextmanager
def connected(**config: Any) -> Iterator[tuple[Broker, Worker]]:
    """Run a broker in this process, and a worker of it."""
    with Broker(**config) as broker, Worker(broker.address, timeout=20) as worker:
        yield broker, worker
