"""Ray as in its documentation's parameter-server example: server and workers are actors, the driver moves references.

Under W1 and W2 (the example's asynchronous part) the driver takes whichever gradient is ready, has the server apply
it, and gives its worker the parameters that this returns. Under W3 (the synchronous part) the server gets the gradients
of all workers at once. Arrays travel through Ray's object store, in shared memory; workers read the parameters there,
without a copy. Where the example adds up copies of the gradients, ours applies them one by one, which is faster. W4 is
one call of the server by the driver, with the gradient as its argument.

Ray runs its workers at a lower priority (nice 15); here at the same as everyone's.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.peers.contender import PEER, Contender, needs
from benchmarks.peers.team import Report, Team, take_part
from benchmarks.peers.update import Update, zeros
from benchmarks.peers.work import Array, Cell, Gradients

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class ParameterServer:
    """The actor that holds the parameters.

    Parameters
    ----------
    cell : Cell
        What is done.
    """

    def __init__(self, cell: Cell) -> None:
        self._update = Update(cell)

    def apply_gradients(self, *gradients: Array) -> Array:
        """Apply them one after the other."""
        for gradient in gradients:
            self._update.apply(gradient)
        return self._update.parameters

    def get_weights(self) -> Array:
        """Return the parameters."""
        return self._update.parameters


class DataWorker:
    """The actor that writes gradients.

    Parameters
    ----------
    cell : Cell
        What is done.
    rank : int
        From 0.
    """

    def __init__(self, cell: Cell, rank: int) -> None:
        self._gradients = Gradients(cell, rank)
        self._gradient = zeros(cell.size)
        self._lag = 0

    def compute_gradients(self, weights: Array) -> Array:
        """Write the next gradient."""
        self._lag = max(self._lag, self._gradients.lag(weights))
        self._gradients.write(self._gradient)
        return self._gradient

    def told(self) -> tuple[int, int]:
        """Tell how many gradients there were, and how many were missing at most in what came back."""
        return self._gradients.sent, self._lag


class Driver:
    """The program of the example.

    Parameters
    ----------
    cell : Cell
        What is done.
    ray : module
        Initialised.
    """

    def __init__(self, cell: Cell, ray: Any) -> None:
        self._cell, self._ray = cell, ray
        self._server = ray.remote(ParameterServer).remote(cell)
        self._workers = [ray.remote(DataWorker).remote(cell, rank) for rank in range(cell.workers)]
        self._own = Gradients(cell, 0)
        self._gradient = zeros(cell.size)
        self._weights = self._server.get_weights.remote()
        ray.get([self._weights, *[worker.told.remote() for worker in self._workers]])

    def run(self, count: int) -> list[float]:
        """Do `count` exchanges for each worker."""
        if self._cell.work == "W4":
            return [self._call() for _ in range(count)]
        if self._cell.steps_together:
            for _ in range(count):
                of_step = [worker.compute_gradients.remote(self._weights) for worker in self._workers]
                self._weights = self._server.apply_gradients.remote(*of_step)
            self._ray.wait([self._weights])
            return []
        gradients = {worker.compute_gradients.remote(self._weights): worker for worker in self._workers}
        for left in reversed(range(count * len(self._workers))):
            ready, _ = self._ray.wait(list(gradients))
            worker = gradients.pop(ready[0])
            self._weights = self._server.apply_gradients.remote(ready[0])
            if left >= len(self._workers):
                gradients[worker.compute_gradients.remote(self._weights)] = worker
        self._ray.wait([self._weights])
        return []

    def check(self) -> Report:
        """Compare the parameters with what they must be."""
        self.run(1)
        told = self._ray.get([worker.told.remote() for worker in self._workers])
        counts = [self._own.sent] if self._cell.work == "W4" else [sent for sent, _ in told]
        parameters = np.asarray(self._ray.get(self._server.get_weights.remote()))
        return Report(self._cell.problem(parameters, counts), max(lag for _, lag in told))

    def _call(self) -> float:
        self._own.write(self._gradient)
        started = time.perf_counter()
        self._ray.get(self._server.apply_gradients.remote(self._gradient))
        return time.perf_counter() - started


def run_driver(connection: Connection, cell: Cell) -> None:
    os.environ.update(_ENVIRONMENT, PYTHONPATH=str(harness.ROOT))
    ray: Any = importlib.import_module("ray")
    ray.init(
        address="local",
        num_cpus=cell.workers + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    driver = Driver(cell, ray)
    take_part(connection, driver.run, driver.check)
    ray.shutdown()


@contextlib.contextmanager
def start(cell: Cell) -> Iterator[Team]:
    with harness.Child(run_driver, cell) as driver:
        driver.hear()
        yield Team(cell, [driver], pids=[driver.pid])


CONTENDERS = (
    Contender(
        "ray",
        "Ray actor",
        PEER,
        ("W1", "W2", "W3", "W4"),
        start,
        needs("ray"),
        listens=True,
        is_restless=True,
        packages=("ray",),
        note="The driver passes references; arrays are in shared memory.",
    ),
)
