"""What the core does with what a policy says: steps, order of settling, pulls that wait."""

from __future__ import annotations

from typing import Any

import pytest

from distgrad.policies import APPLY, HOLD, Action, Buffered, Decision, Offered, Policy, Situation, Synchronous, Weighing
from distgrad_broker.events import TimePassed
from support.core_kit import LAYOUT, ONE, OTHER, Kit, frames_of
from support.steps import push, sync_kit


def test_a_step_is_the_mean_of_its_gradients_and_settles_them_all() -> None:
    kit = sync_kit("a", "b")

    push(kit, "a", value=1.0)
    assert (kit.total, kit.member("a").settled, len(kit.state.held)) == (0, 0, 1)
    push(kit, "b", value=3.0)

    assert kit.total == -8 * 2.0
    assert (kit.holder.version, kit.state.outcomes["applied"]) == (1, 2)
    assert [kit.member(worker).settled for worker in "ab"] == [1, 1]
    assert (kit.state.queued_bytes, kit.state.held) == (0, [])


@pytest.mark.parametrize(
    ("weighing", "total"),
    [(Weighing("sum"), 4.0), (Weighing(weigh_by_examples=True), 1.5), (Weighing("sum", weigh_by_examples=True), 6.0)],
)
def test_a_step_is_weighed_as_asked(weighing: Weighing, total: float) -> None:
    kit = sync_kit("a", "b", weighing=weighing)

    push(kit, "a", value=1.0, examples=3)
    push(kit, "b", value=3.0, examples=1)

    assert kit.total == -8 * total


def test_what_is_decided_behind_a_held_gradient_settles_after_it() -> None:
    kit = sync_kit("a", "b")
    push(kit, "a", 1)

    push(kit, "a", 2)

    assert (kit.member("a").settled, kit.member("a").refusals) == (0, type(kit.member("a").refusals)())
    push(kit, "b")
    assert kit.member("a").settled == 2
    assert [refusal[:2] for refusal in kit.member("a").refusals] == [(2, "second")]
    assert kit.state.outcomes == {"applied": 2, "refused": 1}


def test_a_base_from_the_future_is_refused_under_every_policy() -> None:
    for kit in (Kit(), sync_kit("w")):
        kit.hello()
        incarnation, generation, version = kit.core.name
        kit.push(1, base=[incarnation, generation, version + 1])
        kit.work()

        assert kit.state.refused == {"from_the_future": 1}


def test_a_superseded_gradient_is_counted_and_its_worker_told_the_version() -> None:
    kit = sync_kit("a")
    stale = list(kit.core.name)
    push(kit, "a", 1)
    push(kit, "a", 2, base=stale)

    beat = kit.beat("a", settled=2)

    assert (beat["superseded"], beat["version"], beat["settled"]) == (1, 1, 2)


def test_a_dead_worker_delays_the_others_by_its_lease_and_no_longer() -> None:
    kit = sync_kit("a", "b", "c")
    push(kit, "a")
    push(kit, "b")
    kit.wait(29.9)
    for worker in "ab":
        kit.beat(worker)
    assert kit.holder.version == 0

    kit.wait(0.3)

    assert (kit.holder.version, kit.state.outcomes["applied"]) == (1, 2)


def test_the_end_of_a_grace_closes_the_step_without_any_message() -> None:
    kit = sync_kit("a", "b", policy=Synchronous(quorum=1, grace=2.0))
    push(kit, "a")
    due = kit.core.next_deadline()
    assert due == kit.now + 2.0

    kit.now = due
    kit.handle(TimePassed())

    assert kit.holder.version == 1
    assert kit.core.next_deadline() is None


def test_a_step_is_not_applied_while_the_updater_is_stopped() -> None:
    kit = sync_kit("a", "b", policy=Synchronous(quorum=1, grace=2.0))
    push(kit, "a")
    kit.ask("stop")
    assert kit.core.next_deadline() is None
    kit.wait(3.0)
    assert kit.holder.version == 0

    kit.ask("start")

    assert kit.holder.version == 1


