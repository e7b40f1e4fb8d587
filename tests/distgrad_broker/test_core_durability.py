"""What is told only when the disk has it: replies, settled numbers, refusals; and what is told if it does not."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from distgrad_broker.events import Log
from distgrad_broker.operations import OPERATIONS
from distgrad_broker.state import MAX_DISK_WAIT_S
from support.core_kit import LAYOUT, Kit, frames_of
from support.durable_kit import DurableKit

JOURNAL, CHECKPOINT, NONE = "journal", "checkpoint", "none"

# Each operation that changes something, but `save`, which waits for a checkpoint: how it is asked for.
MUTATING: dict[str, dict[str, Any]] = {
    "leave": {"worker": "w"},
    "set": {"frames": frames_of(LAYOUT, 3.0)},
    "start": {},
    "stop": {},
    "clear": {},
    "configure": {"settings": {"mode": "ascent"}},
    "evict": {"worker": "w"},
    "destroy": {},
}


def ready(op: str) -> DurableKit:
    """Make a broker whose disk has everything, and in which the operation changes something."""
    kit = DurableKit(stopped=op == "start")
    kit.greet()
    if op == "clear":
        kit.push(1)
    kit.write()
    return kit


def ask(kit: DurableKit, op: str, **keys: Any) -> bytes:
    keys = {**MUTATING[op], **keys}
    if op == "leave":
        keys["session"] = kit.sessions["w"]
    return kit.send(op, keys.pop("frames", ()), **keys)


def test_all_operations_that_change_something_are_looked_at_here() -> None:
    assert {name for name, operation in OPERATIONS.items() if operation.is_mutating} == {*MUTATING, "save"}


@pytest.mark.parametrize("op", MUTATING)
def test_the_reply_waits_for_the_record_of_what_was_done(op: str) -> None:
    kit = ready(op)
    before = kit.state.records and kit.state.records.sequence

    envelope = ask(kit, op)
    assert kit.state.records is not None
    assert kit.state.records.sequence != before, "there is a record"
    kit.wait(0.1)
    assert not kit.is_answered(envelope)
    kit.write()

    assert kit.header(envelope)["ok"]


@pytest.mark.parametrize("op", MUTATING)
def test_after_five_seconds_it_is_told_that_the_disk_does_not_take_it(op: str) -> None:
    kit = ready(op)
    kit.disk.fail_next("sync", errno.ENOSPC, times=1000)
    envelope = ask(kit, op)
    kit.write()

    kit.wait(MAX_DISK_WAIT_S - 0.01)
    assert not kit.is_answered(envelope)
    assert kit.core.next_deadline() is not None
    kit.wait(0.02)

    header = kit.header(envelope)
    assert (header["ok"], header["error"]) == (False, "failed")
    assert "it was done, but is not on the disk yet: No space left on device" in header["message"]


@pytest.mark.parametrize("op", MUTATING)
def test_a_crash_before_the_record_is_on_the_disk_undoes_it_and_one_after_it_does_not(op: str) -> None:
    kit = ready(op)
    before, after = kit.crash(), kit

    ask(after, op)
    after.write()
    again = after.crash()

    def seen(broker: DurableKit) -> Any:
        books = broker.recovered.books
        book = books.members["w"]
        return book.state, book.decided, broker.total, books.is_running, books.is_destroyed, broker.holder.mode

    assert seen(again) != seen(before)


def test_a_repeat_of_a_request_that_waits_gets_the_one_reply_when_the_disk_has_it() -> None:
    kit = DurableKit()
    kit.write()
    client: dict[str, Any] = {"client": b"c" * 16, "id": 1}
    kit.send("configure", settings={"mode": "ascent"}, envelope=b"first", **client)

    kit.send("configure", settings={"mode": "ascent"}, envelope=b"again", **client)
    kit.write()

    assert (kit.is_answered(b"first"), kit.header(b"again")["ok"]) == (False, True)
    assert sum(isinstance(effect, Log) and effect.phrase == "configured" for effect in kit.effects) == 1


def test_who_can_ask_again_is_told_to_and_waits_on_for_what_was_done_once() -> None:
    kit = DurableKit()
    kit.write()
    client: dict[str, Any] = {"client": b"c" * 16, "id": 1, "settings": {"mode": "ascent"}}
    kit.send("configure", envelope=b"first", **client)
    kit.wait(MAX_DISK_WAIT_S)
    assert kit.header(b"first")["error"] == "pending"

    kit.send("configure", envelope=b"again", **client)
    kit.wait(MAX_DISK_WAIT_S - 0.1)
    assert not kit.is_answered(b"again")
    kit.wait(0.2)
    assert kit.header(b"again")["error"] == "pending"
    kit.send("configure", envelope=b"once more", **client)
    kit.write()

    assert kit.header(b"once more")["settings"]["mode"] == "ascent"
    assert len(kit.replies_to(b"first")) == len(kit.replies_to(b"again")) == 1
    assert sum(isinstance(effect, Log) and effect.phrase == "configured" for effect in kit.effects) == 1


def test_a_slow_disk_is_told_from_one_that_fails() -> None:
    kit = DurableKit()
    envelope = kit.send("configure", settings={})

    kit.wait(MAX_DISK_WAIT_S)

    assert "the disk is slow" in kit.header(envelope)["message"]


@pytest.mark.parametrize("op", MUTATING)
def test_without_a_data_folder_the_reply_comes_at_once(op: str) -> None:
    kit = Kit(is_stopped=op == "start")
    kit.hello()
    keys = {**MUTATING[op], **({"session": kit.sessions["w"]} if op == "leave" else {})}

    assert kit.ask(op, keys.pop("frames", ()), **keys)["ok"]


def test_get_does_not_wait_for_the_disk() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    kit.work()

    assert kit.ask("get")["version"] == 1


def test_a_draining_stop_is_answered_when_the_disk_has_it_too() -> None:
    """A crash would bring the updater back that was told to be stopped."""
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    envelope = kit.send("stop", drain=True, wait_s=5.0)

    kit.work()

    assert not kit.is_answered(envelope)


def test_a_stop_whose_drain_takes_too_long_is_told_when_the_disk_has_it() -> None:
    """Regression, found by simulation: it was told at once when the drain was given up; a crash took the stop back."""
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    envelope = kit.send("stop", drain=True, wait_s=0.2)

    kit.wait(0.3)
    assert not kit.is_answered(envelope)
    kit.write()

    assert kit.header(envelope)["drained"] is False
    assert not kit.crash(machine=True).state.is_running


def test_a_clear_that_no_checkpoint_has_is_answered_within_seconds() -> None:
    kit = DurableKit(durability=CHECKPOINT, stopped=True)
    kit.greet()
    kit.push(1)
    envelope = kit.send("clear")

    for _ in range(30):
        kit.wait(1.0)

    assert kit.is_answered(envelope)


def test_without_a_journal_of_gradients_clear_is_answered_when_a_checkpoint_has_it() -> None:
    kit = DurableKit(durability=CHECKPOINT, stopped=True)
    kit.greet()
    kit.push(1)
    envelope = kit.send("clear")
    kit.write()
    assert not kit.is_answered(envelope)

    kit.wait(0.0)
    kit.write()

    assert kit.header(envelope)["cleared"] == 1
    assert kit.crash(durability=CHECKPOINT).book().decided == 1


def test_a_clear_whose_checkpoint_fails_is_told_so() -> None:
    kit = DurableKit(durability=CHECKPOINT, stopped=True)
    kit.greet()
    kit.push(1)
    kit.disk.fail_next("rename", errno.EIO)
    envelope = kit.send("clear")

    kit.wait(0.0)
    kit.write()

    header = kit.header(envelope)
    assert header["error"] == "failed"
    assert "1 gradients were cleared, but it is not on disk" in header["message"]
