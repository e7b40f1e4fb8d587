"""Old gradients count less, or not at all."""

from __future__ import annotations

import math
from typing import Any

from distgrad.errors import ConfigError
from distgrad.policies.policy import SUPERSEDE, Action, Decision, Offered, Policy, Situation
from distgrad.policies.ranges import check_whole

SCALINGS = ("none", "inverse", "sqrt")


class Staleness(Policy):
    """Bound the staleness of gradients, or scale them by it. A link of a `Chain`.

    What is scaled is the gradient. Rules that divide by the gradient's own size, as Adam does, take most of it out
    again; a bound works with every rule.

    Parameters
    ----------
    max_staleness : int, optional
        A gradient computed on parameters more than this many updates old, or on parameters that were replaced since,
        is superseded: the rule of Ringmaster ASGD (Maranjyan et al. 2025).
    staleness_scaling : {"none", "inverse", "sqrt"}
        A gradient s updates old is multiplied by 1, 1 / (1 + s) (Zhang et al. 2016, "Staleness-aware async-SGD") or
        1 / sqrt(1 + s) (Nguyen et al. 2022, FedBuff).
    staleness_decay : float, optional
        Multiply by this to the power of s instead, in (0, 1].

    Raises
    ------
    ConfigError
        If a setting is out of range, or both a scaling and a decay are given.
    """

    name = "staleness"

    def __init__(
        self,
        max_staleness: int | None = None,
        staleness_scaling: str = "none",
        staleness_decay: float | None = None,
    ) -> None:
        if max_staleness is not None:
            check_whole("max_staleness", max_staleness, 0)
        if staleness_scaling not in SCALINGS:
            raise ConfigError(f"staleness_scaling must be one of {', '.join(SCALINGS)}, got {staleness_scaling!r}")
        if staleness_decay is not None and not 0 < staleness_decay <= 1:
            raise ConfigError(f"staleness_decay must be above 0 and at most 1, got {staleness_decay}")
        if staleness_decay is not None and staleness_scaling != "none":
            raise ConfigError(f"give staleness_decay or staleness_scaling={staleness_scaling}, not both")
        self._max = max_staleness
        self._scaling = staleness_scaling
        self._decay = staleness_decay

    def offer(self, gradient: Offered, staleness: int | None, situation: Situation) -> Decision:
        """Supersede what is too old and scale the rest; see `Policy.offer`."""
        if staleness is None:
            # Replaced parameters are older than any bound; of what was not told nothing is assumed.
            is_old = gradient.base is not None and self._max is not None
            return SUPERSEDE if is_old else Decision(Action.APPLY)
        if self._max is not None and staleness > self._max:
            return SUPERSEDE
        return Decision(Action.APPLY, self._factor(staleness))

    def settings(self) -> dict[str, Any]:
        """Give the settings in force; see `Policy.settings`."""
        return {
            "max_staleness": self._max,
            "staleness_scaling": self._scaling,
            "staleness_decay": self._decay,
        }

    def _factor(self, staleness: int) -> float:
        if self._decay is not None:
            return float(self._decay**staleness)
        if self._scaling == "inverse":
            return 1.0 / (1 + staleness)
        if self._scaling == "sqrt":
            return 1.0 / math.sqrt(1 + staleness)
        return 1.0