def test_clear_settles_what_is_held_too() -> None:
    kit = sync_kit("a", "b")
    push(kit, "a")

    assert kit.ask("clear")["cleared"] == 1
    push(kit, "b")
    push(kit, "a", 2)
    assert kit.state.outcomes == {"cleared": 1, "applied": 2}


def test_new_parameters_supersede_what_was_held_for_the_old_ones() -> None:
    kit = sync_kit("a", "b")
    push(kit, "a")

    kit.ask("set", frames_of(LAYOUT, 0.0))
    kit.work()

    assert kit.state.outcomes == {"superseded": 1}


def test_a_buffer_survives_new_parameters_of_the_same_layout_and_not_of_another() -> None:
    for layout, outcome in ((LAYOUT, "applied"), (OTHER, "refused")):
        kit = sync_kit("a", policy=Buffered(2))
        push(kit, "a", 1)
        kit.ask("set", frames_of(layout, 0.0))
        kit.work()
        kit.push(2, worker="a", layout=layout)
        kit.work()
        kit.push(3, worker="a", layout=layout)
        kit.work()

        assert kit.state.outcomes[outcome] >= 1


def test_a_worker_that_flushes_a_partial_buffer_is_not_left_waiting() -> None:
    kit = sync_kit("a", policy=Buffered(9, grace=1.0))
    push(kit, "a")
    beat = kit.send("heartbeat", wait_s=0.05, **kit.beat_keys("a", sent=1, until=1))

    due = kit.core.next_deadline()
    assert due is not None
    kit.wait(1.1)

    assert kit.member("a").settled == 1
    assert kit.replies_to(beat)


# Pulls


def get(kit: Kit, worker: str | None, pushed: int = 0, wait_s: float = 5.0) -> bytes:
    keys: dict[str, Any] = {} if worker is None else {"worker": worker, "pushed": pushed}
    return kit.send("get", newer_than=None, have=None, wait_s=wait_s, **keys)


def test_a_pull_waits_for_the_step_that_its_worker_has_taken_part_in() -> None:
    kit = sync_kit("a", "b")
    push(kit, "a")
    pull, anybody = get(kit, "a", 1), get(kit, None)
    assert (kit.replies_to(pull), len(kit.replies_to(anybody))) == ([], 1)

    push(kit, "b")

    (reply,) = kit.replies_to(pull)
    assert (reply.header["unchanged"], reply.header["version"]) == (False, 1)


def test_a_pull_waits_until_all_that_its_worker_pushed_was_decided_on() -> None:
    """Its request may overtake the gradient, which comes on another socket."""
    kit = sync_kit("a")
    pull = get(kit, "a", 1)
    assert kit.replies_to(pull) == []

    push(kit, "a")

    assert kit.replies_to(pull)[0].header["version"] == 1


def test_a_pull_that_may_not_wait_is_told_at_once_that_there_is_nothing() -> None:
    kit = sync_kit("a", "b")
    push(kit, "a")

    (reply,) = kit.replies_to(get(kit, "a", 1, wait_s=0.0))
    assert reply.header["unchanged"]


def test_the_end_of_a_lease_lets_pulls_go_on() -> None:
    kit = sync_kit("a", "b")
    push(kit, "a")
    kit.wait(29.0)
    kit.beat("a")
    pull = get(kit, "a", 1)
    kit.wait(2.0)

    assert kit.replies_to(pull)[0].header["version"] == 1


# Budget and change


def test_a_worker_too_many_for_the_budget_is_refused_with_the_bound() -> None:
    kit = Kit(policy=Synchronous(), queue_bytes=2 * ONE)
    kit.hello("a")
    kit.hello("b")

    refused = kit.ask("hello", worker="c", nonce=b"nonce of c")

    assert refused["error"] == "too_large"
    assert str(3 * ONE) in refused["message"]


def test_a_policy_that_must_hold_more_than_the_budget_is_refused_at_configure() -> None:
    kit = Kit(queue_bytes=4 * ONE)

    refused = kit.ask("configure", settings={"policy": "buffered", "buffer_size": 5})

    assert (refused["error"], kit.state.policy.name) == ("too_large", "async")
    assert str(5 * ONE) in refused["message"]


