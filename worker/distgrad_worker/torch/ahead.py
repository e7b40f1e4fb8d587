"""Overlap: gradients are copied as the backward pass makes them, and sent and answered while the program goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from distgrad.errors import StateError
from distgrad_worker.torch.parameters import Parameters
from distgrad_worker.torch.tensors import Array


class Collected:
    """Copies each gradient when the backward pass has made it, while it is still in the processor's cache.

    Parameters
    ----------
    parameters : Parameters
        Whose gradients.
    factor : callable
        Gives what the gradients of a parameter group are multiplied by.

    Notes
    -----
    The memory that gradients are copied into is made once. This is where memory that is shared with the broker can be
    used instead.
    """

    def __init__(self, parameters: Parameters, factor: Callable[[int], float]) -> None:
        self._parameters = parameters
        self._factor = factor
        self._memory: list[Array] = []
        # For each parameter the gradient that was copied, and its version at that time.
        self._seen: list[tuple[torch.Tensor, int] | None] = [None] * len(parameters.trained)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(place))
            for place, (_, parameter, _) in enumerate(parameters.trained)
        ]

    def gather(self) -> list[Array | None]:
        """Give the copied gradients, and begin anew.

        Returns
        -------
        list of ndarray or None
            For each parameter; None where the backward pass made none. They are written to again by the next one.

        Raises
        ------
        StateError
            If a gradient was changed after it was copied.
        """
        seen, self._seen = self._seen, [None] * len(self._seen)
        gathered: list[Array | None] = []
        for place, copied in enumerate(seen):
            name, parameter, _ = self._parameters.trained[place]
            if copied is None:
                gathered.append(None)
                continue
            gradient, version = copied
            if parameter.grad is not gradient or gradient._version != version:
                raise StateError(
                    f"the gradient of {name!r} was changed between backward() and step(); with overlap=True it is "
                    "copied within backward(): to clip or scale gradients, leave overlap out"
                )
            gathered.append(self._memory[place])
        return gathered

    def close(self) -> None:
        """Copy no more."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, place: int) -> Callable[[torch.Tensor], None]:
        def copy(parameter: torch.Tensor) -> None:
            name, _, group = self._parameters.trained[place]
            if self._seen[place] is not None:
                raise StateError(
                    f"{name!r} got a second gradient before step(): to add up several backward passes, leave "
                    "overlap out"
                )
            if not self._memory:
                leaves = {leaf.name: leaf for leaf in self._parameters.layout.leaves}
                self._memory = [np.empty(leaves[n].shape, leaves[n].dtype) for n, _, _ in self._parameters.trained]
            array = self._parameters.gradient(place, self._factor(group))
            assert array is not None  # the hook is called when there is one
            assert parameter.grad is not None
            self._memory[place][...] = array
            self._seen[place] = (parameter.grad, parameter.grad._version)

        return copy


class Ahead:
    """Runs one exchange with the broker at a time on a thread of its own, which ends with it.

    Parameters
    ----------
    module : Module
        Whose forward pass and ``state_dict`` wait for the exchange.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._hooks: list[Any] = [
            module.register_forward_pre_hook(lambda *_: self.join()),
            module.register_state_dict_pre_hook(lambda *_: self.join()),
        ]

    def start(self, exchange: Callable[[], None]) -> None:
        """Begin an exchange.

        Parameters
        ----------
        exchange : callable
            Pushes and pulls. What it raises is raised by the next `join`.
        """

        def run() -> None:
            try:
                exchange()
            except BaseException as error:
                self._failure = error

        self.join()
        self._thread = threading.Thread(target=run, name="distgrad-exchange")
        self._thread.start()

    def join(self) -> None:
        """Wait until the exchange is done.

        Raises
        ------
        DistgradError
            What it has raised, once.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait, and take the hooks off the module."""
        for hook in self._hooks:
            hook.remove()
        self.join()
