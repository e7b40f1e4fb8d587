"""`save`: to a file, or as a checkpoint; who is told what, and when."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from distgrad.durable.disk_events import WriteCheckpoint
from distgrad_broker.events import SaveEnded, SaveParameters
from support.core_kit import LAYOUT, Kit
from support.durable_kit import DurableKit


def test_without_a_place_to_write_to_it_is_refused() -> None:
    header = Kit().ask("save")

    assert (header["error"], "--save FILE" in header["message"], "--data DIR" in header["message"]) == (
        "invalid",
        True,
        True,
    )


@pytest.mark.parametrize("make", [lambda: Kit(None, save_path="w.npz"), lambda: DurableKit(layout=None)])
def test_without_parameters_there_is_nothing_to_save(make: Callable[[], Kit]) -> None:
    assert make().ask("save")["error"] == "no_parameters"


def test_a_save_is_answered_when_its_file_is_written_and_holds_the_version_until_then() -> None:
    kit = Kit(save_path="w.npz")
    kit.hello()
    envelope = kit.send("save")
    (job,) = [effect for effect in kit.effects if isinstance(effect, SaveParameters)]
    kit.push(1)
    kit.work()

    assert kit.replies_to(envelope) == []
    assert (job.version, job.layout, [arena.any() for arena in job.arenas]) == (0, LAYOUT, [False])
    assert kit.state.versions.held == 1
    kit.handle(SaveEnded(job.ticket, "w.npz", None))

    (reply,) = kit.replies_to(envelope)
    assert (reply.header["ok"], reply.header["path"], kit.state.versions.held) == (True, "w.npz", 0)


def test_one_save_at_a_time_and_one_that_fails_says_why() -> None:
    kit = Kit(save_path="w.npz")
    envelope = kit.send("save")
    assert kit.ask("save")["error"] == "failed"

    kit.handle(SaveEnded(1, "w.npz", "no room"))

    (reply,) = kit.replies_to(envelope)
    assert (reply.header["error"], reply.header["message"]) == ("failed", "cannot save to w.npz: no room")
    assert kit.state.versions.held == 0
    kit.send("save")
    assert isinstance(kit.effects[-1], SaveParameters)


def test_with_a_data_folder_save_is_a_checkpoint_and_answered_when_it_is_on_the_disk() -> None:
    kit = DurableKit()
    kit.greet()
    kit.push(1)
    kit.work()
    envelope = kit.send("save")

    kit.wait(0.0)
    assert not kit.is_answered(envelope)
    kit.write()

    header = kit.header(envelope)
    (path,) = [path for path in kit.disk.paths() if "checkpoint" in path]
    assert (header["ok"], header["path"]) == (True, path)
    assert kit.crash(layout=None).recovered.checkpoint == (kit.state.checkpoints.sequence, 1)


def test_a_save_during_a_checkpoint_waits_for_one_of_its_own() -> None:
    """The one under way may have been begun before what its user wants to be saved."""
    kit = DurableKit()
    kit.greet()
    first = kit.send("save")
    kit.wait(0.0)
    kit.push(1)
    kit.work()
    second = kit.send("save")

    kit.write()
    assert (kit.is_answered(first), kit.is_answered(second)) == (True, False)
    kit.wait(0.0)
    kit.write()

    assert kit.header(second)["path"].endswith("-1.safetensors")


def test_a_checkpoint_that_fails_is_told_to_who_asked_for_it() -> None:
    kit = DurableKit()
    kit.disk.fail_next("rename", errno.ENOSPC)

    header = kit.checkpoint()

    assert header["error"] == "failed"
    assert "No space left" in header["message"]


def test_with_a_file_and_a_data_folder_save_writes_both(tmp_path: Path) -> None:
    kit = DurableKit(save=tmp_path / "w.npz")
    envelope = kit.send("save")
    kit.wait(0.0)

    kit.handle(SaveEnded(1, "w.npz", None))
    kit.write()

    assert kit.header(envelope)["path"] == "w.npz"
    assert any(isinstance(effect, WriteCheckpoint) for effect in kit.effects)
    assert [path for path in kit.disk.paths() if "checkpoint" in path]


def test_a_save_does_not_follow_updates_made_while_it_is_written() -> None:
    kit = DurableKit()
    kit.greet()
    kit.send("save")
    kit.wait(0.0)
    kit.push(1)
    kit.work()

    kit.write()

    assert kit.total != 0.0
    checkpoint, _ = kit.folder.newest_whole()
    assert checkpoint is not None
    assert (checkpoint.version, [bool(arena.any()) for arena in checkpoint.arenas]) == (0, [False])


def test_a_save_that_the_disk_does_not_take_is_answered_within_seconds() -> None:
    """A wait ends within 5 s (PROTOCOL 12)."""
    kit = DurableKit()
    envelope = kit.send("save")

    for _ in range(30):
        kit.wait(1.0)

    assert kit.is_answered(envelope)
