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
from distgrad_broker.checkpoints import MAX_RETRY_S, MAX_WAITED_RETRY_S, RETRY_S
from distgrad_broker.events import Log
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
        (logging.ERROR, "checkpoint failed, and is tried again"),
        (logging.INFO, "checkpoint written"),
    ]
    assert "No space left" in lines[0].fields["error"]
    assert lines[1].fields["version"] == 1


def pauses(kit: DurableKit, count: int) -> list[float]:
    """Give how long the broker waits after each of so many checkpoints that fail."""
    waited = []
    for _ in range(count):
        began, before = kit.now, len(begun(kit))
        while len(begun(kit)) == before:
            look(kit, 0.5)
        waited.append(kit.now - began)
    return waited


def errors(kit: DurableKit) -> list[str]:
    return [line.fields["error"] for line in kit.effects if isinstance(line, Log) and line.level == logging.ERROR]


def test_while_they_fail_the_pauses_grow_up_to_a_limit_and_only_news_are_logged() -> None:
    kit = applied(1, checkpoint_updates=1, workers_silent_after=1e6)
    kit.disk.fail_next("rename", errno.ENOSPC, times=8)
    assert look(kit) == 1

    assert pauses(kit, 8) == [1, 2, 4, 8, 16, 32, MAX_RETRY_S, MAX_RETRY_S]

    assert errors(kit) == ["No space left on device"]
    kit.push(2)
    kit.work()
    kit.disk.fail_next("rename", errno.ENOSPC)
    kit.disk.fail_next("rename", errno.EIO)
    assert look(kit) == 1
    assert pauses(kit, 2) == [RETRY_S, 2 * RETRY_S]
    assert errors(kit) == ["No space left on device", "No space left on device", "Input/output error"]


def test_while_they_fail_status_names_the_reason() -> None:
    kit = applied(1, checkpoint_updates=1, workers_silent_after=1e6)
    kit.disk.fail_next("rename", errno.ENOSPC, times=5)
    look(kit)
    pauses(kit, 4)

    assert "No space left" in kit.written("status")["status"]["disk"]["trouble"]
    pauses(kit, 1)
    assert kit.written("status")["status"]["disk"]["trouble"] is None


def test_where_workers_wait_for_one_the_pauses_stay_short() -> None:
    kit = applied(1, durability=CHECKPOINT, checkpoint_updates=1)
    kit.disk.fail_next("rename", errno.ENOSPC, times=6)
    assert look(kit) == 1

    assert pauses(kit, 6) == [1, 2, MAX_WAITED_RETRY_S, MAX_WAITED_RETRY_S, MAX_WAITED_RETRY_S, MAX_WAITED_RETRY_S]


def test_who_asks_for_one_does_not_wait_for_the_pause_after_one_that_failed() -> None:
    kit = applied(1, checkpoint_updates=1, workers_silent_after=1e6)
    kit.disk.fail_next("rename", errno.ENOSPC, times=6)
    assert look(kit) == 1
    pauses(kit, 5)

    assert kit.checkpoint()["ok"]


def test_a_journal_that_can_be_written_again_ends_the_pause() -> None:
    kit = applied(1, checkpoint_updates=1, workers_silent_after=1e6)
    kit.disk.fail_next("rename", errno.ENOSPC, times=6)
    assert look(kit) == 1
    pauses(kit, 5)
    kit.disk.fail_next("sync", errno.ENOSPC)
    kit.push(2)
    kit.work()
    look(kit)

    assert kit.state.disk_trouble is not None
    look(kit, 0.5)
    look(kit)

    assert kit.state.checkpoints.written_version == 2


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
