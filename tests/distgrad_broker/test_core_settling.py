"""Tests of the core with a data folder: when gradients are settled, and a disk that fails."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest

from distgrad_broker import requests
from distgrad_broker.events import Log, Reply
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
    "destroy": {},
}


def ask(kit: DurableKit, op: str, **keys: Any) -> bytes:
    keys = {**MUTATING[op], **keys}
    if op == "leave":
        keys["session"] = kit.sessions["w"]
    return kit.send(op, keys.pop("frames", ()), **keys)


# Settling


def test_with_a_journal_settled_follows_the_disk_and_applied_does_not() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1, 2)
    kit.work(2)

    member = kit.member()
    assert (kit.total, member.accepted, member.decided, member.settled) == (-16.0, 2, 2, 0)
    assert member.queued_bytes == kit.state.queued_bytes == 2048, "its grant covers it until then"
    kit.write()

    assert (member.settled, member.queued_bytes, kit.state.queued_bytes) == (2, 0, 0)
    assert kit.state.outcomes["applied"] == 2


def test_a_gradient_that_is_on_the_disk_is_not_settled_before_its_decision_is_there_too() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    kit.write()

    kit.work()
    assert kit.member().settled == 0
    kit.write()

    assert kit.member().settled == 1


def test_with_checkpoints_alone_settled_follows_them() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1)
    kit.work()
    kit.write()
    assert kit.member().settled == 0

    kit.send("save")
    kit.wait(0.0)
    assert kit.member().settled == 0
    kit.write()

    assert kit.member().settled == 1


def test_what_is_decided_while_a_checkpoint_is_written_waits_for_the_next_one() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1)
    kit.work()
    kit.send("save")
    kit.wait(0.0)
    kit.push(2)
    kit.work()

    kit.write()
    assert kit.member().settled == 1
    kit.checkpoint()

    assert kit.member().settled == 2


def test_a_checkpoint_that_fails_settles_nothing_and_is_tried_again() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1)
    kit.work()
    kit.disk.fail_next("rename", errno.EIO)
    kit.checkpoint()
    assert kit.member().settled == 0

    kit.wait(0.5)
    kit.write()
    assert kit.member().settled == 0
    kit.wait(0.6)
    kit.write()

    assert kit.member().settled == 1


@pytest.mark.parametrize("durability", [None, NONE])
def test_with_nothing_kept_settled_is_decided(durability: str | None) -> None:
    kit: Kit
    if durability is None:
        kit = Kit()
        kit.hello()
    else:
        kit = DurableKit(durability=durability)
        kit.hello()
    kit.push(1)
    kit.work()

    assert kit.member().settled == 1


def test_a_heartbeat_that_waits_hears_of_settled_numbers_when_the_disk_has_them() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    envelope = kit.send("heartbeat", **kit.beat_keys(sent=1, until=1, wait_s=0.05))
    kit.work()
    assert not kit.is_answered(envelope)

    kit.write()

    assert kit.header(envelope)["settled"] == 1


def test_a_refusal_is_told_when_it_is_settled_and_not_before() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1, value=float("nan"))
    kit.work()
    assert kit.beat(sent=1)["refused"] == []

    kit.write()

    told = kit.beat(sent=1)
    assert [refusal[:2] for refusal in told["refused"]] == [[1, "not_finite"]]
    assert (told["settled"], kit.state.refused) == (1, {"not_finite": 1})


def test_a_refusal_ahead_of_a_held_number_is_told_with_it() -> None:
    kit = DurableKit(policy="sync", workers=2)
    kit.greet("a")
    kit.greet("b")
    base = ["one", 0, 0]
    kit.push(1, 2, worker="a", base=base)
    kit.work(2)
    kit.write()
    assert kit.beat("a", sent=2)["refused"] == []

    kit.push(1, worker="b", base=base)
    kit.work()
    kit.write()

    told = kit.beat("a", sent=2)
    assert (told["settled"], [refusal[:2] for refusal in told["refused"]]) == (2, [[2, "second"]])


def test_each_outcome_is_settled_when_the_disk_has_it() -> None:
    kit = DurableKit(max_staleness=0)
    kit.greet()
    kit.push(1, base=["one", 0, 0])
    kit.push(2, base=["one", 0, 0])
    kit.push(3, value=float("inf"), base=["one", 0, 1])
    kit.work(3)
    kit.push(4)
    kit.send("clear")
    assert kit.member().settled == 0

    kit.write()

    assert kit.state.outcomes == {"applied": 1, "superseded": 1, "refused": 1, "cleared": 1}
    assert kit.member().settled == 4


def test_who_has_something_unsettled_cannot_leave() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    kit.work()

    header = kit.ask("leave", worker="w", session=kit.sessions["w"])

    assert header["error"] == "invalid"
    assert "1 gradient(s) are not settled" in header["message"]


# Trouble


def test_trouble_and_its_end_are_logged_once_each_and_told_in_status() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    kit.work()
    kit.disk.fail_next("sync", errno.EIO, times=2)
    kit.write()
    kit.now += 0.3
    kit.write()

    trouble = [line for line in kit.effects if isinstance(line, Log) and line.level == logging.ERROR]
    assert [line.phrase for line in trouble] == ["the journal cannot be written; nothing is settled until it can"]
    disk = kit.ask("status")["status"]["disk"]
    assert "Input/output error" in disk["trouble"]
    assert (disk["unsettled"], kit.member().settled) == (1, 0)

    kit.now += 0.3
    kit.write()

    assert [line.phrase for line in kit.effects if isinstance(line, Log)].count("the disk takes the journal again") == 1
    disk = kit.ask("status")["status"]["disk"]
    assert (disk["trouble"], disk["unsettled"], kit.member().settled) == (None, 0, 1)


def test_a_checkpoint_that_cannot_be_written_is_told_in_status_where_settling_waits_for_it() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1)
    kit.work()
    kit.disk.fail_next("rename", errno.ENOSPC)
    kit.checkpoint()

    trouble = kit.ask("status")["status"]["disk"]["trouble"]

    assert trouble is not None
    assert "No space left" in trouble


def test_who_asks_again_and_again_while_the_disk_fails_does_not_fill_the_memory() -> None:
    kit = DurableKit()
    for _ in range(100):
        kit.send("hello", worker="w", nonce=b"nonce of w")
        kit.wait(MAX_DISK_WAIT_S + 1)

    assert kit.state.records is not None
    assert len(kit.state.records._waiting) < 10


def test_clients_that_went_away_while_the_disk_fails_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_REMEMBERED_CLIENTS", 5)
    kit = DurableKit()
    for number in range(50):
        client = b"client %04d" % number
        kit.send("hello", worker="w", nonce=b"nonce of w", client=client, id=1)
        kit.send("configure", settings={"mode": "ascent" if number % 2 else "descent"}, client=client, id=2)
        kit.wait(MAX_DISK_WAIT_S + 1)

    assert kit.state.records is not None
    assert len(kit.state.under_way) <= 5
    assert len(kit.state.records._waiting) <= 5
    last = kit.send("configure", settings={"mode": "ascent"}, client=client, id=2)
    kit.write()
    assert kit.header(last)["ok"]


def test_status_tells_how_far_the_disk_is() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    kit.work()
    before = kit.ask("status")["status"]
    assert kit.state.records is not None
    kit.write()
    kit.checkpoint()
    kit.now += 7.0
    after = kit.ask("status")["status"]

    assert before["durability"] == after["durability"] == JOURNAL
    assert before["disk"]["records"] > before["disk"]["durable"]
    assert (before["disk"]["unsettled"], before["disk"]["checkpoint"]) == (1, None)
    assert before["disk"]["journal_bytes"] > 0
    assert after["disk"]["records"] == after["disk"]["durable"] == kit.state.records.sequence
    assert (after["disk"]["unsettled"], after["disk"]["journal_bytes"]) == (0, 0)
    assert after["disk"]["checkpoint"].endswith("-1.safetensors")
    assert (after["disk"]["checkpoint_version"], after["disk"]["checkpoint_under_way"]) == (1, False)
    assert after["disk"]["checkpoint_age_s"] == 7.0


def test_status_tells_that_a_checkpoint_is_being_written() -> None:
    kit = DurableKit()
    kit.send("save")
    kit.wait(0.0)

    assert kit.ask("status")["status"]["disk"]["checkpoint_under_way"]


def test_status_without_a_data_folder_says_so_and_without_records_has_none() -> None:
    status = Kit().ask("status")["status"]
    assert (status["durability"], status["disk"]) == (NONE, None)

    status = DurableKit(durability=NONE).ask("status")["status"]
    assert (status["durability"], status["disk"]["records"], status["disk"]["durable"]) == (NONE, None, None)


def test_the_age_of_a_checkpoint_is_that_of_the_last_whole_one() -> None:
    kit = DurableKit()
    kit.checkpoint()
    kit.now += 100.0
    kit.disk.fail_next("rename", errno.EIO)
    kit.checkpoint()

    assert kit.ask("status")["status"]["disk"]["checkpoint_age_s"] >= 100.0


def test_no_request_is_answered_twice() -> None:
    kit = DurableKit()
    envelopes = [kit.send("hello", worker="w", nonce=b"nonce of w"), kit.send("configure", settings={})]
    kit.wait(MAX_DISK_WAIT_S + 1)
    kit.write()

    replies = [effect for effect in kit.effects if isinstance(effect, Reply)]
    assert sorted(reply.envelope[0] for reply in replies) == sorted(envelopes)
