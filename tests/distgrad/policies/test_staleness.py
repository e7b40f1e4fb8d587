"""Old gradients count less, or not at all; and async, which has nothing to be asked."""

from __future__ import annotations

import pytest

from distgrad.policies import (
    Action,
    Asynchronous,
    Policy,
    Situation,
    Staleness,
)
from support.policy_world import Gradient, Version


def test_async_has_nothing_to_be_asked() -> None:
    policy = Asynchronous()

    assert (policy.is_immediate, policy.must_hold(7), policy.next_deadline()) == (True, 1, None)


@pytest.mark.parametrize(
    ("policy", "factors"),
    [
        (Staleness(), [1, 1, 1]),
        (Staleness(staleness_scaling="inverse"), [1, 1 / 2, 1 / 4]),
        (Staleness(staleness_scaling="sqrt"), [1, 2**-0.5, 1 / 2]),
        (Staleness(staleness_decay=0.5), [1, 1 / 2, 1 / 8]),
    ],
)
def test_old_gradients_are_scaled_by_their_staleness(policy: Policy, factors: list[float]) -> None:
    decisions = [policy.offer(Gradient("a"), staleness, Situation(9, (), 0.0)) for staleness in (0, 1, 3)]

    assert [decision.factor for decision in decisions] == pytest.approx(factors)


@pytest.mark.parametrize(
    ("limit", "base", "staleness", "action"),
    [
        (2, Version(0), 2, Action.APPLY),
        (2, Version(0), 3, Action.SUPERSEDE),
        (0, Version(0), 0, Action.APPLY),
        (2, Version(0), None, Action.SUPERSEDE),  # computed on parameters that were replaced
        (2, None, None, Action.APPLY),  # its worker does not say on what it was computed
        (None, Version(0), 10**9, Action.APPLY),
    ],
)
def test_what_is_older_than_the_bound_is_superseded(
    limit: int | None, base: Version | None, staleness: int | None, action: Action
) -> None:
    gradient = Gradient("a", base=base)

    assert Staleness(limit).offer(gradient, staleness, Situation(9, (), 0.0)).action is action
