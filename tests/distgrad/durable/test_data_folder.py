"""The data folder: one process has it, its checkpoints are found newest first, and a crash leaves whole ones."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import Disk, OsDisk
from distgrad.errors import CheckpointError, ConfigError, DataDamaged, DataFolderInUse
from support.checkpoints import Gate, Killed, checkpoint_of, content, write

DISK = OsDisk()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def folder(path: Path) -> Iterator[DataFolder]:
    with closing(DataFolder(DISK, str(path))) as folder:
        yield folder


def numbered(number: int) -> Any:
    """Make a checkpoint that differs from every other."""
    return checkpoint_of({"w": np.full(300, number, np.float32)}, ("m",), sequence=number, version=10 * number)


def add(folder: DataFolder, *numbers: int) -> list[str]:
    paths = [folder.checkpoint_path(number, 10 * number) for number in numbers]
    for number, path in zip(numbers, paths, strict=True):
        write(DISK, path, numbered(number))
    return paths


def damage(path: str, offset: int = -1) -> None:
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 4
    Path(path).write_bytes(data)


def sequences(folder: DataFolder) -> list[int]:
    return [name.sequence for name in folder.checkpoints()]


# Whose folder, and which format


def test_a_new_folder_is_made_with_those_above_it_and_says_its_format(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"

    DataFolder(DISK, str(path)).close()

    assert (path / "FORMAT").read_text() == "distgrad data 1\n"
    assert sorted(each.name for each in path.iterdir()) == ["FORMAT", "lock"]


def test_a_folder_can_be_taken_again_after_it_was_given_back(path: Path) -> None:
    for _ in range(3):
        DataFolder(DISK, str(path)).close()


def test_a_folder_that_another_process_has_is_refused_with_a_way_out(folder: DataFolder) -> None:
    with pytest.raises(DataFolderInUse, match="in use by another process") as caught:
        DataFolder(DISK, folder.path)
    assert caught.value.hint


@pytest.mark.parametrize("version", [0, 2, 31])
def test_a_folder_of_another_format_is_refused_and_given_back(path: Path, version: int) -> None:
    DataFolder(DISK, str(path)).close()
    (path / "FORMAT").write_text(f"distgrad data {version}\n")

    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"data format {version}; this distgrad reads format 1") as caught:
            DataFolder(DISK, str(path))
        assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"distgrad data", b"distgrad data 1", b"\xff\n", b"1\n", b"x" * 1000])
def test_a_format_that_cannot_be_read_is_damage_with_a_way_out(path: Path, content: bytes) -> None:
    DataFolder(DISK, str(path)).close()
    (path / "FORMAT").write_bytes(content)

    with pytest.raises(DataDamaged, match="it says") as caught:
        DataFolder(DISK, str(path))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_what_was_left_of_a_first_start_is_no_obstacle(path: Path) -> None:
    path.mkdir()
    (path / ".FORMAT.tmp").write_bytes(b"dist")

    DataFolder(DISK, str(path)).close()

    assert (path / "FORMAT").read_text() == "distgrad data 1\n"


@pytest.mark.parametrize("below", [(), ("data",)])
def test_a_file_in_its_place_is_the_users_mistake(tmp_path: Path, below: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="a file is in its place") as caught:
        DataFolder(DISK, str(tmp_path.joinpath("file", *below)))
    assert caught.value.hint


@pytest.mark.parametrize("call", ["make_folder", "lock", "create", "write", "sync", "rename", "sync_folder"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENOLCK])
def test_a_folder_that_cannot_be_written_to_is_one_line_and_is_given_back(path: Path, call: str, number: int) -> None:
    def rule(_: int, name: str) -> None:
        if name == call:
            raise OSError(number, os.strerror(number))

    gate = Gate(rule)

    with pytest.raises(CheckpointError, match="cannot use the data folder") as caught:
        DataFolder(gate.disk(DISK), str(path))
    assert os.strerror(number) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    DataFolder(DISK, str(path)).close()


# Which checkpoints


def test_checkpoints_are_listed_newest_first_and_nothing_else_is(folder: DataFolder) -> None:
    add(folder, 3, 20, 100)
    for name in (
        "checkpoint-1-1.safetensors",
        "checkpoint-.safetensors",
        "checkpoint-00000000000000000001-1.safetensors.bak",
        "checkpoint-0000000000000000000٣-1.safetensors",
        ".checkpoint-00000000000000000001-1.safetensors.tmp",
        "model.safetensors",
        "journal-1",
    ):
        (Path(folder.path) / name).write_bytes(b"")

    assert [(name.sequence, name.version) for name in folder.checkpoints()] == [(100, 1000), (20, 200), (3, 30)]
    assert [name.path for name in folder.checkpoints()] == [
        folder.checkpoint_path(number, 10 * number) for number in (100, 20, 3)
    ]


def test_of_two_at_one_place_in_the_journal_the_higher_version_is_newer(folder: DataFolder) -> None:
    for version in (9, 10, 2):
        Path(folder.checkpoint_path(5, version)).write_bytes(b"")

    assert [name.version for name in folder.checkpoints()] == [10, 9, 2]


def test_the_largest_numbers_have_a_name(folder: DataFolder) -> None:
    Path(folder.checkpoint_path(2**64 - 1, 2**64 - 1)).write_bytes(b"")

    assert folder.checkpoints()[0][:2] == (2**64 - 1, 2**64 - 1)


def test_an_empty_folder_has_no_newest(folder: DataFolder) -> None:
    assert folder.newest_whole() == (None, [])


def test_the_newest_is_taken_if_it_is_whole(folder: DataFolder) -> None:
    add(folder, 1, 2, 3)

    checkpoint, failures = folder.newest_whole()

    assert checkpoint is not None
    assert content(checkpoint) == content(numbered(3))
    assert failures == []


def test_if_the_newest_are_damaged_the_one_before_is_taken_and_each_is_told(folder: DataFolder) -> None:
    paths = add(folder, 1, 2, 3, 4)
    damage(paths[3])
    damage(paths[2], 100)
    os.truncate(paths[2], 50)

    checkpoint, failures = folder.newest_whole()

    assert checkpoint is not None
    assert checkpoint.sequence == 2
    assert [path for path, _ in failures] == [paths[3], paths[2]]
    assert all(isinstance(error, DataDamaged) for _, error in failures)


def test_if_all_are_damaged_there_is_none(folder: DataFolder) -> None:
    for path in add(folder, 1, 2):
        damage(path)

    checkpoint, failures = folder.newest_whole()

    assert checkpoint is None
    assert len(failures) == 2


def test_versions_after_the_one_that_is_wanted_are_passed_over(folder: DataFolder) -> None:
    paths = add(folder, 1, 2, 3)
    damage(paths[2])

    checkpoint, failures = folder.newest_whole(until=29)

    assert checkpoint is not None
    assert checkpoint.version == 20
    assert failures == []


def test_a_checkpoint_under_another_ones_name_is_not_taken(folder: DataFolder) -> None:
    paths = add(folder, 1, 2)
    os.rename(paths[0], folder.checkpoint_path(9, 10))

    checkpoint, failures = folder.newest_whole()

    assert checkpoint is not None
    assert checkpoint.sequence == 2
    [(_, error)] = failures
    assert os.path.basename(paths[0]) in str(error)


# Removing


def test_pruning_keeps_the_newest_and_tells_from_where_the_journal_is_needed(folder: DataFolder) -> None:
    add(folder, 1, 2, 3, 4)

    assert folder.prune(2) == 3
    assert sequences(folder) == [4, 3]
    assert folder.prune(5) == 3
    assert folder.prune(1) == 4
    assert sequences(folder) == [4]


def test_pruning_an_empty_folder_removes_nothing(folder: DataFolder) -> None:
    assert folder.prune(2) is None


@pytest.mark.parametrize("keep", [0, -1])
def test_pruning_never_removes_the_newest(folder: DataFolder, keep: int) -> None:
    add(folder, 1, 2)

    assert folder.prune(keep) == 2


def test_a_damaged_checkpoint_does_not_count_as_kept(folder: DataFolder) -> None:
    """Otherwise one of a history that was given up would outlive all whole ones."""
    paths = add(folder, 1, 2, 50)
    damage(paths[2])
    folder.newest_whole()
    add(folder, 3)

    assert folder.prune(1) == 3
    assert sequences(folder) == [50, 3]


def test_damaged_checkpoints_go_with_those_of_their_age(folder: DataFolder) -> None:
    paths = add(folder, 1, 2, 3)
    damage(paths[2])
    folder.newest_whole()
    add(folder, 4, 5)

    assert folder.prune(2) == 4
    assert sequences(folder) == [5, 4]


def test_pruning_removes_the_oldest_first(folder: DataFolder) -> None:
    add(folder, 1, 2, 3, 4)
    gate = Gate.fail(2, OSError(errno.EIO, "Input/output error"))
    folder._disk = gate.disk(DISK)

    with pytest.raises(OSError, match="Input/output"):
        folder.prune(1)

    assert sequences(folder) == [4, 3, 2]


def test_cleaning_removes_what_was_being_written_and_nothing_else(folder: DataFolder) -> None:
    add(folder, 1)
    for name in (".checkpoint-00000000000000000002-20.safetensors.tmp", ".x.tmp", "y.tmp", ".tmp", ".z"):
        (Path(folder.path) / name).write_bytes(b"x")

    removed = folder.clean()

    assert sorted(os.path.basename(path) for path in removed) == [
        ".checkpoint-00000000000000000002-20.safetensors.tmp",
        ".x.tmp",
    ]
    assert sorted(DISK.list(folder.path))[-3:] == [
        "checkpoint-00000000000000000001-10.safetensors",
        "lock",
        "y.tmp",
    ]
    assert folder.clean() == []


# Crashes


def one_more(disk: Disk, path: str) -> None:
    """Start on a folder, write a second checkpoint, and remove the first."""
    with closing(DataFolder(disk, path)) as folder:
        folder.clean()
        folder.newest_whole()
        write(disk, folder.checkpoint_path(2, 20), numbered(2))
        folder.prune(1)


def begun(disk: Disk, path: str) -> None:
    """Leave a folder with a first checkpoint."""
    with closing(DataFolder(disk, path)) as folder:
        write(disk, folder.checkpoint_path(1, 10), numbered(1))


def assert_old_or_new_and_whole(disk: Disk, path: str) -> int:
    """Start again, as a restarted broker does; return which one it found."""
    with closing(DataFolder(disk, path)) as folder:
        folder.clean()
        checkpoint, failures = folder.newest_whole()
        assert failures == []
        assert checkpoint is not None
        assert content(checkpoint) == content(numbered(checkpoint.sequence))
        assert set(disk.list(path)) <= {"FORMAT", "lock", *(os.path.basename(c.path) for c in folder.checkpoints())}
        return checkpoint.sequence


def n_calls(path: Path) -> int:
    gate = Gate.watch()
    begun(DISK, str(path))
    one_more(gate.disk(DISK), str(path))
    return len(gate.calls)


def test_a_process_killed_at_any_call_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for at in range(n_calls(tmp_path / "whole")):
        path = str(tmp_path / str(at))
        begun(DISK, path)
        gate = Gate.kill(at)
        with pytest.raises(Killed):
            one_more(gate.disk(DISK), path)
        gate.end()

        found.append(assert_old_or_new_and_whole(DISK, path))

    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_process_killed_at_any_call_of_its_first_start_can_start_again(tmp_path: Path) -> None:
    gate = Gate.watch()
    DataFolder(gate.disk(DISK), str(tmp_path / "whole")).close()
    for at in range(len(gate.calls)):
        path = str(tmp_path / str(at))
        gate = Gate.kill(at)
        with pytest.raises(Killed):
            DataFolder(gate.disk(DISK), path).close()
        gate.end()

        begun(DISK, path)

        assert assert_old_or_new_and_whole(DISK, path) == 1
