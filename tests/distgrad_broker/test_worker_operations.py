"""`hello`, `heartbeat` and `leave` with a data folder: what they wait for, and who may come back after a restart."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from distgrad.durable.books import LEFT, LIVE, SILENT
from support.core_kit import ONE, Kit
from support.durable_kit import DurableKit

CHECKPOINT, NONE = "checkpoint", "none"


def pushed(*numbers: int, **config: Any) -> DurableKit:
    """Make a broker in which a worker has pushed gradients that are applied, and on the disk."""
    kit = DurableKit(**config)
    kit.greet()
    for number in numbers:
        kit.push(number, cursor=f"c{number}")
        kit.work()
    kit.write()
    return kit


# What hello waits for


def test_a_session_is_on_the_disk_before_it_is_told() -> None:
    kit = DurableKit()
    envelope = kit.send("hello", worker="w", nonce=b"nonce of w")
    assert not kit.is_answered(envelope)
    assert "w" not in kit.crash().recovered.books.members

    kit.write()

    assert kit.header(envelope)["session"] == "one:1"
    book = kit.crash().book()
    assert (book.incarnation, book.counter, book.state) == ("one", 1, LIVE)


def test_the_number_and_cursor_that_a_successor_is_told_are_on_the_disk() -> None:
    kit = pushed(1)
    kit.push(2, cursor="c2")

    envelope = kit.send("hello", worker="w", nonce=b"successor")
    assert not kit.is_answered(envelope)
    kit.write()

    header = kit.header(envelope)
    assert (header["accepted"], header["settled"], header["cursor"], header["queued"]) == (2, 1, "c2", ONE)
    book = kit.crash().book()
    assert (book.accepted, book.cursor) == (2, "c2")


def test_a_hello_once_more_waits_for_the_disk_as_well() -> None:
    kit = DurableKit()
    kit.send("hello", worker="w", nonce=b"nonce of w")

    again = kit.send("hello", worker="w", nonce=b"nonce of w")

    assert not kit.is_answered(again)
    kit.write()
    assert kit.header(again)["session"] == "one:1"


def test_a_hello_that_the_disk_does_not_take_is_told_to_come_again() -> None:
    kit = DurableKit()
    envelope = kit.send("hello", worker="w", nonce=b"nonce of w")

    kit.wait(5.0)
    assert kit.header(envelope)["error"] == "failed"

    assert kit.greet()["session"] == "one:1", "and is then the same session"


def test_hello_tells_what_settled_means_here() -> None:
    assert DurableKit().greet()["durability"] == "journal"
    assert DurableKit(durability=CHECKPOINT).greet()["durability"] == CHECKPOINT
    assert DurableKit(durability=NONE).greet()["durability"] == NONE
    assert Kit().hello()["durability"] == NONE


# Without a journal of gradients


def test_a_successor_begins_behind_what_is_decided_where_no_journal_keeps_the_queue() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1, cursor="c1")
    kit.work()
    kit.push(2, cursor="c2")

    envelope = kit.send("hello", worker="w", nonce=b"successor")
    kit.wait(0.0)
    kit.write()

    header = kit.header(envelope)
    assert (header["accepted"], header["cursor"]) == (1, "c1")
    assert (len(kit.state.queue), kit.member().queued_bytes, kit.state.queued_bytes) == (0, 0, 0)


def test_only_what_its_predecessor_left_is_taken_back() -> None:
    kit = DurableKit(durability=CHECKPOINT, policy="sync", workers=3)
    for worker in "abc":
        kit.greet(worker)
    for worker in "ab":
        kit.push(1, worker=worker, base=["one", 0, 0])
    kit.work(2)
    kit.push(2, worker="a", base=["one", 0, 0])
    kit.push(1, worker="c", base=["one", 0, 0])

    kit.send("hello", worker="a", nonce=b"successor")

    # What was held is offered once more: a step without "a" would be another one.
    assert kit.state.held == []
    assert [gradient.worker for gradient in kit.state.queue] == ["b", "c"]
    assert [kit.member(worker).queued_bytes for worker in "abc"] == [0, ONE, ONE]
    assert (kit.member("a").accepted, kit.state.queued_bytes) == (0, 2 * ONE)


def test_a_fixed_sets_step_waits_for_the_successor_of_a_member_whose_gradient_was_taken_back() -> None:
    """Else its gradient, computed once more, comes too late, and the result is not that of a run without faults."""
    kit = DurableKit(durability=CHECKPOINT, policy="sync", workers=2)
    kit.greet("a")
    kit.greet("b")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.send("hello", worker="a", nonce=b"successor")
    kit.write()
    kit.sessions["a"] = kit.member("a").session

    kit.push(1, worker="b", base=["one", 0, 0])
    kit.work()
    assert kit.holder.version == 0
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()

    assert (kit.holder.version, kit.state.outcomes) == (1, {"applied": 2})


def test_a_stop_that_drains_does_not_wait_for_what_was_taken_back() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1, 2)
    envelope = kit.send("stop", drain=True, wait_s=5.0)

    kit.send("hello", worker="w", nonce=b"successor")
    kit.write()

    assert kit.header(envelope)["drained"]
    assert kit.state.drain_left == 0


def test_a_successor_is_told_of_decided_gradients_when_a_checkpoint_has_them() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1, cursor="c1")
    kit.work()
    envelope = kit.send("hello", worker="w", nonce=b"successor")

    kit.write()
    assert not kit.is_answered(envelope), "the session is there, the checkpoint is not"
    kit.wait(0.0)
    kit.write()

    assert kit.header(envelope)["accepted"] == 1
    assert kit.crash(durability=CHECKPOINT).book().accepted == 1


def test_a_hello_once_more_waits_for_that_checkpoint_as_well() -> None:
    """Told too early a worker goes on from a cursor that a crash takes back, and what lies before it is lost."""
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1, cursor="c1")
    kit.work()
    kit.send("hello", worker="w", nonce=b"successor")

    again = kit.send("hello", worker="w", nonce=b"successor")
    kit.write()

    assert not kit.is_answered(again)


def test_a_hello_whose_checkpoint_fails_is_not_told_what_is_not_on_the_disk() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1, cursor="c1")
    kit.work()
    envelope = kit.send("hello", worker="w", nonce=b"successor")
    kit.disk.fail_next("rename", errno.ENOSPC)

    kit.wait(0.0)
    kit.write()

    assert not kit.is_answered(envelope) or not kit.header(envelope)["ok"]


def test_a_successors_number_is_settled_once_though_its_predecessors_was_decided_out_of_turn() -> None:
    kit = DurableKit(durability=CHECKPOINT, policy="sync", workers=2)
    kit.greet("a")
    kit.greet("b")
    kit.push(1, 2, worker="a", base=["one", 0, 0])  # 2 is refused: it is a second one for the step
    kit.work(2)
    kit.send("hello", worker="a", nonce=b"successor")
    kit.wait(0.0)
    kit.write()
    kit.sessions["a"] = kit.member("a").session
    for worker in ("a", "b"):
        kit.push(1, worker=worker, base=["one", 0, 0])
    kit.work(2)

    member = kit.member("a")
    assert (member.accepted, member.decided) == (1, 1)
    for worker in ("a", "b"):
        kit.push(2, worker=worker, base=["one", 0, 1])
    kit.work(2)
    kit.checkpoint()

    assert (kit.holder.version, member.settled, member.applied, member.refused) == (2, 2, 2, 0)
    assert (member.queued_bytes, member.ahead) == (0, {})


def test_a_number_that_was_decided_out_of_turn_before_a_restart_is_settled_once() -> None:
    """Here the worker sends it again only when those before it are decided on, so that it is not ahead any more."""
    config: dict[str, Any] = {"durability": CHECKPOINT, "policy": "sync", "workers": 2}
    kit = DurableKit(**config)
    kit.greet("a")
    kit.greet("b")
    kit.push(1, 2, worker="a", base=["one", 0, 0])
    kit.work(2)
    kit.checkpoint()

    again = kit.crash(**config)
    for worker in ("a", "b"):
        again.greet(worker, session=kit.sessions[worker], lowest=1 if worker == "a" else 0)
        again.push(1, worker=worker, base=["one", 0, 0])
    again.work(2)
    again.push(2, worker="a", base=["one", 0, 0])
    again.work()
    again.checkpoint()

    member = again.member("a")
    assert (member.accepted, member.decided, member.settled) == (2, 2, 2)
    assert (member.queued_bytes, member.ahead, again.state.queued_bytes) == (0, {}, 0)
    assert again.written("leave", worker="a", session=again.sessions["a"])["ok"]


# Coming, going, keys


@pytest.mark.parametrize("op", ["heartbeat", "hello"])
def test_a_worker_that_comes_back_from_silence_is_live_after_a_restart(op: str) -> None:
    kit = DurableKit(workers_silent_after=10.0)
    session = kit.greet()["session"]
    kit.wait(11.0)
    assert kit.member().state == SILENT

    if op == "heartbeat":
        kit.beat()
        kit.write()
    else:
        assert kit.greet(session=session)["session"] == session

    assert kit.crash().book().state == LIVE


def test_a_chosen_id_that_has_left_keeps_number_and_cursor_through_a_restart() -> None:
    kit = pushed(1)
    assert kit.written("leave", worker="w", session=kit.sessions["w"])["ok"]

    again = kit.crash()
    assert (again.book().state, again.member().state) == (LEFT, LEFT)
    header = again.greet(nonce=b"a later one")

    assert (header["accepted"], header["cursor"], again.member().state) == (1, "c1", LIVE)


def test_a_made_up_id_that_has_left_is_forgotten_also_after_a_restart() -> None:
    kit = DurableKit()
    kit.greet(generated=True)
    kit.push(1)
    kit.work()
    kit.write()
    kit.written("leave", worker="w", session=kit.sessions["w"])

    again = kit.crash()

    assert len(again.state.members) == 0
    assert again.greet(generated=True)["accepted"] == 0


def test_a_goodbye_that_was_not_told_can_be_said_again_after_a_restart() -> None:
    kit = pushed(1)
    kit.send("leave", worker="w", session=kit.sessions["w"])

    again = kit.crash()
    again.greet(session=kit.sessions["w"], lowest=2)

    assert again.written("leave", worker="w", session=again.sessions["w"])["ok"]


def test_an_id_belongs_to_its_key_also_after_a_restart() -> None:
    kit = DurableKit()
    assert kit.greet(user="alice", role="worker")["ok"]

    again = kit.crash()

    assert again.greet(nonce=b"another's", user="bob", role="worker")["error"] == "forbidden"
    assert again.greet(session=kit.sessions["w"], user="alice", role="worker")["ok"]


def test_a_recovered_gradient_is_its_keys_own() -> None:
    kit = DurableKit(stopped=True)
    kit.greet(user="alice", role="worker")
    kit.push(1, user="alice")
    kit.write()

    (gradient,) = kit.crash().state.queue

    assert gradient.user == "alice"


def test_an_id_from_before_there_were_keys_belongs_to_the_first_key_that_uses_it() -> None:
    kit = pushed(1)

    again = kit.crash()

    assert again.greet(session=kit.sessions["w"], lowest=2, user="alice", role="worker")["ok"]
    assert again.greet(nonce=b"another's", user="bob", role="worker")["error"] == "forbidden"


# What makes a checkpoint due where only checkpoints settle


@pytest.mark.parametrize(
    ("keys", "is_due"),
    [
        ({"until": 1}, True),  # a flush
        ({"want": ONE}, True),  # a push that waits for room
        ({"until": 2}, False),  # not decided yet
        ({}, False),
    ],
)
def test_a_checkpoint_is_due_when_a_worker_waits_for_what_is_decided(keys: dict[str, Any], is_due: bool) -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1)
    kit.work()
    kit.write()

    kit.beat(sent=1, **keys)
    kit.wait(0.0)

    assert kit.state.checkpoints.is_under_way is is_due


def test_nobody_who_waits_for_what_is_settled_makes_a_checkpoint_due() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    kit.push(1)
    kit.work()
    kit.checkpoint()

    kit.beat(sent=1, settled=0, until=1, want=ONE)
    kit.wait(0.0)

    assert not kit.state.checkpoints.is_under_way
