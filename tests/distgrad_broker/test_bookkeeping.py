"""What outlives a broker and how the next one goes on: members, queue, settings, and states that were shown before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import msgpack

from distgrad.durable.replay import is_gradient
from distgrad.rules import Adam
from distgrad.wire import State
from distgrad_broker.bookkeeping import books_of
from distgrad_broker.members import Member
from support.core_kit import LAYOUT, ONE, OTHER, frames_of
from support.durable_kit import SYNC, DurableKit, applied, stepped

CHECKPOINT, NONE = "checkpoint", "none"


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
