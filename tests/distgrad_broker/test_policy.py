"""When a gradient counts."""

from __future__ import annotations

import pytest

from distgrad.wire import State
from distgrad_broker.policy import Asynchronous, Policy, Verdict
from support.core_kit import Kit

BASE = State("one", 0, 0)


@pytest.mark.parametrize(
    ("limit", "base", "staleness", "verdict"),
    [
        (None, BASE, 10**9, Verdict.APPLY),
        (None, BASE, None, Verdict.APPLY),
        (2, BASE, 2, Verdict.APPLY),
        (2, BASE, 3, Verdict.SUPERSEDE),
        (0, BASE, 0, Verdict.APPLY),
        (2, BASE, None, Verdict.SUPERSEDE),  # computed on parameters that were replaced
        (2, None, None, Verdict.APPLY),  # its worker does not say on what it was computed
        (2, BASE, -5, Verdict.APPLY),
    ],
)
def test_async_applies_unless_a_bound_on_staleness_is_exceeded(
    limit: int | None, base: State | None, staleness: int | None, verdict: Verdict
) -> None:
    kit = Kit()
    kit.hello()
    gradient = kit.gradient(1)
    gradient.base = base

    assert Asynchronous(limit).judge(gradient, staleness) is verdict


def test_async_needs_room_for_one_gradient() -> None:
    policy: Policy = Asynchronous()

    assert (policy.name, policy.must_hold) == ("async", 1)
