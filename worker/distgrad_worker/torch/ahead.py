"""Overlap: gradients are copied as the backward pass makes them, and sent and answered while the program goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from distgrad.errors import StateError
from distgrad_worker.torch.outgoing import Outgoing
from distgrad_worker.torch.parameters import Parameters


class Collected:
    """Writes each gradient when the backward pass has made it, while it is still in the processor's cache.

    Parameters
    ----------
    parameters : Parameters
        Whose gradients.
    outgoing : Outgoing
        Where to.
    factor : callable
        Gives what the gradients of a parameter group are multiplied by.
    """

    def __init__(self, parameters: Parameters, outgoing: Outgoing, factor: Callable[[int], float]) -> None:
        self._parameters = parameters
        self._outgoing = outgoing
        self._factor = factor
        # For each parameter the gradient that was copied, and its version at that time.
        self._seen: dict[int, tuple[torch.Tensor, int]] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(place))
            for place, (_, parameter, _) in enumerate(parameters.trained)
        ]

    def check(self) -> None:
        """Look whether gradients are what they were when they were copied, and begin anew.

        Raises
        ------
        StateError
            If one was changed; what was written is dropped.
        """
        seen, self._seen = self._seen, {}
        for place, (gradient, version) in seen.items():
            name, parameter, _ = self._parameters.trained[place]
            if parameter.grad is not gradient or gradient._version != version:
                self._outgoing.drop()
                raise StateError(
                    f"the gradient of {name!r} was changed between backward() and step(); with overlap=True it is "
                    "copied within backward(): to clip or scale gradients, leave overlap out"
                )

    def drop(self) -> None:
        """Forget what was copied: the gradients are cleared."""
        self._seen = {}
        self._outgoing.drop()

    def close(self) -> None:
        """Copy no more."""
        for hook in self._hooks:
            hook.remove()
        self.drop()

    def _hook(self, place: int) -> Callable[[torch.Tensor], None]:
        def copy(parameter: torch.Tensor) -> None:
            name, _, group = self._parameters.trained[place]
            if place in self._seen:
                raise StateError(
                    f"{name!r} got a second gradient before step(): to add up several backward passes, leave "
                    "overlap out"
                )
            with torch.no_grad():
                self._outgoing.write(place, self._factor(group))
            assert parameter.grad is not None  # the hook is called when there is one
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
