"""Train on handwritten digits with few exchanges (DiLoCo): each worker takes many steps of its own between two of them.

A worker takes `LOCAL_STEPS` steps with AdamW and pushes how far it has come, `start - now`. To the broker that is a
gradient: SGD with Nesterov momentum makes one step of the mean of all, and every worker goes on from there (Douillard
et al. 2023, https://arxiv.org/abs/2311.08105). Start a broker, then this on two processes, from this file's folder::

    distgrad broker --policy sync --workers 2 --optimizer sgd --lr 0.7 --momentum 0.9 --nesterov
    distgrad worker tcp://127.0.0.1:5556 local_steps:train --processes 2 --id local

An exchange is needed every 20 batches instead of every batch. Needs scikit-learn.
"""

from __future__ import annotations

import os

import numpy as np
from digits import BATCH, Arrays, evaluate, gradient, load_data, new_parameters

from distgrad_worker import Worker

EXCHANGES = 40  # of each worker
LOCAL_STEPS = 20  # of each worker between two exchanges
LEARNING_RATE, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.99, 1e-8, 0.01


class AdamW:
    """The inner optimizer; its state stays with the worker, and lives on from one exchange to the next."""

    def __init__(self, parameters: Arrays) -> None:
        self.m = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.v = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.steps = 0

    def step(self, parameters: Arrays, grads: Arrays) -> None:
        """Change the parameters in place (Loshchilov and Hutter 2019)."""
        self.steps += 1
        for name, grad in grads.items():
            self.m[name] += (1 - BETA1) * (grad - self.m[name])
            self.v[name] += (1 - BETA2) * (grad * grad - self.v[name])
            mean = self.m[name] / (1 - BETA1**self.steps)
            spread = np.sqrt(self.v[name] / (1 - BETA2**self.steps)) + EPS
            parameters[name] -= LEARNING_RATE * (mean / spread + DECAY * parameters[name])


def train(worker: Worker) -> None:
    """Take steps alone, push the way, go on from where all have come together; over and over."""
    rank, world = int(os.environ.get("DISTGRAD_RANK", "0")), int(os.environ.get("DISTGRAD_WORLD", "1"))
    (x, y), test = load_data()
    x, y = x[rank::world], y[rank::world]  # this worker's part
    rng = np.random.default_rng(rank)
    worker.initialize(new_parameters())
    inner = AdamW(new_parameters())
    start = worker.pull().parameters
    for exchange in range(1, EXCHANGES + 1):
        now = {name: array.copy() for name, array in start.items()}
        for _ in range(LOCAL_STEPS):
            batch = rng.choice(len(x), BATCH, replace=False)
            loss, grads = gradient(now, x[batch], y[batch])
            inner.step(now, grads)
        way = {name: array - now[name] for name, array in start.items()}
        start = worker.push_pull(way, loss=loss, examples=LOCAL_STEPS * BATCH).parameters
        if exchange % 10 == 0:
            print(f"exchange {exchange} of {EXCHANGES}: loss {loss:.3f}, test accuracy {evaluate(start, test)[1]:.1%}")
