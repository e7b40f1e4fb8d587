"""Tests of `distgrad_broker.data`: going back to a version, and folders that cannot be used."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random
from typing import Any

import pytest

from distgrad.durable.disk import OsDisk
from distgrad.errors import CheckpointError, ConfigError, DataDamaged, DataFolderInUse
from distgrad.holder import ParameterHolder
from distgrad.wire import State
from distgrad_broker.config import BrokerConfig
from distgrad_broker.data import open_data
from support.core_kit import LAYOUT, frames_of
from support.durable_kit import DurableKit
from support.sim_disk import Crash, SimDisk

CHECKPOINT, NONE = "checkpoint", "none"


def applied(*numbers: int, **config: Any) -> DurableKit:
    kit = DurableKit(**config)
    kit.greet()
    for number in numbers:
        kit.push(number, cursor=f"c{number}")
        kit.work()
        kit.write()
    return kit


# Going back


def test_going_back_makes_an_older_version_the_newest_and_keeps_the_rest_aside() -> None:
    kit = applied(1, 2, 3)
    kit.checkpoint()
    kit.push(4)
    kit.work()
    kit.write()

    again = kit.crash(recover_until=2)

    assert (again.total, again.state.name) == (-16.0, State("two", 0, 2))
    book = again.book()
    assert (book.accepted, book.decided, book.cursor) == (2, 2, "c2")
    aside = [path.removeprefix("/data/set-aside-1/") for path in again.disk.paths() if "set-aside" in path]
    assert any(name.startswith("journal") for name in aside)
    assert any(name.endswith("-3.safetensors") for name in aside)
    again.greet("x")
    third = again.crash("three")
    assert (third.total, third.holder.version) == (-16.0, 2)


def test_it_goes_on_from_there_and_the_new_history_is_the_one_that_counts() -> None:
    kit = applied(1, 2, 3)

    again = kit.crash(recover_until=2)
    again.greet(session=kit.sessions["w"], lowest=3)
    again.push(3, value=5.0)
    again.work()
    again.write()

    third = again.crash("three")
    assert (third.total, third.holder.version, third.book().decided) == (-56.0, 3, 3)


def test_what_was_accepted_and_not_decided_is_sent_again_after_going_back() -> None:
    kit = applied(1)
    kit.push(2, cursor="c2")
    kit.write()

    again = kit.crash(recover_until=1)
    header = again.greet(session=kit.sessions["w"], lowest=2)

    assert (len(again.state.queue), header["accepted"], header["cursor"]) == (0, 1, "c1")


@pytest.mark.parametrize("version", [4, 99])
def test_a_version_that_is_not_there_changes_nothing_and_the_nearest_is_named(version: int) -> None:
    kit = applied(1, 2, 3)
    before = kit.disk.paths()

    with pytest.raises(
        CheckpointError, match=f"version {version} is not in /data: the nearest before it is 3"
    ) as caught:
        kit.crash(recover_until=version)

    assert caught.value.hint == "name that one: --recover-until 3"
    assert kit.disk.paths() == before
    assert kit.crash().holder.version == 3


def test_a_version_whose_journal_is_gone_is_not_made_up() -> None:
    kit = DurableKit(segment_bytes=4096, keep_checkpoints=1)
    kit.greet()
    for number in range(1, 101):
        kit.push(number)
        kit.work()
        kit.write()
    kit.checkpoint()

    with pytest.raises(CheckpointError):
        kit.crash(recover_until=5)


def test_damage_that_stops_a_start_is_got_over_by_the_version_that_is_named() -> None:
    """The choice that the message names must work, or a broker whose journal is damaged never starts again."""
    kit = applied(1, 2, 3, 4, 5)
    (journal,) = [path for path in kit.disk.paths() if "journal" in path]
    offset = bytes(kit.disk.read(journal)).find(b"c3")
    kit.disk.flip(journal, offset)

    with pytest.raises(DataDamaged) as caught:
        kit.crash()

    assert caught.value.path == journal
    assert caught.value.offset is not None
    assert 0 < caught.value.offset < offset
    assert caught.value.hint is not None
    assert "--recover-until 2 " in caught.value.hint
    assert "older checkpoint" in caught.value.hint
    again = kit.crash(recover_until=2)
    assert (again.total, again.holder.version) == (-16.0, 2)
    again.write()
    assert again.crash("three").total == -16.0


def test_damage_behind_the_version_that_is_asked_for_does_not_matter() -> None:
    kit = applied(1, 2)
    kit.checkpoint()
    for number in (3, 4, 5):
        kit.push(number, cursor=f"c{number}")
        kit.work()
        kit.write()
    (journal,) = [path for path in kit.disk.paths() if "journal" in path]
    kit.disk.flip(journal, bytes(kit.disk.read(journal)).find(b"c4"))

    assert kit.crash(recover_until=2).total == -16.0


def test_a_checkpoint_of_a_higher_version_at_the_same_place_is_set_aside_too() -> None:
    """Left where it is, the next start takes it, and nobody has gone back."""
    kit = DurableKit()
    kit.greet()
    kit.push(*range(1, 13))
    kit.work(12)
    kit.checkpoint()  # at the record whose decisions lead from version 0 to 12

    again = kit.crash(recover_until=9)
    assert again.holder.version == 9
    again.write()

    assert again.crash("three").holder.version == 9


def test_a_crash_while_going_back_is_got_over_by_going_back_again() -> None:
    kit = applied(1, 2, 3)
    kit.checkpoint()
    twin = kit.disk.crash(Random(0), machine=False)
    DurableKit(twin, incarnation="two", recover_until=2)
    calls = len(twin.calls)

    for call in range(1, calls + 1):
        disk = kit.disk.crash(Random(0), machine=False)
        disk.crash_at(call)
        with pytest.raises(Crash):
            DurableKit(disk, incarnation="two", recover_until=2)
        again = DurableKit(disk.crash(Random(call), machine=True), incarnation="three", recover_until=2)
        assert (again.total, again.holder.version) == (-16.0, 2), call


def test_going_back_to_the_last_version_undoes_a_destroy() -> None:
    kit = applied(1, 2)
    kit.written("destroy")

    again = kit.crash(layout=None, recover_until=2)

    assert again.holder.layout is not None


def test_without_a_journal_of_gradients_one_goes_back_to_a_checkpoint() -> None:
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    for number in (1, 2):
        kit.push(number)
        kit.work()
        kit.checkpoint()

    again = kit.crash(durability=CHECKPOINT, recover_until=1)

    assert (again.total, again.book().decided) == (-8.0, 1)
    again.write()
    assert again.crash("three", durability=CHECKPOINT).total == -8.0


# What cannot be used


def test_a_checkpoint_that_settled_gradients_and_is_damaged_stops_the_start() -> None:
    """No journal leads to it from an older one: what was told to be settled would be gone without a word."""
    kit = DurableKit(durability=CHECKPOINT)
    kit.greet()
    for number in (1, 2):
        kit.push(number)
        kit.work()
        kit.checkpoint()
    newest = kit.folder.checkpoints()[0].path
    kit.disk.flip(newest, kit.disk.size(newest) - 1)

    with pytest.raises(DataDamaged, match="is damaged") as caught:
        kit.crash(durability=CHECKPOINT)

    assert caught.value.path == newest
    assert caught.value.hint is not None
    assert "--recover-until 1" in caught.value.hint
    assert kit.crash(durability=CHECKPOINT, recover_until=1).total == -8.0


def test_with_a_journal_a_damaged_checkpoint_is_logged_and_the_older_one_used(caplog: pytest.LogCaptureFixture) -> None:
    kit = applied(1)
    kit.checkpoint()
    kit.push(2)
    kit.work()
    kit.checkpoint()
    newest = kit.folder.checkpoints()[0].path
    kit.disk.flip(newest, kit.disk.size(newest) - 1)

    assert kit.crash().total == -16.0

    assert "checkpoint is damaged, an older one is used" in caplog.text
    assert newest in caplog.text


def test_the_only_checkpoint_damaged_is_no_new_beginning() -> None:
    kit = DurableKit(durability=NONE)
    kit.hello()
    kit.push(1)
    kit.work()
    kit.checkpoint()
    only = kit.folder.checkpoints()[0].path
    kit.disk.flip(only, kit.disk.size(only) - 1)

    with pytest.raises(CheckpointError):
        kit.crash(durability=NONE)


def test_a_folder_that_is_in_use_is_refused() -> None:
    kit = DurableKit()

    with pytest.raises(DataFolderInUse):
        DurableKit(kit.disk)


@pytest.mark.parametrize("call", ["create", "sync", "sync_folder", "list"])
def test_a_folder_that_cannot_be_used_says_so_and_is_given_back(call: str) -> None:
    disk = SimDisk()
    disk.fail_next(call, errno.EROFS)

    with pytest.raises(CheckpointError, match="Read-only file system"):
        DurableKit(disk)

    assert DurableKit(disk).greet()["ok"]


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.touch()
    config = BrokerConfig(data=path)

    with pytest.raises(ConfigError, match="a file is in its place"):
        open_data(config, OsDisk(), ParameterHolder(executor="numpy"), config.consistency())


def test_on_a_real_disk_all_of_it_works_too(tmp_path: Path) -> None:
    config = BrokerConfig(data=tmp_path / "made" / "data")
    holder = ParameterHolder(executor="numpy")

    data = open_data(config, OsDisk(), holder, config.consistency())
    data.writer.close()
    again = open_data(config, OsDisk(), holder, config.consistency())
    again.writer.close()

    assert (again.recovered.sequence, again.settings.durability, again.settings.sequence) == (0, "journal", 0)
    assert (tmp_path / "made" / "data" / "FORMAT").read_text() == "distgrad data 1\n"


def test_a_recovery_by_another_executor_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The same bits are promised only by the executor that computed them (PROTOCOL 22)."""
    pytest.importorskip("numba")
    kit = applied(1)
    disk = kit.disk.crash(Random(0), machine=False)
    holder = ParameterHolder(executor="numba")

    open_data(kit.config, disk, holder, kit.config.consistency())

    holder.close()
    assert "another executor" in caplog.text


def test_parameters_of_this_start_are_used_only_if_the_folder_has_none() -> None:
    kit = DurableKit(layout=None)
    assert kit.holder.layout is None
    kit.write()
    again = kit.crash(layout=LAYOUT)
    again.written("set", frames_of(LAYOUT, 3.0))

    assert again.crash("three", layout=LAYOUT).total == 24.0