def test_a_worker_that_comes_late_has_room_though_the_others_have_pushed_all_they_could() -> None:
    """Regression: with a gradient in the step each, and one behind it, they had all of the room (198203)."""
    kit = Kit(policy=Synchronous(workers=5), queue_bytes=8 * ONE)

    def push_all_that_fits(worker: str) -> None:
        member = kit.member(worker)
        while kit.beat(worker, want=ONE)["grant"] >= member.queued_bytes + ONE:
            kit.push(member.accepted + 1, worker=worker, base=["one", 0, 0])
            kit.work()

    for worker in "abcd":
        kit.hello(worker)
        push_all_that_fits(worker)
    for worker in "abcd":
        push_all_that_fits(worker)
    assert kit.state.policy.waits_for(kit.state.situation(kit.now)) == ["1 more worker(s)"]

    kit.hello("e")
    assert kit.beat("e", want=ONE)["grant"] >= ONE
    kit.push(1, worker="e", base=["one", 0, 0])
    kit.work()

    assert (kit.holder.version, kit.state.queued_bytes) == (1, 0)


def test_a_set_whose_missing_members_would_have_no_room_is_refused_at_configure() -> None:
    kit = Kit(queue_bytes=8 * ONE)

    def join(*workers: str) -> None:
        for worker in workers:
            kit.hello(worker)
        for worker in [member.worker for member in kit.state.members] * 2:
            kit.beat(worker)

    join(*"abcd")
    refused = kit.ask("configure", settings={"policy": "sync", "workers": 5})

    assert (refused["error"], kit.state.policy.name) == ("too_large", "async")
    assert f"leaves {ONE} bytes too few of --queue-bytes {8 * ONE}" in refused["message"]
    join("e")
    assert kit.ask("configure", settings={"policy": "sync", "workers": 5})["ok"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"policy": "sinc"}, "must be one of"),
        ({"policy": "sync", "quorum": 2000}, "max_workers"),
        ({"policy": "bounded", "bound": 0}, "at least 1"),
        ({"quorum": 2}, "belongs to sync"),
        ({"reduction": "median"}, "mean, sum"),
        ({"policy_settings": "ab"}, "must be a map"),
        ({"policy": "sync", "lr": 0.1}, "no optimizer"),
    ],
)
def test_configure_changes_all_or_nothing(settings: dict[str, object], word: str) -> None:
    kit = Kit()

    refused = kit.ask("configure", settings=settings)

    assert word in refused["message"]
    assert (kit.state.policy.name, kit.state.weighing) == ("async", Weighing())


def test_configure_offers_what_was_held_to_the_new_policy() -> None:
    kit = sync_kit("a", "b")
    push(kit, "a")

    told = kit.ask("configure", settings={"policy": "async", "staleness_scaling": "sqrt"})["settings"]
    kit.work()

    assert (told["policy"], told["staleness_scaling"]) == ("async", "sqrt")
    assert kit.state.outcomes == {"applied": 1}


def test_configure_keeps_the_settings_that_it_does_not_name() -> None:
    kit = Kit(policy=Synchronous(quorum=3))

    told = kit.ask("configure", settings={"grace": 2.0, "reduction": "sum"})["settings"]

    assert (told["quorum"], told["grace"], told["reduction"]) == (3, 2.0, "sum")


def test_status_says_whom_a_step_waits_for() -> None:
    kit = sync_kit("a", "b")
    push(kit, "a")

    status = kit.ask("status")["status"]

    assert (status["held"], status["waits_for"], status["policy"]["policy"]) == (1, ["b"], "sync")


class Halved(Policy):
    """Holds the first gradient of each worker for ever, and halves the others."""

    name = "halved"
    holds = True

    def offer(self, gradient: Offered, staleness: int | None, situation: Situation) -> Decision:
        return HOLD if gradient.number == 1 else Decision(Action.APPLY, 0.5)


def test_a_factor_scales_what_is_applied_at_once_and_numbers_wait_for_their_turn() -> None:
    kit = sync_kit("a", policy=Halved())
    push(kit, "a", 1)

    push(kit, "a", 2)

    assert (kit.total, kit.member("a").settled) == (-4, 0)
    kit.ask("clear")
    assert kit.member("a").settled == 2
    assert APPLY.factor == 1.0
