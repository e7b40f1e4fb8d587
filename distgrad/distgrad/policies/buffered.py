"""Every so many gradients are one update, whoever sent them."""

from __future__ import annotations

from typing import Any

from distgrad.policies.policy import HOLD, Decision, Offered, Policy, Situation
from distgrad.policies.ranges import check_seconds, check_whole


class Buffered(Policy):
    """Apply every K gradients as one update, whoever sent them: FedBuff (Nguyen et al. 2022, algorithm 1).

    The buffer is summed in the order of worker ids and numbers. A worker that waits for its gradients to be settled
    (in `flush`, or in `push` for room) waits at most `grace` seconds for others to fill the buffer: then what is in it
    is applied, for otherwise a run's last gradients could never be settled.

    Parameters
    ----------
    buffer_size : int
        K, at least 1.
    grace : float, seconds
        At least 0.

    Raises
    ------
    ConfigError
        If a setting is out of range.
    """

    name = "buffered"
    holds = True

    def __init__(self, buffer_size: int = 10, grace: float = 1.0) -> None:
        check_whole("buffer_size", buffer_size, 1)
        check_seconds("grace", grace)
        self._size = buffer_size
        self._grace = grace
        self._held: list[Offered] = []
        self._closes_at: float | None = None

    @property
    def buffer_size(self) -> int:
        """How many gradients are one update."""
        return self._size

    def offer(self, gradient: Offered, staleness: int | None, situation: Situation) -> Decision:
        """Hold every gradient; see `Policy.offer`."""
        self._held.append(gradient)
        return HOLD

    def complete(self, situation: Situation) -> list[Offered] | None:
        """Give out a full buffer, or one that somebody has waited for; see `Policy.complete`."""
        is_late = self._closes_at is not None and situation.now >= self._closes_at
        if not self._held or not (len(self._held) >= self._size or is_late):
            return None
        step = sorted(self._held, key=lambda held: (held.worker, held.number))
        self.reset()
        return step

    def withdrawn(self, gradient: Offered) -> None:
        """Take a gradient out of the buffer; see `Policy.withdrawn`."""
        self._held = [held for held in self._held if held is not gradient]
        if not self._held:
            self._closes_at = None

    def reset(self) -> None:
        """Begin with an empty buffer; see `Policy.reset`."""
        self._held = []
        self._closes_at = None

    def awaited(self, worker: str, situation: Situation) -> None:
        """Close the buffer soon, if something of the worker's is in it; see `Policy.awaited`."""
        if self._closes_at is None and any(held.worker == worker for held in self._held):
            self._closes_at = situation.now + self._grace

    def next_deadline(self) -> float | None:
        """Tell when the buffer closes because somebody waits; see `Policy.next_deadline`."""
        return self._closes_at

    def must_hold(self, workers: int) -> int:
        """Ask for room for a full buffer; see `Policy.must_hold`."""
        return self._size

    def waits_for(self, situation: Situation) -> list[str]:
        """Tell how many gradients are missing; see `Policy.waits_for`."""
        return [f"{self._size - len(self._held)} more gradient(s)"] if self._held else []

    def settings(self) -> dict[str, Any]:
        """Give the settings in force; see `Policy.settings`."""
        return {"buffer_size": self._size, "grace": self._grace}
