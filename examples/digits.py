"""Train a two-layer network on handwritten digits: every worker on its own part of the data.

Start a broker, then this on four processes, from the folder of this file::

    distgrad broker --optimizer adam --lr 0.0005
    distgrad worker tcp://127.0.0.1:5556 digits:train --processes 4

or on one process with ``python digits.py tcp://127.0.0.1:5556``. Needs scikit-learn.
"""

from __future__ import annotations

import os
import sys

import numpy as np
from sklearn.datasets import load_digits

from distgrad_worker import Worker

HIDDEN = 64  # units in the hidden layer
BATCH = 32  # examples behind one gradient
GRADIENTS = 4000  # of all workers together

Arrays = dict[str, np.ndarray]
Data = tuple[np.ndarray, np.ndarray]


def load_data() -> tuple[Data, Data]:
    """Return training and test data: float32 pixels in 0..1, shape (n, 64), and labels 0..9."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return (images[train], labels[train]), (images[test], labels[test])


def new_parameters() -> Arrays:
    """Return the same random parameters in every process."""
    rng = np.random.default_rng(1)
    w1 = rng.normal(0, np.sqrt(2 / 64), (64, HIDDEN)).astype(np.float32)
    w2 = rng.normal(0, np.sqrt(1 / HIDDEN), (HIDDEN, 10)).astype(np.float32)
    return {"w1": w1, "b1": np.zeros(HIDDEN, np.float32), "w2": w2, "b2": np.zeros(10, np.float32)}


def forward(p: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hidden layer and the probabilities of the ten digits."""
    hidden = np.maximum(x @ p["w1"] + p["b1"], 0)
    scores = hidden @ p["w2"] + p["b2"]
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, scores / scores.sum(axis=1, keepdims=True)


def gradient(p: Arrays, x: np.ndarray, y: np.ndarray) -> tuple[float, Arrays]:
    """Return the mean cross-entropy of a batch and its gradient."""
    hidden, probabilities = forward(p, x)
    rows = np.arange(len(y))
    loss = float(-np.log(probabilities[rows, y] + 1e-9).mean())
    probabilities[rows, y] -= 1
    d_scores = probabilities / len(y)
    d_hidden = (d_scores @ p["w2"].T) * (hidden > 0)
    return loss, {"w1": x.T @ d_hidden, "b1": d_hidden.sum(0), "w2": hidden.T @ d_scores, "b2": d_scores.sum(0)}


def evaluate(p: Arrays, data: Data) -> tuple[float, float]:
    """Return the mean cross-entropy, and the fraction of images that get the right label."""
    x, y = data
    _, probabilities = forward(p, x)
    loss = float(-np.log(probabilities[np.arange(len(y)), y] + 1e-9).mean())
    return loss, float((probabilities.argmax(axis=1) == y).mean())


def train(worker: Worker) -> None:
    """Pull, compute a gradient, push it; over and over."""
    rank, world = int(os.environ.get("DISTGRAD_RANK", "0")), int(os.environ.get("DISTGRAD_WORLD", "1"))
    (x, y), _ = load_data()
    x, y = x[rank::world], y[rank::world]  # this worker's part
    rng = np.random.default_rng(rank)
    worker.initialize(new_parameters())
    steps = GRADIENTS // world
    for step in range(1, steps + 1):
        batch = rng.choice(len(x), BATCH, replace=False)
        now = worker.pull()
        loss, grads = gradient(now.parameters, x[batch], y[batch])
        worker.push(grads, loss=loss, examples=BATCH, base_version=now.version)
        if step % 250 == 0:
            print(f"step {step} of {steps}: loss {loss:.3f}")


if __name__ == "__main__":
    with Worker(sys.argv[1]) as worker:
        train(worker)
        worker.flush()
        print(f"test accuracy: {evaluate(worker.pull().parameters, load_data()[1])[1]:.1%}")
