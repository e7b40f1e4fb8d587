"""What outlives a broker and how the next one goes on: members, queue, settings, and states that were shown before."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from distgrad.durable.replay import is_gradient
from distgrad.rules import Adam
from distgrad.wire import State
from distgrad_broker.bookkeeping import books_of
from distgrad_broker.members import Member
from support.core_kit import LAYOUT, ONE, OTHER, frames_of
from support.durable_kit import DurableKit

CHECKPOINT, NONE = "checkpoint", "none"
SYNC: dict[str, Any] = {"policy": "sync", "workers": 2}


def applied(*numbers: int, **config: Any) -> DurableKit:
    """Make a broker that has applied gradients of one worker, each computed on the version before it."""
    kit = DurableKit(**config)
    kit.greet()
    for number in numbers:
        kit.push(number, base=list(kit.state.name))
        kit.work()
    kit.write()
    return kit


def stepped(steps: int, **config: Any) -> DurableKit:
    """Make a broker that has made steps of two workers."""
    kit = DurableKit(**{**SYNC, **config})
    kit.greet("a")
    kit.greet("b")
    for number in range(1, steps + 1):
        step(kit, number)
    kit.write()
    return kit


def step(kit: DurableKit, number: int, base: State | None = None) -> None:
    for worker, value in (("b", 2.0), ("a", 1.0)):
        kit.push(number, worker=worker, value=value * number, base=list(base or kit.state.name))
    kit.work(2)


def kinds(kit: DurableKit) -> list[str]:
    return [
        "gradient" if is_gradient(record.header) else msgpack.unpackb(record.header)[0]
        for record in kit.core.take_records()
    ]


# The beginning


def test_a_first_start_notes_who_began_by_what_it_decides_and_the_parameters() -> None:
    kit = DurableKit(optimizer="sgd", lr=0.5, policy="sync", workers=2)

    began, configured, given = (msgpack.unpackb(record.header) for record in kit.core.take_records()[:3])

    assert (began[0], began[1]["incarnation"], began[1]["running"], began[1]["executor"]) == (
        "began",
        "one",
        True,
        "numpy",
    )
    assert (configured[0], configured[1]["rule"][0], configured[1]["rule"][1]["lr"]) == ("configured", "sgd", 0.5)
    assert configured[1]["policy"][0] == "sync"
    assert (given[0], given[1]["version"], given[1]["layout"]) == ("set", 0, LAYOUT.to_frame())


def test_the_parameters_that_are_noted_at_the_start_are_copies() -> None:
    kit = DurableKit()
    (given,) = [record for record in kit.core.take_records() if b"layout" in record.header]
    assert kit.holder.storage is not None

    kit.holder.storage.arenas[0][:] = 9.0

    assert sum(len(part) for part in given.parts) == LAYOUT.parameter_bytes
    assert not any(any(bytes(part)) for part in given.parts)


def test_a_later_start_notes_no_parameters_that_are_in_the_folder_already() -> None:
    assert kinds(applied(1).crash("two")) == ["began", "configured"]


def test_without_parameters_none_are_noted() -> None:
    assert kinds(DurableKit(layout=None)) == ["began", "configured"]


def test_with_nothing_but_checkpoints_there_are_no_records() -> None:
    kit = DurableKit(durability=NONE)

    assert (kit.state.records, kinds(kit)) == (None, [])


# What comes back


def test_a_restart_goes_on_where_the_last_broker_was() -> None:
    kit = applied(1, 2)
    kit.push(3, value=float("nan"))
    kit.work()
    kit.push(4)
    kit.write()

    again = kit.crash()

    member = again.member()
    assert (again.total, again.state.name) == (-16.0, State("two", 0, 2))
    assert (member.accepted, member.decided, member.settled) == (4, 3, 3)
    assert (member.applied, member.refused, member.examples) == (2, 1, 2)
    assert (again.state.outcomes, again.state.refused) == ({"applied": 2, "refused": 1}, {"not_finite": 1})
    assert [gradient.number for gradient in again.state.queue] == [4]
    assert (member.queued_bytes, member.committed, again.state.queued_bytes) == (ONE, ONE, ONE)


def test_a_restart_gives_the_same_bits_as_none_also_with_a_rule_that_has_state() -> None:
    whole = DurableKit(own_rule=Adam(lr=0.5))
    whole.greet()
    broken = DurableKit(own_rule=Adam(lr=0.5))
    broken.greet()
    for number in range(1, 7):
        for kit in (whole, broken):
            kit.push(number, value=float(number))
            kit.work()
            kit.write()
        if number == 2:
            broken.checkpoint()
        if number in (3, 5):
            session = broken.sessions["w"]
            broken = broken.crash(f"later {number}", own_rule=Adam(lr=0.5))
            broken.greet(session=session, lowest=number + 1)

    for one, other in zip(whole.holder.state.values(), broken.holder.state.values(), strict=True):
        assert one[0].tobytes() == other[0].tobytes()
    assert whole.total == broken.total
    assert whole.holder.steps == broken.holder.steps == 6


def test_the_queue_comes_back_in_the_order_of_acceptance_and_is_applied_once() -> None:
    kit = DurableKit(stopped=True)
    kit.greet("a")
    kit.greet("b")
    for worker, number in (("b", 1), ("a", 1), ("b", 2)):
        kit.push(number, worker=worker)
    kit.write()
    kit.checkpoint()
    kit.push(2, worker="a")
    kit.write()

    again = kit.crash()
    assert [(gradient.worker, gradient.number) for gradient in again.state.queue] == [
        ("b", 1),
        ("a", 1),
        ("b", 2),
        ("a", 2),
    ]
    again.written("start")
    again.work(9)
    again.write()

    assert again.total == -32.0
    assert [again.member(worker).settled for worker in ("a", "b")] == [2, 2]
    assert again.crash("three").total == -32.0


def test_a_checkpoint_taken_while_gradients_are_held_and_queued_brings_them_back() -> None:
    kit = stepped(1)
    base = list(kit.state.name)
    kit.push(2, worker="b", value=4.0, base=base)
    kit.work()
    kit.push(2, worker="a", value=2.0, base=base)
    assert (len(kit.state.held), len(kit.state.queue)) == (1, 1)
    kit.checkpoint()

    again = kit.crash(**SYNC)
    assert again.recovered.records == 0, "all is from the checkpoint, and the gradients from records before it"
    again.work(2)
    again.write()

    whole = stepped(2)
    assert (again.holder.version, again.total) == (2, whole.total)
    assert [again.member(worker).settled for worker in ("a", "b")] == [2, 2]


def test_a_record_that_a_held_gradient_needs_outlives_checkpoints() -> None:
    kit = DurableKit(**SYNC, segment_bytes=4096, keep_checkpoints=1)
    kit.greet("a")
    kit.greet("b")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    for _ in range(3):
        for _ in range(100):
            kit.written("configure", settings={"reduction": "mean"})
        kit.checkpoint()

    again = kit.crash(**SYNC)

    assert [(gradient.worker, gradient.number) for gradient in again.state.queue] == [("a", 1)]


def test_without_a_journal_of_gradients_the_queue_is_not_kept_and_sent_again() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1, cursor="c1")
    kit.work()
    kit.push(2, cursor="c2")
    kit.checkpoint()

    again = kit.crash(durability=CHECKPOINT)
    book = again.book()
    header = again.greet(session=kit.sessions["w"], lowest=2)

    assert (book.accepted, book.cursor) == (header["accepted"], header["cursor"]) == (1, "c1")
    assert (len(again.state.queue), again.total) == (0, -8.0)


def test_without_a_journal_of_gradients_a_crash_takes_back_what_no_checkpoint_has() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    for number in (1, 2, 3):
        kit.push(number)
        kit.work()
        if number == 1:
            kit.checkpoint()
    kit.write()

    again = kit.crash(durability=CHECKPOINT)

    assert (again.total, again.holder.version, again.member().accepted) == (-8.0, 1, 1)


def test_new_parameters_survive_a_crash_without_a_journal_of_gradients_too() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.written("set", frames_of(LAYOUT, 2.0))

    assert kit.crash(durability=CHECKPOINT).total == 16.0


def test_a_stopped_broker_comes_back_stopped_and_a_started_one_running() -> None:
    kit = DurableKit()
    kit.written("stop")
    stopped = kit.crash("two")
    assert not stopped.state.is_running

    stopped.written("start")

    assert stopped.crash("three").state.is_running


def test_who_starts_it_stopped_means_it() -> None:
    assert not applied(1).crash(stopped=True).state.is_running


def test_replaced_parameters_keep_their_generation_and_clear_the_queue_of_another_layout() -> None:
    kit = applied(1)
    kit.push(2)
    kit.written("set", frames_of(OTHER, 1.0))
    kit.push(3)  # of the former layout
    kit.write()

    again = kit.crash()
    again.work(2)
    again.write()

    assert (again.state.name, again.state.fingerprint) == (State("two", 1, 1), OTHER.fingerprint)
    assert (again.member().settled, again.state.refused) == (3, {"layout": 2})


def test_parameters_that_were_taken_away_stay_away_and_gradients_wait() -> None:
    kit = applied(1)
    kit.push(2)
    kit.written("set", absent=True)

    again = kit.crash(layout=None)

    assert (again.holder.layout, again.state.generation, len(again.state.queue)) == (None, 1, 1)
    again.written("set", frames_of(LAYOUT, 0.0))
    again.work()
    assert again.total == -8.0


def test_a_destroyed_broker_comes_back_empty_running_and_with_its_workers_numbers() -> None:
    kit = applied(1, 2)
    kit.push(3)
    kit.written("destroy")

    again = kit.crash(layout=None)

    assert (again.holder.layout, again.state.is_destroyed, again.state.is_running) == (None, False, True)
    assert (again.state.name, again.member().settled) == (State("two", 1, 2), 3)
    assert again.written("set", frames_of(LAYOUT, 1.0))["ok"]
    assert again.crash("three").total == 8.0


def test_a_destroyed_broker_comes_back_empty_where_only_checkpoints_are_kept() -> None:
    kit = DurableKit(durability=NONE)
    kit.checkpoint()
    envelope = kit.send("destroy")
    kit.wait(0.0)
    kit.write()

    assert kit.header(envelope)["ok"]
    assert kit.crash(layout=None, durability=NONE).holder.layout is None


def test_outcomes_decided_out_of_turn_are_counted_once() -> None:
    for checkpointed in (False, True):
        kit = DurableKit(**SYNC)
        kit.greet("a")
        kit.greet("b")
        kit.push(1, 2, worker="a", base=["one", 0, 0])
        kit.work(2)
        kit.write()
        if checkpointed:
            kit.checkpoint()

        again = kit.crash(**SYNC)
        again.greet("b", session=kit.sessions["b"])
        again.work()
        again.push(1, worker="b", base=["one", 0, 0])
        again.work()
        again.write()

        assert (again.state.outcomes, again.state.refused) == ({"applied": 2, "refused": 1}, {"second": 1})
        assert (again.member("a").settled, again.member("a").refused) == (2, 1)


def test_a_checkpoint_counts_what_it_covers_also_what_is_not_settled_yet() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1, value=float("nan"))
    kit.push(2)
    kit.work(2)
    kit.checkpoint()

    again = kit.crash()

    assert (again.state.outcomes, again.state.refused) == ({"applied": 1, "refused": 1}, {"not_finite": 1})
    assert (again.member().applied, again.member().refused) == (1, 1)


# Policies


def test_the_members_of_a_fixed_set_are_remembered() -> None:
    for checkpointed in (False, True):
        kit = stepped(1)
        if checkpointed:
            kit.checkpoint()

        again = kit.crash(**SYNC)

        assert again.state.policy.memory() == {"members": ["a", "b"]}
        assert again.ask("status")["status"]["waits_for"] == ["a", "b"]


def test_who_has_left_a_fixed_set_is_forgotten() -> None:
    kit = stepped(1)
    kit.written("leave", worker="a", session=kit.sessions["a"])

    assert kit.crash(**SYNC).state.policy.memory() == {"members": ["b"]}


def test_the_members_of_a_step_that_time_has_closed_are_remembered() -> None:
    config: dict[str, Any] = {**SYNC, "quorum": 1, "grace": 0.5}
    kit = DurableKit(**config)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.write()
    kit.wait(0.6)
    assert kit.holder.version == 1
    kit.write()

    assert kit.crash(**config).state.policy.memory() == kit.state.policy.memory() == {"members": ["a"]}


def test_a_member_whose_gradient_was_cleared_is_remembered() -> None:
    kit = DurableKit(**SYNC)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.written("clear")

    assert kit.crash(**SYNC).state.policy.memory() == kit.state.policy.memory() == {"members": ["a"]}


def test_a_policy_that_was_configured_anew_does_not_remember_the_former_ones_members() -> None:
    kit = stepped(1)
    kit.greet("c")
    kit.written("configure", settings={"workers": 2})
    kit.push(1, worker="c", base=list(kit.state.name))
    kit.work()
    kit.write()
    assert [held.gradient.worker for held in kit.state.held] == ["c"]

    again = kit.crash(**SYNC)
    again.work()

    assert [held.gradient.worker for held in again.state.held] == ["c"]


def test_an_elastic_step_waits_for_recovered_workers_until_their_leases_end() -> None:
    config: dict[str, Any] = {"policy": "sync", "workers_silent_after": 10.0}
    kit = DurableKit(**config)
    kit.greet("a")
    kit.greet("b")

    again = kit.crash(**config)
    again.greet("a", session=kit.sessions["a"])
    again.push(1, worker="a", base=["one", 0, 0])
    again.work()
    assert (again.holder.version, again.ask("status")["status"]["waits_for"]) == (0, ["b"])
    again.wait(6.0)
    again.beat("a")
    again.wait(6.0)

    assert again.holder.version == 1


def test_gradients_that_were_held_are_offered_to_the_policy_of_the_new_start() -> None:
    kit = DurableKit(**SYNC)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.write()

    again = kit.crash(policy="async")
    again.work()

    assert again.total == -8.0


def test_a_policy_configured_while_gradients_are_held_gets_them_also_after_a_restart() -> None:
    kit = DurableKit(**SYNC)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.written("configure", settings={"policy": "async"})

    again = kit.crash(**SYNC)

    assert (again.state.policy.name, len(again.state.queue)) == ("async", 1)
    again.work()
    assert again.total == -8.0


# States that were shown before


@pytest.mark.parametrize(
    ("config", "base", "outcome"),
    [
        ({}, ["one", 0, 1], "applied"),
        ({}, ["one", 0, 3], "applied"),
        ({}, ["never", 0, 1], "applied"),
        ({"max_staleness": 1}, ["one", 0, 2], "applied"),
        ({"max_staleness": 1}, ["one", 0, 1], "applied"),
        ({"max_staleness": 1}, ["one", 0, 0], "superseded"),
        ({"max_staleness": 1}, ["one", 0, 3], "superseded"),
        ({"max_staleness": 1}, ["never", 0, 2], "superseded"),
        ({"policy": "sync"}, ["one", 0, 2], "applied"),
        ({"policy": "sync"}, ["one", 0, 1], "superseded"),
        ({"policy": "sync"}, ["one", 0, 3], "superseded"),
        ({"policy": "sync"}, ["never", 0, 2], "superseded"),
        ({"policy": "sync", "workers": 1}, ["one", 0, 2], "applied"),
        ({"policy": "sync", "workers": 1}, ["one", 0, 1], "superseded"),
        ({"policy": "sync", "workers": 1}, ["never", 0, 2], "superseded"),
    ],
)
def test_what_a_gradient_was_computed_on_is_judged_by_how_much_of_it_has_survived(
    config: dict[str, Any], base: list[Any], outcome: str
) -> None:
    """The first broker had 2 updates on the disk, showed a third, and crashed."""
    kit = applied(1, 2, **config)
    kit.push(3, base=["one", 0, 2])
    kit.work()
    assert kit.state.name == State("one", 0, 3)

    again = kit.crash(**config)
    again.greet(session=kit.sessions["w"], lowest=3)
    again.push(3, base=base)
    again.work()
    again.write()

    assert again.member().settled == 3
    assert again.state.outcomes - Counter(applied=2) == {outcome: 1}


def test_staleness_counts_on_through_restarts() -> None:
    kit = applied(1, 2)
    again = kit.crash("two")
    again.greet(session=kit.sessions["w"], lowest=3)
    again.push(3, base=["two", 0, 2])
    again.work()
    again.write()

    third = again.crash("three")
    third.greet(session=again.sessions["w"], lowest=4)
    third.push(4, base=["one", 0, 1])
    third.push(5, base=["two", 0, 3])
    third.work(2)

    assert (third.member().staleness_sum, third.member().staleness_max) == (3, 2)


def test_a_version_beyond_the_present_one_of_the_same_broker_is_refused() -> None:
    kit = applied(1)
    kit.push(2, base=["one", 0, 2])
    kit.work()
    kit.write()

    assert kit.state.refused == {"from_the_future": 1}


def test_parameters_replaced_after_a_restart_are_no_state_that_was_shown_before() -> None:
    """The first broker showed its own new parameters, but a crash took them back before they were on the disk."""
    kit = stepped(1)
    kit.send("set", frames_of(LAYOUT, 5.0))
    assert kit.state.generation == 1

    again = kit.crash(**SYNC)
    again.greet("a", session=kit.sessions["a"], lowest=2)
    again.written("set", frames_of(LAYOUT, 100.0))
    again.push(2, worker="a", base=["one", 1, 1])
    again.work()
    again.write()

    assert again.state.outcomes["superseded"] == 1


def test_parameters_replaced_after_a_restart_are_none_either_after_one_more() -> None:
    kit = stepped(1)
    kit.send("set", frames_of(LAYOUT, 5.0))

    again = kit.crash(**SYNC)
    again.written("set", frames_of(LAYOUT, 100.0))
    third = again.crash("three", **SYNC)
    third.greet("a", session=kit.sessions["a"], lowest=2)
    third.push(2, worker="a", base=["one", 1, 1])
    third.work()
    third.write()

    assert third.state.outcomes["superseded"] == 1


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


# Cost


class Counting(deque[Any]):
    """Counts how often an element is looked at."""

    looks = 0

    def __iter__(self) -> Iterator[Any]:
        for each in super().__iter__():
            self.looks += 1
            yield each


def test_the_books_of_many_workers_are_not_written_in_worker_times_gradient_steps() -> None:
    """The loop waits for it: 0.8 s for 256 workers and 100,000 unsettled gradients."""
    kit = DurableKit(durability=CHECKPOINT)
    members = [Member(f"w{number}", None, False) for number in range(64)]
    for member in members:
        kit.state.members.add(member)
    kit.state.unsettled = unsettled = Counting((1, members[number % 64], ONE, None) for number in range(1000))

    books_of(kit.state)

    assert unsettled.looks <= 10 * 1000
