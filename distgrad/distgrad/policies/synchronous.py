"""One update per step, from all workers or the first so many."""

from __future__ import annotations

from typing import Any

from distgrad.errors import ConfigError
from distgrad.policies.policy import HOLD, NO_PLACES, SUPERSEDE, Action, Decision, Offered, Places, Policy, Situation
from distgrad.policies.ranges import check_seconds, check_whole


class Synchronous(Policy):
    """Make one update per step from one gradient of each worker; the step is the version.

    Without `workers` the set is elastic: a step expects those who were live when it opened, whoever is gone is not
    waited for once its lease has ended, and whoever comes enters at the next step. With `workers` it is fixed: a step
    waits for its members, also for one that died and comes back under its id. Gradients are summed in the order of
    worker ids, so that the same gradients give the same bits. What was computed for a step that is closed is
    superseded. A worker that has taken part waits in its pull until the step is closed.

    Parameters
    ----------
    quorum : int, optional
        Close a step with the first so many gradients; the others are backup workers (Chen et al. 2016, "Revisiting
        distributed synchronous SGD"). If fewer are live, all of them suffice.
    grace : float, seconds, optional
        Close it this long after the quorum instead, if not all have come before.
    workers : int, optional
        How many members the fixed set has: the first that push.

    Raises
    ------
    ConfigError
        If a setting is out of range, or `grace` comes without `quorum`.
    """

    name = "sync"
    gates_pulls = True
    holds = True

    def __init__(self, quorum: int | None = None, grace: float | None = None, workers: int | None = None) -> None:
        for setting, value in (("quorum", quorum), ("workers", workers)):
            if value is not None:
                check_whole(setting, value, 1)
        if grace is not None:
            if quorum is None:
                raise ConfigError("grace is the time after the quorum; give quorum as well")
            check_seconds("grace", grace)
        if quorum is not None and workers is not None and quorum > workers:
            raise ConfigError(f"quorum must be at most workers, {workers}, got {quorum}")
        self._quorum = quorum
        self._grace = grace
        self._workers = workers
        # Of the open step: who has a gradient in it, who had one that was bad, whom an elastic set expects.
        self._held: dict[str, Offered] = {}
        self._spent: set[str] = set()
        self._expected: set[str] | None = None
        self._closes_at: float | None = None
        self._members: set[str] = set()
        self.is_repeatable = workers is not None and quorum is None

    def offer(self, gradient: Offered, staleness: int | None, situation: Situation) -> Decision:
        """Hold a gradient of the open step; see `Policy.offer`."""
        worker = gradient.worker
        if self._workers is not None and worker not in self._members and len(self._members) >= self._workers:
            return self._refusal(
                "not_a_member",
                f"the set is fixed to {self._workers} worker(s), which are there: start it under the id of one of "
                "them, or raise --workers",
            )
        if gradient.base is None:
            return self._refusal("no_base", "sync must know the step: pull first, or push with base_version")
        if staleness is None or staleness > 0:
            return SUPERSEDE
        if worker in self._held:
            return self._refusal(
                "second", f"{worker} has a gradient in step {situation.version} already: pull before the next push"
            )
        if self._expected is None:
            self._expected = set(situation.live)
        if self._workers is not None:
            self._members.add(worker)  # only now: a script that fails at once must not keep a place
        self._spent.discard(worker)
        self._held[worker] = gradient
        return HOLD

    def complete(self, situation: Situation) -> list[Offered] | None:
        """Give out the step when all, or enough, have taken part; see `Policy.complete`."""
        if not self._held:
            return None
        if self._missing():
            if self._quorum is None or len(self._held) < self._quorum:
                return None
            if self._grace is not None:
                if self._closes_at is None:
                    self._closes_at = situation.now + self._grace
                if situation.now < self._closes_at:
                    return None
        step = [self._held[worker] for worker in sorted(self._held)]
        self.reset()
        self._expected = set(situation.live) or None
        return step

    def withdrawn(self, gradient: Offered) -> None:
        """Count the worker as having taken part with nothing; see `Policy.withdrawn`."""
        if self._held.get(gradient.worker) is gradient:
            del self._held[gradient.worker]
            self._spent.add(gradient.worker)
            if self._quorum is None or len(self._held) < self._quorum:
                self._closes_at = None
            self._begin_anew_if_void()

    def reset(self) -> None:
        """Begin the step anew; see `Policy.reset`."""
        self._held, self._spent = {}, set()
        self._expected = self._closes_at = None

    def may_pull(self, worker: str, situation: Situation) -> bool:
        """Let a worker wait that has taken part in the open step; see `Policy.may_pull`."""
        return worker not in self._held

    def departed(self, worker: str, *, left: bool) -> None:
        """Expect the worker no more, if the set is elastic or it said goodbye; see `Policy.departed`."""
        if self._expected is not None:
            self._expected.discard(worker)
        if left:
            self._members.discard(worker)
            self._spent.discard(worker)
        self._begin_anew_if_void()

    def next_deadline(self) -> float | None:
        """Tell when grace ends; see `Policy.next_deadline`."""
        return self._closes_at

    def must_hold(self, workers: int) -> int:
        """Ask for room for one gradient of each that a step needs; see `Policy.must_hold`."""
        everybody = workers if self._workers is None else self._workers
        return everybody if self._quorum is None else min(self._quorum, everybody)

    def places(self) -> Places:
        """Keep room for the members of a fixed set, or as many of them as a step needs; see `Policy.places`."""
        if self._workers is None:
            return NO_PLACES
        missing = self._workers - len(self._members)
        if self._quorum is None:
            return Places(self._members, missing)
        return Places((), self._quorum, None if missing else self._members)

    def check(self, max_workers: int) -> None:
        """Refuse more workers than are allowed; see `Policy.check`."""
        for setting, value in (("quorum", self._quorum), ("workers", self._workers)):
            if value is not None and value > max_workers:
                raise ConfigError(f"{setting} must be at most max_workers, {max_workers}, got {value}")

    def waits_for(self, situation: Situation) -> list[str]:
        """Name who is missing in the open step; see `Policy.waits_for`."""
        return self._missing() if self._held or self._workers is not None else []

    def memory(self) -> dict[str, Any]:
        """Give the members of a fixed set; see `Policy.memory`."""
        return {"members": sorted(self._members)} if self._workers is not None else {}

    def step_memory(self) -> dict[str, Any]:
        """Give the members of a fixed set that have taken part with nothing; see `Policy.step_memory`."""
        return {"spent": sorted(self._spent)} if self._workers is not None and self._spent else {}

    def recall(self, memory: dict[str, Any]) -> None:
        """Take the members of a fixed set back, unless it has become too small for all; see `Policy.recall`."""
        members = memory.get("members", [])
        if self._workers is not None and len(members) <= self._workers:
            self._members.update(members)
            self._spent.update(memory.get("spent", []))

    def settings(self) -> dict[str, Any]:
        """Give the settings in force; see `Policy.settings`."""
        return {"quorum": self._quorum, "grace": self._grace, "workers": self._workers}

    def _begin_anew_if_void(self) -> None:
        """Let everybody take part again if nobody is left who could: a step of nothing has no version after it."""
        if not self._held and not self._missing():
            self.reset()

    def _missing(self) -> list[str]:
        """List whom the open step lacks."""
        expected = (self._expected or set()) if self._workers is None else self._members
        missing = sorted(expected - self._held.keys() - self._spent)
        if self._workers is not None and len(self._members) < self._workers:
            missing.append(f"{self._workers - len(self._members)} more worker(s)")
        return missing

    @staticmethod
    def _refusal(reason: str, message: str) -> Decision:
        return Decision(Action.REFUSE, reason=reason, message=message)
