"""Buffers of a model, such as the statistics of batch normalization, shared over a second broker.

A broker's rule changes everything that it holds, and Adam would do as little for a running mean as SGD with momentum.
So buffers have a broker of their own, one without a rule: what is pushed there is the difference between what this
worker had pulled and what it has now, and ``p - g`` of that is what it has.
"""

from __future__ import annotations

import torch

from distgrad.errors import ConfigError, LayoutError
from distgrad.snapshot import Snapshot
from distgrad_worker.torch.tensors import Array, as_array, as_tensor
from distgrad_worker.worker import Worker

POLICIES = ("average", "first")


class SharedBuffers:
    """Keeps the floating-point buffers of a model the same in all workers.

    Integer buffers (``num_batches_tracked``) stay each worker's own.

    Parameters
    ----------
    module : Module
        Whose buffers. The values of the worker that comes first are what all begin with.
    worker : Worker
        Connection to a broker for them alone, without a rule (``distgrad broker`` without ``--optimizer``), whose
        policy is ``sync`` for the mean of all workers' after each step, or ``async`` for each worker's changes as they
        come.
    policy : {"average", "first"}
        Whether the changes of all workers count, or only those of the one with ``is_first``.
    is_first : bool
        Whether this worker is the one whose buffers all have, under ``first``.

    Raises
    ------
    ConfigError
        If the policy is not known, or the broker has a rule.
    LayoutError
        If the module has no such buffer, or not those that the broker has.
    """

    def __init__(
        self, module: torch.nn.Module, worker: Worker, policy: str = "average", *, is_first: bool = True
    ) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        status = worker.status()
        if status["optimizer"] is not None:
            raise ConfigError("the broker of the buffers must have no rule: start one without --optimizer for them")
        if policy == "first" and status["policy"]["policy"] != "async":
            raise ConfigError("under 'first' only one worker pushes; the buffers' broker must have --policy async")
        self._worker = worker
        self._pushes = policy == "average" or is_first
        self._buffers = {
            name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point() and buffer.numel()
        }
        if not self._buffers:
            raise LayoutError("the module has no floating-point buffer to share")
        self._snapshot = worker.initialize(self._values())
        self._take(self._snapshot)

    def synchronize(self) -> None:
        """Push what has changed here, and take what the broker has; a step of `DistributedOptimizer` does so.

        Raises
        ------
        DistgradError
            As `Worker.push` and `Worker.pull`.
        """
        if self._pushes:
            pulled = self._leaves(self._snapshot)
            self._worker.push({name: pulled[name] - value for name, value in self._values().items()})
            self._worker.flush()
        self._snapshot = self._worker.pull(out=self._snapshot)
        self._take(self._snapshot)

    def _values(self) -> dict[str, Array]:
        return {name: as_array(buffer.cpu()) for name, buffer in self._buffers.items()}

    @staticmethod
    def _leaves(snapshot: Snapshot) -> dict[str, Array]:
        views = snapshot.layout.views(snapshot.arenas)
        return {leaf.name: view for leaf, view in zip(snapshot.layout.leaves, views, strict=True)}

    def _take(self, snapshot: Snapshot) -> None:
        leaves = self._leaves(snapshot)
        for name, buffer in self._buffers.items():
            if name not in leaves or leaves[name].shape != tuple(buffer.shape):
                raise LayoutError(
                    f"the broker of the buffers has no {name!r} of shape {tuple(buffer.shape)}", leaf=name
                )
            with torch.no_grad():
                buffer.copy_(as_tensor(leaves[name]))
