"""Tests of `distgrad_broker.checkpoints`: the last one of a broker, and damaged ones."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from distgrad.durable.disk_events import WriteCheckpoint
from distgrad_broker.checkpoints import MAX_RETRY_S
from distgrad_broker.events import ShutdownAsked
from support.durable_kit import DurableKit

CHECKPOINT, NONE = "checkpoint", "none"
SYNC: dict[str, Any] = {"policy": "sync", "workers": 2}


def begun(kit: DurableKit) -> list[WriteCheckpoint]:
    return [effect for effect in kit.effects if isinstance(effect, WriteCheckpoint)]


def applied(*numbers: int, **config: Any) -> DurableKit:
    kit = DurableKit(**config)
    kit.greet()
    for number in numbers:
        kit.push(number)
        kit.work()
    kit.write()
    return kit


def look(kit: DurableKit, seconds: float = 0.0) -> int:
    """Let time pass, and the disk have what there is; give how many checkpoints were begun."""
    before = len(begun(kit))
    kit.wait(seconds)
    kit.write()
    return len(begun(kit)) - before


# The end


def test_a_clean_stop_leaves_a_checkpoint_of_all_there_is() -> None:
    kit = applied(1)
    kit.push(2)
    kit.push(3)

    assert kit.stop()

    again = kit.crash()
    assert (again.recovered.checkpoint is not None, again.recovered.records, again.total) == (True, 0, -24.0)
    assert again.book().decided == 3


@pytest.mark.parametrize("durability", ["journal", CHECKPOINT, NONE])
def test_a_clean_stop_settles_what_was_queued_before_the_end(durability: str) -> None:
    kit = DurableKit(durability=durability)
    kit.greet() if durability != NONE else kit.hello()
    kit.push(1, 2)

    assert kit.stop()

    assert (kit.member().settled, len(kit.state.unsettled)) == (2, 0)
    assert kit.crash(durability=durability).total == -16.0


def test_a_clean_stop_does_not_write_once_more_what_has_not_changed() -> None:
    kit = applied(1)
    kit.checkpoint()
    before = len(begun(kit))

    assert kit.stop()

    assert len(begun(kit)) == before


def test_the_last_checkpoint_waits_for_what_is_queued_but_not_for_what_is_held() -> None:
    kit = DurableKit(**SYNC)
    kit.greet("a")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.handle(ShutdownAsked())
    drained = []
    for _ in range(2):
        drained.append((look(kit), kit.core.is_drained))
        kit.work()

    assert drained == [(0, False), (1, True)]
    kit.writer.close()
    assert len(kit.crash(**SYNC).state.queue) == 1


def test_the_end_waits_for_a_checkpoint_that_is_under_way() -> None:
    kit = applied(1)
    kit.send("save")
    kit.wait(0.0)
    kit.handle(ShutdownAsked())

    assert not kit.core.is_drained
    kit.write()

    assert kit.core.is_drained


def test_the_end_does_not_wait_for_a_disk_that_does_not_take_it() -> None:
    """What is not settled is sent again, to the next broker."""
    kit = applied(1)
    kit.push(2)
    kit.disk.fail_next("sync", errno.EIO, times=1000)
    kit.work()
    kit.write()
    kit.handle(ShutdownAsked())

    assert kit.core.is_drained


def test_a_stopped_broker_ends_with_its_queue() -> None:
    kit = DurableKit(stopped=True)
    kit.greet()
    kit.push(1)

    assert kit.stop()

    again = kit.crash(stopped=True)
    assert (len(again.state.queue), again.total) == (1, 0.0)


def test_a_broker_whose_parameters_were_taken_away_ends_with_its_queue() -> None:
    kit = applied(1)
    kit.push(2)
    kit.written("set", absent=True)

    assert kit.stop(10.0)


def test_a_last_checkpoint_that_fails_is_tried_again() -> None:
    kit = applied(1, durability=CHECKPOINT)
    kit.disk.fail_next("rename", errno.ENOSPC)

    assert kit.stop(10.0)

    assert kit.member().settled == 1


def test_the_last_checkpoint_waits_for_a_stop_that_drains() -> None:
    kit = applied(1, durability=CHECKPOINT)
    kit.push(2)
    kit.send("stop", drain=True)
    kit.handle(ShutdownAsked())
    kit.wait(0.0)
    kit.work()
    for _ in range(5):
        look(kit, 2.0)

    assert kit.core.is_drained
    assert kit.member().settled == 2


def test_a_step_that_is_made_after_the_last_checkpoint_does_not_hold_up_the_end() -> None:
    """Its members leave one after the other while the broker closes, and what they gave is applied."""
    kit = DurableKit(policy="sync", durability=CHECKPOINT)
    kit.greet("a")
    kit.greet("b")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.handle(ShutdownAsked())
    look(kit)
    kit.written("leave", worker="b", session=kit.sessions["b"])
    assert kit.holder.version == 1

    for _ in range(5):
        look(kit, 2.0)

    assert kit.core.is_drained
    assert kit.member("a").settled == 1


@pytest.mark.parametrize("durability", ["journal", CHECKPOINT, NONE])
def test_a_step_that_is_made_after_the_last_checkpoint_is_kept(durability: str) -> None:
    kit = DurableKit(policy="sync", durability=durability)
    kit.greet("a")
    kit.greet("b")
    kit.push(1, worker="a", base=["one", 0, 0])
    kit.work()
    kit.handle(ShutdownAsked())
    look(kit)
    kit.written("leave", worker="b", session=kit.sessions["b"])
    for _ in range(5):
        look(kit, 2.0)

    assert kit.core.is_drained
    kit.writer.close()
    assert kit.crash(durability=durability).total == -8.0


@pytest.mark.parametrize("failures", [1, 8])
def test_the_last_checkpoint_is_tried_at_once_whatever_failed_before(failures: int) -> None:
    kit = applied(1, checkpoint_updates=1)
    kit.disk.fail_next("rename", errno.ENOSPC, times=failures)
    for _ in range(failures):
        assert look(kit, MAX_RETRY_S) == 1
    kit.handle(ShutdownAsked())

    assert not kit.core.is_drained
    assert look(kit) == 1
    assert kit.core.is_drained


# Damage


def test_the_newest_checkpoint_damaged_means_the_older_one_and_the_journal() -> None:
    kit = applied(1)
    kit.checkpoint()
    kit.push(2)
    kit.work()
    kit.checkpoint()
    kit.push(3)
    kit.work()
    kit.write()
    newest = kit.folder.checkpoints()[0].path
    kit.disk.flip(newest, kit.disk.size(newest) - 1)

    again = kit.crash()

    assert (again.total, again.member().settled, len(again.recovered.damaged)) == (-24.0, 3, 1)


def test_old_journal_is_removed_and_what_checkpoints_need_is_kept_whichever_is_used() -> None:
    kit = DurableKit(segment_bytes=4096, keep_checkpoints=2)
    kit.greet()
    for number in range(1, 121):
        kit.push(number)
        kit.work()
        kit.write()
        if number % 40 == 0:
            kit.checkpoint()
    segments = [path for path in kit.disk.paths() if "journal" in path]
    assert segments[0] != "/data/journal-00000000000000000001.log"
    newest = kit.folder.checkpoints()[0].path
    kit.disk.flip(newest, kit.disk.size(newest) - 1)

    assert kit.crash(segment_bytes=4096).total == -8.0 * 120


def test_saving_twice_in_a_row_keeps_the_older_checkpoint_of_use() -> None:
    kit = DurableKit(segment_bytes=4096)
    kit.greet()
    kit.push(1)
    kit.work()
    kit.checkpoint()
    for number in range(2, 100):
        kit.push(number)
        kit.work()
        kit.write()
    kit.checkpoint()
    kit.checkpoint()
    newest = kit.folder.checkpoints()[0].path
    kit.disk.flip(newest, kit.disk.size(newest) - 1)

    assert kit.crash(segment_bytes=4096).holder.version == 99
