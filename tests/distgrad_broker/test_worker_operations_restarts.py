"""Tests of `distgrad_broker.worker_operations`: workers across restarts of their broker."""

from __future__ import annotations

from typing import Any

import pytest

from distgrad.durable.books import LIVE, SILENT
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


# Restarts


def test_a_recovered_worker_goes_on_from_its_last_accepted_number_and_cursor() -> None:
    kit = pushed(1, 2)
    kit.push(3, cursor="c3")
    kit.write()

    again = kit.crash()
    header = again.greet(session=kit.sessions["w"], lowest=3)

    assert (header["accepted"], header["settled"], header["cursor"], header["queued"]) == (3, 2, "c3", ONE)
    assert (header["session"], header["adopted"]) == ("two:1", False)
    again.work()
    again.push(4)
    again.work()
    again.write()
    assert (again.member().settled, again.total) == (4, -32.0)


def test_a_recovered_member_has_a_full_lease_and_no_grant_before_it_says_hello() -> None:
    kit = pushed(1, workers_silent_after=10.0)
    kit.push(2)
    kit.write()
    kit.now += 9.0

    again = kit.crash(workers_silent_after=10.0)

    member = again.member()
    assert (member.state, member.promised, member.committed, member.queued_bytes) == (LIVE, 0, ONE, ONE)
    again.wait(9.9)
    assert member.state == LIVE
    again.wait(0.3)
    assert member.state == SILENT
    again.write()
    assert again.crash("three").book().state == SILENT


def test_a_hello_after_a_restart_gets_a_grant_at_once() -> None:
    kit = pushed(1)

    header = kit.crash().greet(session=kit.sessions["w"], lowest=2)

    assert header["grant"] > ONE


def test_a_heartbeat_of_an_earlier_incarnation_is_sent_to_say_hello() -> None:
    kit = pushed(1)
    again = kit.crash()
    again.sessions = kit.sessions

    assert again.beat()["error"] == "unknown_worker"


def test_a_gradient_of_an_earlier_incarnations_session_is_dropped() -> None:
    kit = pushed(1)
    again = kit.crash()
    again.sessions = dict(kit.sessions)

    again.push(2)
    assert (again.member().accepted, again.state.dropped) == (1, {"fenced": 1})


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_process_superseded_before_restarts_is_fenced_and_its_successor_is_not(
    restarts: int, checkpointed: bool
) -> None:
    kit = DurableKit()
    older = kit.greet(nonce=b"process A")["session"]
    newer = kit.greet(nonce=b"process B")["session"]
    for number in range(restarts):
        if checkpointed:
            kit.checkpoint()
        kit = kit.crash(f"later {number}")
        kit.write()

    assert kit.greet(nonce=b"process A", session=older)["error"] == "fenced"
    assert kit.greet(nonce=b"process B", session=newer)["ok"]
    assert kit.greet(nonce=b"process A", session=older)["error"] == "fenced"


def test_a_process_superseded_in_a_later_incarnation_is_fenced_in_all_that_follow() -> None:
    kit = DurableKit()
    older = kit.greet(nonce=b"process A")["session"]
    kit = kit.crash("two")
    newer = kit.greet(nonce=b"process B")["session"]

    kit = kit.crash("three")

    assert kit.greet(nonce=b"process A", session=older)["error"] == "fenced"
    assert kit.greet(nonce=b"process B", session=newer)["session"] == "three:1"


def test_a_delayed_first_hello_of_a_superseded_process_is_fenced_after_a_restart_too() -> None:
    kit = DurableKit()
    kit.greet(nonce=b"process A")
    kit.greet(nonce=b"process B")

    assert kit.crash().greet(nonce=b"process A")["error"] == "fenced"


def test_a_session_that_was_issued_and_never_told_does_not_fence_its_own_process() -> None:
    kit = DurableKit()
    kit.greet(nonce=b"process A")
    kit.greet(nonce=b"process B")  # its reply is lost on its way

    assert kit.crash().greet(nonce=b"process B")["ok"]


def test_a_new_process_takes_over_after_a_restart_and_the_former_one_is_fenced() -> None:
    kit = DurableKit()
    session = kit.greet(nonce=b"process A")["session"]
    kit = kit.crash()

    assert kit.greet(nonce=b"process B")["ok"]
    assert kit.greet(nonce=b"process A", session=session)["error"] == "fenced"


