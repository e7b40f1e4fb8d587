"""How the gradients of one step are combined: mean or sum, and what each counts for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distgrad.errors import ConfigError
from distgrad.policies.policy import Held

REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Weighing:
    """Weights of the gradients of a step.

    With w the examples behind a gradient, or 1, and f the factor that the policy gave it, its weight is f w / Σw for
    a mean and f w for a sum. The factors are not in the mean's denominator, as in FedBuff (Nguyen et al. 2022).

    Parameters
    ----------
    reduction : {"mean", "sum"}
        What a step is.
    weigh_by_examples : bool
        Whether a gradient counts by the examples behind it; if none has any, all count the same in a mean.

    Raises
    ------
    ConfigError
        If the reduction is not known.
    """

    reduction: str = "mean"
    weigh_by_examples: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown reduction.

        Raises
        ------
        ConfigError
            Naming those there are.
        """
        if self.reduction not in REDUCTIONS:
            raise ConfigError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")

    @property
    def is_neutral(self) -> bool:
        """Whether a step of one gradient with the factor 1 is that gradient."""
        return self.reduction == "mean" or not self.weigh_by_examples

    def weights(self, step: Sequence[Held[Any]]) -> list[float]:
        """Give what each gradient of a step is multiplied by.

        Parameters
        ----------
        step : sequence of Held
            At least one.

        Returns
        -------
        list of float
            In the same order.
        """
        counts = [held.gradient.examples if self.weigh_by_examples else 1 for held in step]
        if self.reduction == "sum":
            return [held.factor * count for held, count in zip(step, counts, strict=True)]
        total = sum(counts)
        if total == 0:
            counts, total = [1] * len(step), len(step)
        return [held.factor * (count / total) for held, count in zip(step, counts, strict=True)]

    def settings(self) -> dict[str, Any]:
        """Give the settings in force.

        Returns
        -------
        dict
            Names as in the configuration.
        """
        return {"reduction": self.reduction, "weigh_by_examples": self.weigh_by_examples}
