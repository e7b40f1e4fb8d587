"""When a checkpoint is begun, what it covers, what follows when it ended, and what a clean stop leaves behind."""

from __future__ import annotations

import errno
import logging
from typing import Any

import numpy as np
import pytest

from distgrad.durable.checkpoint_state import restore
from distgrad.durable.disk_events import CheckpointEnded, WriteCheckpoint
from distgrad.holder import ParameterHolder
from distgrad.rules import Adam
from distgrad_broker.checkpoints import RETRY_S
from distgrad_broker.events import Log, ShutdownAsked
from support.core_kit import Kit
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


# When


def test_one_is_due_after_so_many_seconds() -> None:
    kit = applied(1, checkpoint_every=10.0)

    assert look(kit, 9.9) == 0
    assert look(kit, 0.2) == 1
    kit.push(2)
    assert look(kit, 9.9) == 0
    assert look(kit, 0.2) == 1


@pytest.mark.parametrize("durability", ["journal", CHECKPOINT])
def test_where_nothing_has_happened_none_is_due(durability: str) -> None:
    kit = applied(1, checkpoint_every=10.0, durability=durability)
    look(kit, 11.0)

    kit.beat(sent=1, settled=1)

    assert look(kit, 11.0) == 0
    kit.push(2)
    kit.work()
    assert look(kit) == 1


def test_where_nothing_has_happened_none_is_due_without_records_either() -> None:
    kit = DurableKit(durability=NONE, checkpoint_every=10.0)
    kit.checkpoint()

    assert look(kit, 11.0) == 0


def test_one_is_due_after_so_many_updates() -> None:
    kit = applied(1, 2, checkpoint_updates=3)
    assert look(kit) == 0

    kit.push(3)
    kit.work()

    assert look(kit) == 1
    assert look(kit) == 0


def test_one_is_due_after_so_much_journal() -> None:
    kit = applied(1, checkpoint_journal=10_000)
    assert look(kit) == 0

    for number in range(2, 80):
        kit.push(number)
        kit.work()

    assert look(kit) == 1
    assert look(kit) == 0


def test_the_journal_that_a_recovery_had_to_read_counts() -> None:
    """The setting bounds what a recovery reads, also if a broker is killed again and again."""
    config: dict[str, Any] = {"checkpoint_journal": 20_000}
    kit = DurableKit(**config)
    kit.greet()
    last = 0
    for restart in range(5):
        for _ in range(50):
            last += 1
            kit.push(last)
            kit.work()
        look(kit)
        session = kit.sessions["w"]
        kit = kit.crash(f"later {restart}", **config)
        kit.greet(session=session, lowest=last + 1)
        look(kit)

    assert [path for path in kit.disk.paths() if "checkpoint" in path]


def test_only_one_is_written_at_a_time() -> None:
    kit = applied(1, checkpoint_updates=1)
    kit.wait(0.0)
    kit.push(2)
    kit.work()

    kit.wait(0.0)

    assert len(begun(kit)) == 1
    kit.write()
    assert look(kit) == 1


def test_one_that_failed_is_tried_again_a_little_later_and_logged() -> None:
    kit = applied(1, checkpoint_updates=1)
    kit.disk.fail_next("rename", errno.ENOSPC)
    assert look(kit) == 1

    assert look(kit, RETRY_S - 0.1) == 0
    assert look(kit, 0.2) == 1

    lines = [line for line in kit.effects if isinstance(line, Log) and line.phrase.startswith("checkpoint")]
    assert [(line.level, line.phrase) for line in lines] == [
        (logging.ERROR, "checkpoint failed"),
        (logging.INFO, "checkpoint written"),
    ]
    assert "No space left" in lines[0].fields["error"]
    assert lines[1].fields["version"] == 1


def test_without_a_data_folder_there_are_none() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    kit.work()
    kit.wait(10_000.0)

    assert not any(isinstance(effect, WriteCheckpoint) for effect in kit.effects)


# What


def test_it_covers_what_was_noted_before_it_and_nothing_after() -> None:
    kit = applied(1)
    kit.push(2)
    kit.work()
    kit.send("save")
    kit.wait(0.0)
    kit.push(3)
    kit.work()
    kit.write()

    (job,) = begun(kit)
    assert kit.state.records is not None
    assert job.checkpoint.version == 2
    assert job.checkpoint.sequence < kit.state.records.sequence
    again = kit.crash()
    assert (again.recovered.checkpoint, again.recovered.records) == ((job.checkpoint.sequence, 2), 2)
    assert again.total == -24.0


