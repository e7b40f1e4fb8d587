"""Several policies as one: each link has its say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distgrad.errors import ConfigError
from distgrad.policies.policy import Action, Decision, Offered, Places, Policy, Situation


class Chain(Policy):
    """Ask several policies in turn.

    The first that supersedes or refuses a gradient decides, and those behind it do not see it; factors multiply; a
    worker may pull if all let it. Only the last link may hold gradients back.

    Parameters
    ----------
    links : sequence of Policy
        At least one. A link that counts gradients belongs before one that drops them.
    name : str, optional
        In status; by default the last link's.

    Raises
    ------
    ConfigError
        If there is no link, or one that holds gradients is not the last.

    Examples
    --------
    >>> Chain([Bounded(3), Staleness(staleness_scaling="sqrt"), Buffered(8)]).name  # doctest: +SKIP
    'buffered'
    """

    def __init__(self, links: Sequence[Policy], name: str | None = None) -> None:
        if not links:
            raise ConfigError("a chain needs at least one policy")
        for link in links[:-1]:
            if link.holds:
                raise ConfigError(f"{link.name} holds gradients back and must be the last of a chain")
        self._links = tuple(links)
        self._last = self._links[-1]
        self.name = name or self._last.name
        self.is_immediate = all(link.is_immediate for link in links)
        self.gates_pulls = any(link.gates_pulls for link in links)
        self.holds = self._last.holds
        self.is_repeatable = self._last.is_repeatable

    def offer(self, gradient: Offered, staleness: int | None, situation: Situation) -> Decision:
        """Ask each link; see `Policy.offer`."""
        factors = []
        for link in self._links:
            decision = link.offer(gradient, staleness, situation)
            if decision.action in (Action.SUPERSEDE, Action.REFUSE):
                return decision
            factors.append(decision.factor)
        return decision._replace(factor=math.prod(factors))

    def complete(self, situation: Situation) -> Sequence[Offered] | None:
        """Ask the last link; see `Policy.complete`."""
        return self._last.complete(situation)

    def withdrawn(self, gradient: Offered) -> None:
        """Tell the last link; see `Policy.withdrawn`."""
        self._last.withdrawn(gradient)

    def reset(self) -> None:
        """Tell each link; see `Policy.reset`."""
        for link in self._links:
            link.reset()

    def may_pull(self, worker: str, situation: Situation) -> bool:
        """Ask each link; see `Policy.may_pull`."""
        return all(link.may_pull(worker, situation) for link in self._links)

    def joined(self, worker: str, situation: Situation) -> None:
        """Tell each link; see `Policy.joined`."""
        for link in self._links:
            link.joined(worker, situation)

    def departed(self, worker: str, *, left: bool) -> None:
        """Tell each link; see `Policy.departed`."""
        for link in self._links:
            link.departed(worker, left=left)

    def awaited(self, worker: str, situation: Situation) -> None:
        """Tell each link; see `Policy.awaited`."""
        for link in self._links:
            link.awaited(worker, situation)

    def next_deadline(self) -> float | None:
        """Give the earliest of the links'; see `Policy.next_deadline`."""
        return min((at for link in self._links if (at := link.next_deadline()) is not None), default=None)

    def must_hold(self, workers: int) -> int:
        """Give the largest of the links'; see `Policy.must_hold`."""
        return max(link.must_hold(workers) for link in self._links)

    def places(self) -> Places:
        """Give those of the last link, which alone may hold; see `Policy.places`."""
        return self._last.places()

    def check(self, max_workers: int) -> None:
        """Have each link check its settings; see `Policy.check`."""
        for link in self._links:
            link.check(max_workers)

    def waits_for(self, situation: Situation) -> list[str]:
        """Join the links' names; see `Policy.waits_for`."""
        return [name for link in self._links for name in link.waits_for(situation)]

    def memory(self) -> dict[str, Any]:
        """Join the links' memories; see `Policy.memory`."""
        return {key: value for link in self._links for key, value in link.memory().items()}

    def step_memory(self) -> dict[str, Any]:
        """Join the links' memories of the open step; see `Policy.step_memory`."""
        return {key: value for link in self._links for key, value in link.step_memory().items()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Tell each link; see `Policy.recall`."""
        for link in self._links:
            link.recall(memory)

    def settings(self) -> dict[str, Any]:
        """Join the links' settings; see `Policy.settings`."""
        return {name: value for link in self._links for name, value in link.settings().items()}
