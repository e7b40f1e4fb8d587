"""The same network on the same parameters in NumPy, torch and JAX: each what ``distgrad worker`` runs in one process.

Every worker takes the batch of its rank, so that the three together are one process on the whole batch.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from distgrad_worker import Worker

STEPS = 25
WORKERS = 3
BATCH = 16
N_INPUTS, N_HIDDEN = 4, 8

Arrays = dict[str, np.ndarray[Any, Any]]


def new_parameters() -> Arrays:
    """Return parameters under names that all three know."""
    rng = np.random.default_rng(1)
    return {
        "hidden.kernel": rng.normal(size=(N_INPUTS, N_HIDDEN)),
        "hidden.bias": np.zeros(N_HIDDEN),
        "output.kernel": rng.normal(size=(N_HIDDEN, 1)),
        "output.bias": np.zeros(1),
    }


def batch(step: int, rank: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the inputs and targets of one worker in one step."""
    x = np.random.default_rng([step, rank]).normal(size=(BATCH, N_INPUTS))
    return x, np.sin(x.sum(axis=1, keepdims=True))


def numpy_gradient(p: Arrays, x: Any, y: Any) -> tuple[float, Arrays]:
    """Return the mean squared error and its gradient, by hand."""
    hidden = np.tanh(x @ p["hidden.kernel"] + p["hidden.bias"])
    error = hidden @ p["output.kernel"] + p["output.bias"] - y
    d_error = 2 * error / len(y)
    d_hidden = (d_error @ p["output.kernel"].T) * (1 - hidden**2)
    return float((error**2).mean()), {
        "hidden.kernel": x.T @ d_hidden,
        "hidden.bias": d_hidden.sum(axis=0),
        "output.kernel": hidden.T @ d_error,
        "output.bias": d_error.sum(axis=0),
    }


def rank() -> int:
    return int(os.environ["DISTGRAD_RANK"])


def train_numpy(worker: Worker) -> None:
    worker.initialize(new_parameters())
    for step in range(STEPS):
        loss, gradients = numpy_gradient(worker.pull().parameters, *batch(step, rank()))
        worker.push(gradients, loss=loss)


def train_torch(worker: Worker) -> None:
    import torch

    worker.initialize(new_parameters())
    for step in range(STEPS):
        p = {name: torch.tensor(array, requires_grad=True) for name, array in worker.pull().parameters.items()}
        x, y = map(torch.from_numpy, batch(step, rank()))
        hidden = torch.tanh(x @ p["hidden.kernel"] + p["hidden.bias"])
        loss = ((hidden @ p["output.kernel"] + p["output.bias"] - y) ** 2).mean()
        loss.backward()
        worker.push({name: tensor.grad for name, tensor in p.items()}, loss=loss.item())


def train_jax(worker: Worker) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from distgrad_worker.jax import distributed

    jax.config.update("jax_enable_x64", True)

    def loss(p: Any, x: Any, y: Any) -> Any:
        hidden = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
        return ((hidden @ p["output"]["kernel"] + p["output"]["bias"] - y) ** 2).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    params: Any = {"hidden": {}, "output": {}}
    for name, array in new_parameters().items():
        layer, _, kind = name.partition(".")
        params[layer][kind] = jnp.asarray(array)
    optimizer = distributed(worker)
    state = optimizer.init(params)
    for step in range(STEPS):
        value, gradients = value_and_grad(params, *batch(step, rank()))
        updates, state = optimizer.update(gradients, state, params, value=value)
        params = optax.apply_updates(params, updates)
