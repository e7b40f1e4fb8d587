"""Versions that a crash took back: they come again to the bit, and are waited for as long as they can."""

from __future__ import annotations

import pytest

from distgrad.wire import State
from support.durable_kit import SYNC, DurableKit, step, stepped

CHECKPOINT = "checkpoint"


def early_kit() -> tuple[DurableKit, DurableKit]:
    """Crash a broker whose third step was shown and is not on the disk; give it, and the one after it."""
    kit = stepped(2)
    step(kit, 3)
    assert kit.state.name == State("one", 0, 3)
    again = kit.crash(**SYNC)
    for worker in ("a", "b"):
        again.greet(worker, session=kit.sessions[worker], lowest=3)
    return kit, again


def test_a_step_that_a_crash_took_back_comes_again_to_the_bit_and_what_was_computed_on_it_counts() -> None:
    whole = stepped(4)
    kit, again = early_kit()
    shown = list(kit.state.name)

    again.push(3, worker="a", value=3.0, base=["one", 0, 2])
    again.push(4, worker="a", value=4.0, base=shown)
    again.work(2)
    again.push(3, worker="b", value=6.0, base=["one", 0, 2])
    again.work(2)
    again.push(4, worker="b", value=8.0, base=shown)
    if again.member("a").accepted == 3:
        again.push(4, worker="a", value=4.0, base=shown, attempt=2)
    again.work(4)
    again.write()

    assert (again.holder.version, again.total) == (4, whole.total)
    assert [again.member(worker).settled for worker in ("a", "b")] == [4, 4]


def test_a_gradient_of_a_step_that_has_not_come_again_makes_nobody_send_it_in_vain() -> None:
    """Its worker takes what it has to send five times for undeliverable, and ends."""
    kit, again = early_kit()
    again.push(3, worker="a", value=3.0, base=["one", 0, 2])
    again.push(4, worker="a", value=4.0, base=list(kit.state.name))
    again.work(2)

    again.push(5, worker="a", value=5.0, base=["one", 0, 4])

    assert not again.beat("a", sent=5)["resend"]


@pytest.mark.parametrize("is_decided", [False, True])
def test_a_version_that_cannot_come_again_is_not_waited_for(is_decided: bool) -> None:
    """Regression: what was computed on a version before a configure was held then, and superseded after the crash."""
    kit = stepped(2, durability=CHECKPOINT)
    kit.checkpoint()
    again = kit.crash(**SYNC, durability=CHECKPOINT)
    again.greet("a", session=kit.sessions["a"], lowest=3)
    again.state.repeatable = ["one"]
    again.push(3, worker="a", base=["one", 0, 1])
    if is_decided:
        again.work()
        assert again.state.outcomes["superseded"] == 1, "not as it was when its version was made"

    again.push(4, worker="a", base=["one", 0, 3])
    again.work()
    if not is_decided:
        assert again.member("a").missing
        again.push(4, worker="a", base=["one", 0, 3], attempt=2)
        again.work()

    assert again.state.repeatable == []
    assert again.state.outcomes["superseded"] == 2
    assert not again.member("a").is_early


def test_a_version_is_waited_for_as_long_as_its_step_may_still_be_made() -> None:
    kit, again = early_kit()
    shown = list(kit.state.name)
    again.push(3, worker="a", value=3.0, base=["one", 0, 2])
    again.push(4, worker="a", value=4.0, base=shown)
    again.work(2)
    again.push(4, worker="a", value=4.0, base=shown, attempt=2)

    assert again.member("a").is_early
    assert again.state.repeatable == ["one"]


@pytest.mark.parametrize(("mode", "repeatable"), [("descent", ["one"]), ("ascent", [])])
def test_versions_come_again_in_spite_of_a_configure_that_changes_nothing(mode: str, repeatable: list[str]) -> None:
    """Regression: a replay saw that nothing had changed, and had what the broker had not waited for wait."""
    _, again = early_kit()
    assert again.state.repeatable == ["one"]

    again.written("configure", settings={"mode": mode})

    assert again.state.repeatable == repeatable
    assert again.crash(**SYNC).state.repeatable == [*repeatable, "two"]
