"""The gradient that is on its way: each parameter's is written straight into the memory that it is sent from."""

from __future__ import annotations

from typing import Any

import torch

from distgrad.errors import LayoutError
from distgrad.nests import dissect
from distgrad_worker.slot import Slot
from distgrad_worker.torch.parameters import Parameters
from distgrad_worker.torch.tensors import as_tensor
from distgrad_worker.worker import Worker


class Outgoing:
    """Writes gradients into a worker's slot, which the broker reads where it is if it runs on the same host.

    Parameters
    ----------
    worker : Worker
        Whose slots.
    parameters : Parameters
        Whose gradients.
    """

    def __init__(self, worker: Worker, parameters: Parameters) -> None:
        self._worker = worker
        self._parameters = parameters
        self._slot: Slot | None = None
        self._places: dict[str, torch.Tensor] = {}
        # Gradients on a GPU come by memory that it can write to by itself.
        self._pinned: dict[int, torch.Tensor] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written yet."""
        return self._slot is None

    def write(self, place: int, factor: float) -> None:
        """Write one parameter's gradient; it must have one.

        Parameters
        ----------
        place : int
            Of the parameter, in `Parameters.trained`.
        factor : float
            What it is multiplied by.

        Raises
        ------
        LayoutError
            If it is sparse, or the broker's parameters were replaced by others; all that was written is dropped.
        DistgradError
            As `Worker.slot`.
        """
        name, parameter, _ = self._parameters.trained[place]
        try:
            if parameter.grad.layout != torch.strided:
                raise LayoutError(
                    f"the gradient of {name!r} is sparse, and the broker takes dense ones only: make the layer with "
                    "sparse=False",
                    leaf=name,
                )
            if self._slot is None:
                self._open()
            target = self._places.get(name)
            if target is None or target.shape != parameter.shape or target.dtype != parameter.dtype:
                raise LayoutError(f"the broker has no {name!r} like this model's any more: it was replaced", leaf=name)
            source = parameter.grad if parameter.grad.device.type == "cpu" else self._fetched(place, parameter.grad)
            if factor == 1.0:
                target.copy_(source)
            else:
                torch.mul(source, factor, out=target)
        except BaseException:
            self.drop()
            raise
        del self._places[name]

    def finish(self, details: dict[str, Any]) -> Slot:
        """End the gradient; what was not written is zero.

        Parameters
        ----------
        details : dict
            ``loss``, ``examples`` and ``cursor``, as for `Worker.push`.

        Returns
        -------
        Slot
            To be pushed, on any thread.
        """
        slot = self._slot
        assert slot is not None  # something was written
        for target in self._places.values():
            target.zero_()
        self._slot, self._places = None, {}
        slot.loss, slot.examples, slot.cursor = details["loss"], details["examples"], details["cursor"]
        return slot

    def drop(self) -> None:
        """Forget what was written."""
        slot, self._slot, self._places = self._slot, None, {}
        if slot is not None:
            slot.drop()

    def _open(self) -> None:
        slot = self._worker.slot()
        _, names, leaves = dissect(slot.open())
        self._slot = slot
        self._places = {name: as_tensor(leaf) for name, leaf in zip(names, leaves, strict=True) if leaf is not None}

    def _fetched(self, place: int, gradient: torch.Tensor) -> torch.Tensor:
        pinned = self._pinned.get(place)
        if pinned is None:
            pinned = self._pinned[place] = torch.empty_like(gradient, device="cpu", pin_memory=True)
        pinned.copy_(gradient, non_blocking=True)
        torch.cuda.synchronize(gradient.device)
        return pinned
