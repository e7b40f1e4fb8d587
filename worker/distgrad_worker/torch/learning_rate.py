"""What a parameter group's ``lr`` does, while the rule that owns the learning rate is the broker's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distgrad.admin import Admin
from distgrad.errors import ConfigError, Forbidden
from distgrad_worker.worker import Worker


class LearningRate:
    """The broker's learning rate, and how a change of it gets there.

    Where the rule is linear in the gradient (none, or SGD without momentum and weight decay), a gradient times
    ``lr / broker's lr`` makes just the step that `lr` would make, for each parameter group apart. Elsewhere the broker
    is told the new value, which holds for all workers and all parameters.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    admin : Admin, optional
        Who changes settings at the broker, where the worker's key does not allow it.

    Attributes
    ----------
    value : float
        The broker's, as last known; 1 where it has no rule and the gradient is the step.
    """

    def __init__(self, worker: Worker, admin: Admin | None) -> None:
        self._worker = worker
        self._admin = admin
        rule: dict[str, Any] = worker.status()["optimizer"] or {"name": "none"}
        self._name: str = rule["name"]
        self._is_linear = self._name == "none" or (
            self._name == "sgd" and not rule["momentum"] and not rule["weight_decay"]
        )
        self.value = float(rule.get("lr", 1.0))

    @property
    def has_rule(self) -> bool:
        """Whether the broker has a rule; without one the gradient is the step."""
        return self._name != "none"

    def factors(self, wanted: Sequence[float]) -> list[float]:
        """Make the learning rates of the parameter groups hold for the gradient that is pushed next.

        Parameters
        ----------
        wanted : sequence of float
            ``lr`` of each group.

        Returns
        -------
        list of float
            What the gradients of each group must be multiplied by.

        Raises
        ------
        ConfigError
            If the broker's rule cannot do this.
        Forbidden
            If the broker must be told, and the worker's key does not allow it.
        """
        if all(lr == self.value for lr in wanted):
            return [1.0] * len(wanted)
        if self._is_linear and self.value:
            return [lr / self.value for lr in wanted]
        if len(set(wanted)) > 1:
            raise ConfigError(
                f"the broker's rule {self._name!r} has one lr for all parameters, got {', '.join(map(str, wanted))} in "
                "different groups: give all the same, or start the broker with --optimizer sgd without momentum"
            )
        self._tell(wanted[0])
        return [1.0] * len(wanted)

    def _tell(self, lr: float) -> None:
        try:
            if self._admin is not None:
                self._admin.set_parameters(lr=lr)
            else:
                # Not a verb of Worker: only where the broker has no keys may a worker change settings.
                self._worker._connection.puller.request("configure", mutating=True, settings={"lr": lr})
        except Forbidden as error:
            raise Forbidden(
                error.code,
                f"lr was changed from {self.value} to {lr}, which the broker's rule {self._name!r} must be told, and "
                "this worker's key does not allow that: pass admin=Admin(…, keys=…) with an operator's key",
            ) from error
        self.value = lr
