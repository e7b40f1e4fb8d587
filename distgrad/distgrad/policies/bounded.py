"""Stale-synchronous parallel: nobody runs far ahead of the slowest."""

from __future__ import annotations

from typing import Any

from distgrad.policies.policy import APPLY, Decision, Offered, Policy, Situation
from distgrad.policies.ranges import check_whole


class Bounded(Policy):
    """Let no worker run more than some steps ahead of the slowest live one. A link of a `Chain`.

    A worker's clock counts its gradients; it waits in its pull while it is `bound` ahead. Who joins, or comes back
    after its lease had ended, begins with the clock of the slowest. References: Ho et al. 2013 (stale-synchronous
    parallel parameter server); Cipar et al. 2013.

    Parameters
    ----------
    bound : int
        Steps, at least 1; with 1 all take turns.

    Raises
    ------
    ConfigError
        If `bound` is below 1.
    """

    name = "bounded"
    gates_pulls = True

    def __init__(self, bound: int = 4) -> None:
        check_whole("bound", bound, 1, "with 0 nobody could take a step")
        self._bound = bound
        # Of the workers that take part: the clock, and the last number that moved it, so that a gradient which is
        # offered once more does not count twice. Numbers that were cleared or refused before do not count at all.
        self._clocks: dict[str, int] = {}
        self._counted: dict[str, int] = {}
        # The smallest clock, or None if it has to be looked for.
        self._slowest: int | None = None

    def offer(self, gradient: Offered, staleness: int | None, situation: Situation) -> Decision:
        """Move the worker's clock; see `Policy.offer`."""
        worker = gradient.worker
        former = self._clocks.get(worker)
        # A gradient of a worker that is gone may still be in the queue: it moves nobody's clock.
        if former is not None and gradient.number > self._counted.get(worker, 0):
            self._counted[worker] = gradient.number
            self._clocks[worker] = former + 1
            if former == self._slowest:
                self._slowest = None
        return APPLY

    def may_pull(self, worker: str, situation: Situation) -> bool:
        """Tell whether the worker is less than `bound` ahead of the slowest; see `Policy.may_pull`."""
        clock = self._clocks.get(worker)
        if clock is None:
            return True
        if self._slowest is None:
            self._slowest = min(self._clocks.values())
        return clock - self._slowest < self._bound

    def joined(self, worker: str, situation: Situation) -> None:
        """Give the worker the slowest one's clock; see `Policy.joined`."""
        self.departed(worker, left=False)
        self._clocks[worker] = min(self._clocks.values(), default=0)
        self._slowest = None

    def departed(self, worker: str, *, left: bool) -> None:
        """Wait for the worker no more; see `Policy.departed`."""
        self._clocks.pop(worker, None)
        self._counted.pop(worker, None)
        self._slowest = None

    def waits_for(self, situation: Situation) -> list[str]:
        """Name the slowest, if somebody has to wait for them; see `Policy.waits_for`."""
        slowest = min(self._clocks.values(), default=0)
        if not any(clock - slowest >= self._bound for clock in self._clocks.values()):
            return []
        return sorted(worker for worker, clock in self._clocks.items() if clock == slowest)

    def settings(self) -> dict[str, Any]:
        """Give the settings in force; see `Policy.settings`."""
        return {"bound": self._bound}
