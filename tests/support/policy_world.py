"""Workers and versions around one policy, without a core: who pushes what, which steps come of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from distgrad.policies import Action, Decision, Policy, Situation


class Version(NamedTuple):
    version: int


class Gradient(NamedTuple):
    worker: str
    number: int = 1
    examples: int = 1
    base: Version | None = Version(0)


class World:
    """Workers that push one after the other, and the steps that come of it."""

    def __init__(self, policy: Policy, *workers: str) -> None:
        self.policy = policy
        self.live: set[str] = set()
        self.version = 0
        self.now = 0.0
        self.numbers: dict[str, int] = {}
        self.steps: list[list[str]] = []
        for worker in workers:
            self.join(worker)

    @property
    def situation(self) -> Situation:
        return Situation(self.version, frozenset(self.live), self.now)

    def join(self, worker: str) -> None:
        self.live.add(worker)
        self.policy.joined(worker, self.situation)

    def depart(self, worker: str, *, left: bool = False) -> None:
        self.live.discard(worker)
        self.policy.departed(worker, left=left)
        self.advance()

    def push(self, worker: str, base: int | None = None) -> Action:
        gradient = self.next(worker, base)
        staleness = self.version - (self.version if base is None else base)
        action = self.policy.offer(gradient, staleness, self.situation).action
        if action is Action.APPLY:
            self.version += 1
        self.advance()
        return action

    def next(self, worker: str, base: int | None = None) -> Gradient:
        self.numbers[worker] = number = self.numbers.get(worker, 0) + 1
        return Gradient(worker, number, base=Version(self.version if base is None else base))

    def advance(self) -> None:
        while (step := self.policy.complete(self.situation)) is not None:
            self.steps.append([gradient.worker for gradient in step])
            self.version += 1

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.advance()

    def may(self, worker: str) -> bool:
        return self.policy.may_pull(worker, self.situation)

    def waits_for(self) -> Sequence[str]:
        return self.policy.waits_for(self.situation)


class Accounts(World):
    """Workers that push what they last pulled, other things that may happen, and what became of every gradient."""

    def __init__(self, policy: Policy, *workers: str) -> None:
        self.generation = 0
        self.pulled: dict[str, tuple[int, int]] = {}  # generation and version
        self.offered: dict[Gradient, int] = {}  # and the generation of what it was computed on
        self.held: list[Gradient] = []
        self.settled: list[Gradient] = []
        self.given_out: list[list[Gradient]] = []
        super().__init__(policy, *workers)

    def pull(self, worker: str) -> bool:
        if not self.may(worker):
            return False
        self.pulled[worker] = (self.generation, self.version)
        return True

    def push_pulled(self, worker: str, *, is_bad: bool = False) -> Decision:
        """Push a gradient of what the worker last pulled; of an untold base if it never did."""
        self.numbers[worker] = number = self.numbers.get(worker, 0) + 1
        generation, version = self.pulled.get(worker, (0, None))
        gradient = Gradient(worker, number, base=None if version is None else Version(version))
        self.offered[gradient] = generation
        return self.offer(gradient, is_bad=is_bad)

    def pull_and_push(self, worker: str) -> Decision | None:
        """Do one round of a worker's loop; None if its pull has to wait."""
        return self.push_pulled(worker) if self.pull(worker) else None

    def offer(self, gradient: Gradient, *, is_bad: bool = False) -> Decision:
        staleness = None
        if gradient.base is not None and self.offered[gradient] == self.generation:
            staleness = self.version - gradient.base.version
        decision = self.policy.offer(gradient, staleness, self.situation)
        if decision.action is Action.HOLD:
            self.held.append(gradient)
            if is_bad:  # its numbers are looked at when it is to be held, before anything is asked
                self.withdraw(gradient)
        else:
            self.settled.append(gradient)
            self.version += decision.action is Action.APPLY
        self.advance()
        return decision

    def advance(self) -> None:
        """Apply what is complete; like the core, ask only while something is held."""
        while self.held and (step := self.policy.complete(self.situation)) is not None:
            gradients = [gradient for gradient in step if isinstance(gradient, Gradient)]
            assert gradients, "an update needs a gradient"
            for gradient in gradients:
                self.held.remove(gradient)  # what was never held, or given out before, is not in there
                self.settled.append(gradient)
            self.given_out.append(gradients)
            self.steps.append([gradient.worker for gradient in gradients])
            self.version += 1

    def withdraw(self, gradient: Gradient) -> None:
        """Drop a gradient that is held: it is bad, or its worker's numbers begin anew."""
        self.held.remove(gradient)
        self.settled.append(gradient)
        self.policy.withdrawn(gradient)
        self.advance()

    def clear(self) -> None:
        self.settled += self.held
        self.held.clear()
        self.policy.reset()

    def replace(self) -> None:
        """Set other parameters: what is held is offered again, and is of the former ones now."""
        self.generation += 1
        again = list(self.held)
        self.held.clear()
        self.policy.reset()
        for gradient in again:
            self.offer(gradient)

    def check(self) -> None:
        """Every gradient that was offered is settled once, or held."""
        told = Counter([*self.settled, *self.held])
        assert told == Counter(self.offered.keys())
        assert len({gradient for step in self.given_out for gradient in step}) == sum(map(len, self.given_out))
