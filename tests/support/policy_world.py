"""Workers and versions around one policy, without a core: who pushes what, which steps come of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distgrad.policies import Action, Policy, Situation


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
