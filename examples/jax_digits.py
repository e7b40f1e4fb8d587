"""Train a two-layer network on handwritten digits with JAX: every worker on its own part of the data.

Start a broker, then this on two processes, from the folder of this file::

    distgrad broker --optimizer adam --lr 0.002 --policy sync
    distgrad worker tcp://127.0.0.1:5556 jax_digits:train --processes 2

or on one process with ``python jax_digits.py tcp://127.0.0.1:5556``; without an address it trains alone, with optax's
Adam instead of a broker's. Needs ``pip install ".[jax]" scikit-learn`` in the clone of distgrad.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from distgrad_worker import Worker
from distgrad_worker.jax import distributed, pull

HIDDEN = 64  # units in the hidden layer
BATCH = 64  # examples behind one step of all workers together
STEPS = 400  # of each worker
LEARNING_RATE = 0.002

Data = tuple[np.ndarray, np.ndarray]


def load_data() -> tuple[Data, Data]:
    """Return training and test data: float32 pixels in 0..1, shape (n, 64), and labels 0..9."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return (images[train], labels[train]), (images[test], labels[test])


def new_parameters() -> Any:
    """Return the same random parameters in every process."""
    first, second = jax.random.split(jax.random.key(1))
    return {
        "hidden": {"kernel": jax.random.normal(first, (64, HIDDEN)) * (2 / 64) ** 0.5, "bias": jnp.zeros(HIDDEN)},
        "output": {"kernel": jax.random.normal(second, (HIDDEN, 10)) * HIDDEN**-0.5, "bias": jnp.zeros(10)},
    }


def scores(params: Any, x: Any) -> Any:
    """Return one number for each image and digit, shape (n, 10)."""
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss(params: Any, x: Any, y: Any) -> Any:
    """Return the mean cross-entropy of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(scores(params, x), y).mean()


def accuracy(params: Any, data: Data) -> float:
    """Return the fraction of images that get the right label."""
    x, y = data
    return float((scores(params, x).argmax(axis=1) == y).mean())


def fit(optimizer: Any, rank: int, world: int) -> Any:
    """Train on this worker's part of the data with any optimizer that has optax's interface; return the parameters."""
    (x, y), _ = load_data()
    x, y = x[rank::world], y[rank::world]
    rng = np.random.default_rng(rank)
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    params = new_parameters()
    state = optimizer.init(params)
    for step in range(1, STEPS + 1):
        batch = rng.choice(len(x), BATCH // world, replace=False)
        value, grads = value_and_grad(params, x[batch], y[batch])
        updates, state = optimizer.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        if step % 100 == 0:
            print(f"step {step} of {STEPS}: loss {value:.3f}")
    return params


def train(worker: Worker) -> None:
    """Let the broker be the optimizer."""
    fit(distributed(worker), int(os.environ.get("DISTGRAD_RANK", "0")), int(os.environ.get("DISTGRAD_WORLD", "1")))


def train_alone() -> Any:
    """Do the same in one process, without a broker; return the parameters."""
    return fit(optax.with_extra_args_support(optax.adam(LEARNING_RATE)), rank=0, world=1)


if __name__ == "__main__":
    if sys.argv[1:]:
        with Worker(sys.argv[1]) as worker:
            train(worker)
            params = pull(worker, new_parameters())
    else:
        params = train_alone()
    print(f"test accuracy: {accuracy(params, load_data()[1]):.1%}")