def test_what_it_holds_does_not_change_while_updates_go_on() -> None:
    kit = DurableKit(own_rule=Adam(lr=0.5))
    kit.greet()
    kit.push(1)
    kit.work()
    kit.send("save")
    kit.wait(0.0)
    (job,) = begun(kit)
    before = [array.copy() for array in [*job.checkpoint.arenas, *job.checkpoint.slots["exp_avg"]]]

    for number in range(2, 8):
        kit.push(number)
        kit.work()

    after = [*job.checkpoint.arenas, *job.checkpoint.slots["exp_avg"]]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    holder = ParameterHolder(rule=Adam(lr=9.0), executor="numpy")
    restore(holder, job.checkpoint)
    assert (holder.version, holder.steps, holder.rule) == (1, 1, Adam(lr=0.5))


def test_a_reader_of_its_version_is_no_ones_to_revoke_and_given_back_at_the_end() -> None:
    kit = applied(1)
    kit.send("save")
    kit.wait(0.0)
    kit.push(2)
    kit.work()
    assert kit.state.versions.held == 1
    kit.wait(1000.0)
    assert kit.state.versions.held == 1

    kit.write()

    assert kit.state.versions.held == 0


@pytest.mark.parametrize("fails", [False, True])
def test_one_without_parameters_is_written_too(fails: bool) -> None:
    kit = DurableKit(layout=None, checkpoint_every=1.0)
    kit.greet()
    if fails:
        kit.disk.fail_next("rename", errno.EIO)

    assert look(kit, 2.0) == 1

    assert isinstance(kit.told[-1], CheckpointEnded)
    assert (kit.told[-1].error is None) is not fails


def test_the_first_record_that_is_needed_is_that_of_the_oldest_gradient_that_waits() -> None:
    kit = DurableKit(**SYNC)
    kit.greet("a")
    kit.greet("b")
    kit.checkpoint()
    base = ["one", 0, 0]
    first = kit.gradient(1, "a", base=base)
    kit.handle(first)
    kit.work()
    second = kit.gradient(2, "a", base=base)
    kit.handle(second)
    kit.checkpoint()
    kit.push(1, worker="b", base=base)
    kit.work(2)
    kit.checkpoint()

    empty, held, later = begun(kit)
    assert empty.first_needed == empty.checkpoint.sequence + 1
    assert held.first_needed == first.sequence
    assert later.first_needed == later.checkpoint.sequence + 1


def test_a_queued_gradient_keeps_its_record_although_others_behind_it_are_held() -> None:
    """What is held goes back to the head of the queue when the policy changes."""
    kit = DurableKit(**SYNC, stopped=True)
    kit.greet("a")
    kit.greet("b")
    queued = kit.gradient(1, "a", base=["one", 0, 0])
    kit.handle(queued)
    kit.push(1, worker="b", base=["one", 0, 0])

    kit.checkpoint()

    assert begun(kit)[-1].first_needed == queued.sequence


def test_a_recovered_gradient_keeps_the_place_of_its_record() -> None:
    kit = DurableKit(stopped=True)
    kit.greet()
    gradient = kit.gradient(1)
    kit.handle(gradient)
    kit.write()

    again = kit.crash(stopped=True)
    again.checkpoint()

    assert begun(again)[-1].first_needed == gradient.sequence


def test_without_a_journal_of_gradients_only_what_comes_is_needed() -> None:
    kit = DurableKit(durability=CHECKPOINT, stopped=True)
    kit.greet()
    kit.push(1)
    kit.checkpoint()

    assert begun(kit)[-1].first_needed == begun(kit)[-1].checkpoint.sequence + 1


def test_checkpoints_without_records_are_told_apart_by_a_count_that_goes_on_after_a_restart() -> None:
    kit = DurableKit(durability=NONE)
    kit.checkpoint()
    kit.checkpoint()
    again = kit.crash(durability=NONE)
    again.checkpoint()

    assert [name.sequence for name in again.folder.checkpoints()] == [3, 2]


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
