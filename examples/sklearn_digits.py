"""Train scikit-learn's own estimators on handwritten digits: every worker on its own part of the data.

Start a broker without an optimizer, then this on two processes, from the folder of this file::

    distgrad broker --policy sync
    distgrad worker tcp://127.0.0.1:5556 sklearn_digits:train --processes 2

or ``sklearn_digits:train_linear`` for a linear model; on one process with ``python sklearn_digits.py
tcp://127.0.0.1:5556``. Without an address it trains alone. Needs ``pip install ".[sklearn]"`` in the clone.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.neural_network import MLPClassifier

from distgrad_worker import Worker
from distgrad_worker.sklearn import partial_fit, pull

ROUNDS = 60  # of each worker: once over its part of the data in each
CLASSES = range(10)

Data = tuple[np.ndarray, np.ndarray]


def load_data() -> tuple[Data, Data]:
    """Return training and test data: pixels in 0..1, shape (n, 64), and labels 0..9."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return (images[train] / 16, labels[train]), (images[test] / 16, labels[test])


def network() -> Any:
    """Return a network with one hidden layer, not fitted."""
    return MLPClassifier((64,), solver="sgd", learning_rate_init=0.05, batch_size=32, random_state=1)


def linear() -> Any:
    """Return a linear model, not fitted."""
    return SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.02, random_state=1)


def train(worker: Worker, estimator: Any = None) -> Any:
    """Train on this worker's part of the data, once over it between two exchanges; return the estimator."""
    rank, world = int(os.environ.get("DISTGRAD_RANK", "0")), int(os.environ.get("DISTGRAD_WORLD", "1"))
    (x, y), _ = load_data()
    x, y = x[rank::world], y[rank::world]
    estimator = network() if estimator is None else estimator
    for number in range(1, ROUNDS + 1):
        partial_fit(worker, estimator, x, y, classes=CLASSES)
        if number % 10 == 0:
            print(f"round {number} of {ROUNDS}: accuracy {estimator.score(x, y):.1%} on what was learnt from")
    return estimator


def train_linear(worker: Worker) -> Any:
    """Do the same with a linear model."""
    return train(worker, linear())


def train_alone(estimator: Any) -> Any:
    """Train in one process on all data, without a broker; return the estimator."""
    (x, y), _ = load_data()
    for _ in range(ROUNDS):
        estimator.partial_fit(x, y, classes=CLASSES)
    return estimator


if __name__ == "__main__":
    if sys.argv[1:]:
        with Worker(sys.argv[1]) as worker:
            estimator = train(worker)
            pull(worker, estimator)
    else:
        estimator = train_alone(network())
    print(f"test accuracy: {estimator.score(*load_data()[1]):.1%}")