def test_a_worker_whose_last_broker_left_no_trace_is_not_taken_for_an_old_process() -> None:
    """Two crashes between two checkpoints, and nothing but checkpoints is kept."""
    kit = DurableKit(durability=NONE)
    kit.hello()
    kit.push(1)
    kit.work()
    kit.checkpoint()
    session = kit.sessions["w"]
    for incarnation in ("two", "three"):
        kit = kit.crash(incarnation, durability=NONE)
        header = kit.hello(session=session, lowest=2)
        assert header["ok"], header
        session = header["session"]


def test_a_worker_that_came_to_a_broker_that_left_no_trace_is_not_taken_for_an_old_process() -> None:
    """It is the newest process of its id; the one that the folder knows died before it came."""
    kit = DurableKit(durability=NONE)
    kit.hello(nonce=b"process A")
    kit.checkpoint()
    second = kit.crash("two", durability=NONE)
    session = second.hello(nonce=b"process B")["session"]

    third = second.crash("three", durability=NONE)

    assert third.hello(nonce=b"process B", session=session)["ok"]


def test_a_worker_that_an_admins_rollback_takes_back_is_told_that_its_history_is_lost() -> None:
    kit = pushed(1, 2, 3)

    again = kit.crash(recover_until=2)
    header = again.greet(session=kit.sessions["w"], lowest=4)

    assert header["error"] == "history_lost"
    assert "had gradients up to 3 settled, but the data folder knows of 2" in header["message"]


def test_a_worker_whose_settled_numbers_a_rollback_leaves_goes_on() -> None:
    """Its last gradient was not told to be settled: it is sent again."""
    kit = pushed(1, 2, 3)

    again = kit.crash(recover_until=2)
    header = again.greet(session=kit.sessions["w"], lowest=3)

    assert (header["accepted"], header["settled"], header["cursor"]) == (2, 2, "c2")


@pytest.mark.parametrize(("lowest", "expected"), [(4, "history_lost"), (2, None)])
def test_a_rollback_beyond_a_restart_loses_history_and_fences_nobody(lowest: int, expected: str | None) -> None:
    kit = pushed(1, 2)
    second = kit.crash("two")
    second.greet(session=kit.sessions["w"], lowest=3)
    second.push(3)
    second.work()
    second.write()

    third = second.crash("three", recover_until=1)
    header = third.greet(session=second.sessions["w"], lowest=lowest)

    assert header.get("error") == expected


def test_a_process_that_came_after_the_version_that_is_gone_back_to_is_not_taken_for_an_old_one() -> None:
    """The folder knows only its predecessor, which is dead."""
    kit = pushed(1, 2)
    second = kit.crash("two")
    session = second.greet(nonce=b"process B")["session"]

    third = second.crash("three", recover_until=1)

    assert third.greet(nonce=b"process B", session=session).get("error") != "fenced"


def test_numbers_that_a_folder_never_had_are_lost_history() -> None:
    header = DurableKit().greet(lowest=6, session="elsewhere:1")

    assert header["error"] == "history_lost"


def test_without_files_the_numbers_of_a_worker_are_adopted_and_go_on() -> None:
    kit = Kit(incarnation="two")

    header = kit.hello(session="one:1", lowest=6)
    kit.push(6)
    kit.work()

    assert (header["adopted"], header["accepted"], header["kept"]) == (True, 5, None)
    member = kit.member()
    assert (member.accepted, member.decided, member.settled, member.ahead, member.queued_bytes) == (6, 6, 6, {}, 0)


def test_with_nothing_but_checkpoints_numbers_behind_the_last_one_are_adopted() -> None:
    kit = DurableKit(durability=NONE)
    kit.hello()
    kit.push(1)
    kit.work()
    kit.checkpoint()
    kit.push(2, 3)
    kit.work(2)

    again = kit.crash(durability=NONE)
    header = again.hello(session=kit.sessions["w"], lowest=4)
    again.push(4)
    again.work()

    assert (header["adopted"], header["accepted"], header["kept"], again.member().settled) == (True, 3, 1, 4)
    assert again.holder.version == 2


def test_what_a_journal_has_kept_for_a_dead_worker_counts_also_after_a_start_without_one() -> None:
    """Its successor was told to go on behind it, and would never send it again."""
    kit = DurableKit(stopped=True)
    kit.greet(nonce=b"process A")
    kit.push(1, cursor="c1")
    assert kit.greet(nonce=b"process B")["cursor"] == "c1"

    again = kit.crash(durability=CHECKPOINT)
    header = again.greet(nonce=b"process B", session=kit.sessions["w"], lowest=2)
    again.written("start")
    again.work()

    assert (header.get("error"), again.total) == (None, -8.0)


