"""Workers of a core that make steps together."""

from __future__ import annotations

from distgrad.policies import Policy, Synchronous, Weighing
from distgrad.rules import Rule
from support.core_kit import Kit


def sync_kit(
    *workers: str, policy: Policy | None = None, weighing: Weighing | None = None, rule: Rule | None = None
) -> Kit:
    kit = Kit(policy=policy or Synchronous(), weighing=weighing, rule=rule)
    for worker in workers:
        kit.hello(worker)
    for worker in workers:
        kit.beat(worker)
    return kit


def push(kit: Kit, worker: str, number: int = 1, *, value: float = 1.0, base: object = ..., examples: int = 1) -> None:
    """Push a gradient on the current version, and let it be decided on."""
    named = list(kit.core.name) if base is ... else base
    kit.push(number, worker=worker, value=value, base=named, examples=examples)
    kit.work()
