"""Gradients of a step that are not finite, or too large: they are refused, and the step is made of the others."""

from __future__ import annotations

import numpy as np

from distgrad.policies import Buffered, Synchronous, Weighing
from distgrad.rules import Adam
from support.steps import push, sync_kit


def test_a_bad_gradient_is_refused_alone_and_the_step_goes_on_without_it() -> None:
    kit = sync_kit("a", "b")

    push(kit, "a", value=np.nan)
    push(kit, "b", value=2.0)
    kit.work(2)

    assert kit.state.refused == {"not_finite": 1}
    assert [refusal[:2] for refusal in kit.member("a").refusals] == [(1, "not_finite")]
    assert [kit.member(worker).settled for worker in "ab"] == [1, 1]
    assert (kit.total, kit.holder.version) == (-8 * 2.0, 1)
    assert (kit.state.queued_bytes, kit.state.held, kit.core.has_work) == (0, [], False)


def test_a_rule_that_takes_less_than_all_finite_numbers_looks_at_each_gradient_when_it_comes() -> None:
    """A sum would not tell: what is too large of two may cancel out."""
    kit = sync_kit("a", "b", rule=Adam())

    push(kit, "a", value=1e30)
    assert (kit.state.refused, kit.member("a").settled) == ({"overflow": 1}, 1)
    push(kit, "b", value=-1e30)

    assert kit.state.refused == {"overflow": 2}
    assert kit.holder.version == 0


def test_a_step_that_has_lost_its_quorum_to_a_bad_gradient_waits_for_another() -> None:
    kit = sync_kit("a", "b", "c", policy=Synchronous(quorum=2), weighing=Weighing("sum"))

    push(kit, "a", value=np.inf)
    push(kit, "b", value=2.0)
    kit.work(2)
    assert (kit.state.refused, kit.holder.version, len(kit.state.held)) == ({"not_finite": 1}, 0, 1)
    push(kit, "c", value=3.0)

    assert (kit.total, kit.holder.version) == (-8 * 5.0, 1)
    push(kit, "a", 2)
    push(kit, "c", 2)
    assert kit.holder.version == 2


def test_all_that_had_a_bad_gradient_in_a_step_have_taken_part_in_it() -> None:
    """However late they are found: else a step would wait for one of them after the other."""
    kit = sync_kit("a", "b", "c", policy=Synchronous(quorum=2), weighing=Weighing("sum"))

    push(kit, "a", value=np.nan)
    push(kit, "b", value=2.0)
    kit.work(2)
    push(kit, "c", value=np.nan)

    assert (kit.total, kit.holder.version) == (-8 * 2.0, 1)
    assert kit.state.refused == {"not_finite": 2}
    assert not kit.state.versions.checks_each


def test_a_full_buffer_with_bad_gradients_refuses_these_and_is_filled_up() -> None:
    kit = sync_kit("a", "b", policy=Buffered(4), weighing=Weighing("sum"))

    for number, value in enumerate([1.0, np.nan, 2.0], 1):
        push(kit, "a", number, value=value)
    push(kit, "b", 1, value=-np.inf)
    kit.work(4)
    assert (dict(kit.state.refused), kit.holder.version, len(kit.state.held)) == ({"not_finite": 2}, 0, 2)
    push(kit, "b", 2, value=4.0)
    push(kit, "b", 3, value=8.0)

    assert (kit.total, kit.holder.version) == (-8 * 15.0, 1)
    assert (kit.member("a").settled, kit.member("b").settled) == (3, 3)


def test_a_draining_stop_counts_what_a_bad_sum_has_offered_again() -> None:
    kit = sync_kit("a", "b")
    for worker, value in (("a", 2.0), ("b", np.nan)):
        kit.push(1, worker=worker, value=value, base=list(kit.core.name))
    envelope = kit.send("stop", drain=True, incarnation="one")

    kit.work(4)

    assert [reply.header["drained"] for reply in kit.replies_to(envelope)] == [True]
    assert (kit.total, kit.state.refused, kit.state.drain_left) == (-8 * 2.0, {"not_finite": 1}, 0)


def test_a_sum_that_overflows_refuses_all_of_its_gradients() -> None:
    kit = sync_kit("a", "b", weighing=Weighing("sum"))

    push(kit, "a", value=3e38)
    push(kit, "b", value=3e38)
    kit.work(2)

    assert kit.state.refused == {"not_finite": 2}
    assert (kit.total, kit.holder.version) == (0, 0)