def kept_by_a_journal(**config: Any) -> DurableKit:
    """Make a stopped broker without a journal of gradients, on what one with it has kept: number 1 of a worker."""
    kit = DurableKit(stopped=True, segment_bytes=4096)
    kit.greet(nonce=b"process A")
    kit.push(1, cursor="c1")
    kit.greet(nonce=b"process B")
    again = kit.crash(durability=CHECKPOINT, stopped=True, segment_bytes=4096, **config)
    header = again.greet(nonce=b"process B", session=kit.sessions["w"], lowest=2)
    assert (header["accepted"], header["cursor"]) == (1, "c1")
    return again


@pytest.mark.parametrize("machine", [False, True])
def test_what_a_journal_has_kept_is_still_there_behind_checkpoints_that_do_not_have_it_applied(machine: bool) -> None:
    kit = kept_by_a_journal(keep_checkpoints=1)
    for _ in range(100):  # enough records for the journal to be cut
        kit.written("start")
        kit.written("stop")
    kit.checkpoint()
    kit.checkpoint()

    again = kit.crash("three", machine=machine, durability=CHECKPOINT, stopped=True)

    assert (again.book().accepted, again.book().cursor, len(again.state.queue)) == (1, "c1", 1)
    again.written("start")
    again.work()
    assert again.checkpoint()["ok"]
    assert (again.member().settled, again.total) == (1, -8.0)
    last = again.crash("four", durability=CHECKPOINT)
    assert (last.book().decided, last.total, len(last.state.queue)) == (1, -8.0, 0)


def test_what_came_behind_it_is_taken_back_with_its_process_and_sent_again_by_the_next() -> None:
    kit = kept_by_a_journal()
    kit.push(2, 3, cursor="c3")

    header = kit.greet(nonce=b"process C")
    kit.push(2, value=5.0)
    kit.written("start")
    kit.work(5)
    kit.checkpoint()

    assert (header["accepted"], header["cursor"]) == (1, "c1")
    assert (kit.member().settled, kit.total, kit.state.queued_bytes) == (2, -48.0, 0)


def test_what_a_journal_has_kept_is_settled_once_if_a_crash_takes_its_step_back() -> None:
    kit = kept_by_a_journal()
    kit.written("start")
    kit.push(2)
    kit.work(2)
    assert kit.total == -16.0

    again = kit.crash("three", durability=CHECKPOINT)
    header = again.greet(nonce=b"process B", session=kit.sessions["w"], lowest=2)
    again.push(2)
    again.work(2)
    again.checkpoint()

    assert (header["accepted"], again.member().settled, again.total) == (1, 2, -16.0)


# Refusals


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_refusal_that_was_settled_before_a_restart_is_told_after_it(checkpointed: bool) -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1, value=float("nan"))
    kit.work()
    kit.write()
    if checkpointed:
        kit.checkpoint()

    again = kit.crash()
    again.greet(session=kit.sessions["w"], lowest=1)

    told = again.beat(sent=1)
    assert (told["settled"], [refusal[:2] for refusal in told["refused"]]) == (1, [[1, "not_finite"]])
    assert again.beat(sent=1, settled=1)["refused"] == []


def test_a_successor_is_not_told_of_its_predecessors_refusals_after_a_restart() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1, value=float("nan"))
    kit.work()
    kit.write()

    again = kit.crash()
    again.greet(nonce=b"successor")

    assert again.beat()["refused"] == []


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_refusal_ahead_of_a_held_number_is_told_when_that_is_settled_also_after_a_restart(checkpointed: bool) -> None:
    config: dict[str, Any] = {"policy": "sync", "workers": 2}
    kit = DurableKit(**config)
    kit.greet("a")
    kit.greet("b")
    kit.push(1, 2, worker="a", base=["one", 0, 0])
    kit.work(2)
    kit.write()
    if checkpointed:
        kit.checkpoint()

    again = kit.crash(**config)
    again.greet("a", session=kit.sessions["a"], lowest=1)
    again.greet("b", session=kit.sessions["b"])
    again.work()
    assert again.beat("a", sent=2)["refused"] == []
    again.push(1, worker="b", base=["one", 0, 0])
    again.work()
    again.write()

    told = again.beat("a", sent=2)
    assert (told["settled"], [refusal[:2] for refusal in told["refused"]]) == (2, [[2, "second"]])
