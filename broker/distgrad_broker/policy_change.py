"""Another policy while the broker runs: checked first, then in force at once for all that is not settled."""

from __future__ import annotations

from typing import Any, NamedTuple

from distgrad import policies
from distgrad.errors import ConfigError
from distgrad.policies import NO_PLACES, Policy, Weighing
from distgrad_broker import pulls, settling
from distgrad_broker.config import POLICY_SETTINGS
from distgrad_broker.places import Kept
from distgrad_broker.requests import RequestError
from distgrad_broker.state import CoreState
from distgrad_broker.updates import requeue_held

_WEIGHING_SETTINGS = ("reduction", "weigh_by_examples")


class PolicyChange(NamedTuple):
    """What is to be in force from now on."""

    policy: Policy | None
    weighing: Weighing


def prepare(state: CoreState, settings: dict[str, Any]) -> PolicyChange | None:
    """Build and check what `configure` asks for, without changing anything.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    settings : dict
        As asked for; those of the policy and the weighing are taken out.

    Returns
    -------
    PolicyChange or None
        None if they say nothing of either.

    Raises
    ------
    ConfigError
        If a setting is unknown or out of range.
    RequestError
        ``too_large`` if the policy must hold more than the queue's budget, or is to wait for more workers than those
        that are there leave room for.
    """
    name = settings.pop("policy", None)
    is_named = name is not None
    own = settings.pop("policy_settings", None) or {}
    if not isinstance(own, dict):
        raise ConfigError(f"policy_settings must be a map of names to values, got {own!r:.40}")
    own = own | {key: settings.pop(key) for key in POLICY_SETTINGS if key in settings}
    combining = {key: settings.pop(key) for key in _WEIGHING_SETTINGS if key in settings}
    if name is None and not own and not combining:
        return None
    weighing = Weighing(**{**state.weighing.settings(), **combining})
    if name is None and not own:
        return PolicyChange(None, weighing)
    if name is None or name == state.policy.name:
        name = state.policy.name
        own = {key: value for key, value in {**state.policy.settings(), **own}.items() if value is not None}
    policy = policies.build(name, own)
    policy.check(state.settings.max_workers)
    if not is_named:  # it only has other settings from now on; else it begins with nothing
        policy.recall(state.policy.memory())
    if state.versions.layout is not None:
        _, one = state.check_budget(state.versions.layout.gradient_bytes, policy=policy)
        _check_places(state, policy, one)
    return PolicyChange(policy, weighing)


def _check_places(state: CoreState, policy: Policy, gradient_bytes: int) -> None:
    """Refuse to wait for workers that would have no room: what the others have pushed, the step may hold."""
    places, budget = policy.places(), state.grants.budget_bytes
    kept = Kept(list(state.members), places, budget, gradient_bytes, trusts_idle=True)
    if places != NO_PLACES and kept.room < 0:
        raise RequestError(
            "too_large",
            f"{policy.name} would wait for workers that have no room: what others were granted leaves {-kept.room} "
            f"bytes too few of --queue-bytes {budget}; raise it, or let all join, and wait until the queue is empty",
        )


def carry_out(state: CoreState, change: PolicyChange, now: float) -> None:
    """Put a policy in force; what the former one held is offered to it.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    change : PolicyChange
        From `prepare`.
    now : float
        Seconds on the shell's clock.
    """
    if change.policy is None:
        state.adopt_policy(state.policy, change.weighing)
        return
    requeue_held(state)
    state.adopt_policy(change.policy, change.weighing)
    situation = state.situation(now)
    for worker in sorted(state.members.live_ids):
        state.policy.joined(worker, situation)
    settling.rebalance(state)
    if state.pulls:
        pulls.answer_all(state, now)
