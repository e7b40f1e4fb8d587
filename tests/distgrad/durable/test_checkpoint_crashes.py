"""A machine that stops, or a disk that fails or fills up, at any call: the old set of checkpoints or the new one."""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import closing
from random import Random

import numpy as np
import pytest

from distgrad.durable import checkpoint_file
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import Disk
from support.checkpoints import checkpoint_of, content, write
from support.sim_disk import Crash, SimDisk, Stage

PATH = "/disk/data"
# What the simulated machine forgets, and where a torn write ends, is drawn anew for each.
SEEDS = range(6)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, "PIECE_BYTES", 1000)
    monkeypatch.setattr(checkpoint_file, "SYNC_BYTES", 2000)


def numbered(number: int) -> Checkpoint:
    """Make a checkpoint that differs from every other."""
    return checkpoint_of({"w": np.full(300, number, np.float32)}, ("m",), sequence=number, version=10 * number)


def one_more(disk: Disk, number: int, keep: int) -> None:
    """Start on a folder as a broker does, write a checkpoint, and remove the oldest."""
    with closing(DataFolder(disk, PATH)) as folder:
        folder.clean()
        folder.newest_whole()
        write(disk, folder.checkpoint_path(number, 10 * number), numbered(number))
        folder.prune(keep)


def begun(seed: int = 0) -> SimDisk:
    """Give a disk with two checkpoints on it."""
    disk = SimDisk(seed)
    one_more(disk, 1, 2)
    one_more(disk, 2, 2)
    return disk


def found_whole(disk: Disk) -> list[int]:
    """Start again; return which checkpoints are there, newest first, all of which are whole."""
    with closing(DataFolder(disk, PATH)) as folder:
        folder.clean()
        newest, failures = folder.newest_whole()
        names = folder.checkpoints()
        assert failures == []
        assert newest is not None
        assert newest.sequence == names[0].sequence
        for name in names:
            checkpoint = checkpoint_file.read_checkpoint(disk, name.path)
            assert content(checkpoint) == content(numbered(name.sequence))
        assert set(disk.list(PATH)) - {os.path.basename(name.path) for name in names} <= {"FORMAT", "lock"}
        return [name.sequence for name in names]


@pytest.fixture
def calls(small_steps: None) -> list[str]:
    """Name the calls that a third checkpoint takes."""
    disk = begun()
    before = len(disk.calls)
    one_more(disk, 3, 2)
    return disk.calls[before:]


# Removals that were not synced may come back, one of them or all.
OLD, BOTH, NEW = [2, 1], [3, 2, 1], [3, 2]


def test_a_checkpoint_is_synced_before_it_has_its_name_and_its_name_before_others_go(calls: list[str]) -> None:
    assert calls[:2] == ["sync_folder", "create"]
    assert calls[-5:] == ["sync", "rename", "sync_folder", "remove", "sync_folder"]
    assert calls.count("sync") > 1


@pytest.mark.parametrize("machine", [True, False], ids=["machine", "process"])
@pytest.mark.parametrize("stage", Stage)
def test_a_crash_at_any_call_leaves_the_old_checkpoints_or_the_new_ones(
    calls: list[str], stage: Stage, machine: bool
) -> None:
    certain = calls.index("rename") + 1 + (0 if stage is Stage.AFTER else 1)
    for at, seed in itertools.product(range(len(calls)), SEEDS):
        disk = begun(seed)
        disk.crash_at(len(disk.calls) + at + 1, stage)
        with pytest.raises(Crash):
            one_more(disk, 3, 2)

        found = found_whole(disk.crash(Random(seed), machine=machine))

        assert found in (OLD, BOTH, NEW), (at, seed)
        if at >= certain:
            assert found != OLD, (at, seed)
        if at <= calls.index("rename") and stage is Stage.BEFORE:
            assert found == OLD, (at, seed)


def test_what_crashes_again_and_again_loses_nothing_that_was_certain(calls: list[str]) -> None:
    for seed in range(30):
        random = Random(seed)
        disk, certain = begun(seed), 2
        for number in range(3, 10):
            disk.crash_at(len(disk.calls) + random.randrange(1, 2 * len(calls)), random.choice(list(Stage)))
            try:
                one_more(disk, number, 2)
                certain = number
            except Crash:
                disk = disk.crash(random, machine=random.random() < 0.8)
            disk.mend()

            newest, *others = found_whole(disk)

            assert newest in (certain, number), (seed, number)
            assert others, (seed, number)
            certain = newest  # a crash of the process alone may have left it uncertain, but that start has mended it


def test_what_one_start_has_found_the_next_one_finds_too(calls: list[str]) -> None:
    """A process that is killed right after it renamed a checkpoint leaves a name that the disk may still forget."""
    for seed in range(20):
        disk = begun(seed)
        disk.crash_at(len(disk.calls) + calls.index("rename") + 1, Stage.AFTER)
        with pytest.raises(Crash):
            one_more(disk, 3, 2)
        disk = disk.crash(Random(seed), machine=False)

        assert found_whole(disk) == BOTH
        assert found_whole(disk.crash(Random(seed))) == BOTH


def test_a_crash_at_any_call_of_the_first_start_is_no_obstacle() -> None:
    disk = SimDisk()
    DataFolder(disk, PATH).close()
    for at, stage, seed in itertools.product(range(1, len(disk.calls) + 1), Stage, SEEDS):
        disk = SimDisk(seed)
        disk.crash_at(at, stage)
        with pytest.raises(Crash):
            DataFolder(disk, PATH)

        disk = disk.crash(Random(seed))
        one_more(disk, 1, 2)

        assert found_whole(disk) == [1]


@pytest.mark.parametrize("stage", [Stage.BEFORE, Stage.MIDDLE])
def test_an_error_at_any_call_costs_only_the_new_checkpoint(calls: list[str], stage: Stage) -> None:
    for at, seed in itertools.product(range(len(calls)), SEEDS):
        disk = begun(seed)
        disk.fail_at(len(disk.calls) + at + 1, errno.EIO, stage)
        with pytest.raises(OSError, match="Input/output"):
            one_more(disk, 3, 2)

        assert not [name for name in disk.list(PATH) if name.endswith(".tmp")], (at, seed)
        assert found_whole(disk) in (OLD, BOTH, NEW), (at, seed)
        assert found_whole(disk.crash(Random(seed))) in (OLD, BOTH, NEW), (at, seed)


def test_a_disk_that_is_full_at_any_byte_leaves_nothing_behind() -> None:
    disk = begun()
    used = disk.used
    one_more(disk, 3, 3)
    needed = disk.used - used
    for room in range(0, needed, 97):
        disk = begun(room)
        disk.capacity = used + room
        before = disk.paths()
        with pytest.raises(OSError, match="No space left"):
            one_more(disk, 3, 2)

        assert disk.paths() == before, room
        assert disk.used == used, room
        assert found_whole(disk) == OLD, room

    disk.capacity = used + needed
    one_more(disk, 3, 2)
    assert found_whole(disk) == NEW


def test_of_two_checkpoints_the_one_that_decayed_on_the_disk_is_passed_over() -> None:
    for seed in range(40):
        disk = begun()
        with closing(DataFolder(disk, PATH)) as folder:
            newest = folder.checkpoints()[0].path
            disk.flip(newest, Random(seed).randrange(disk.size(newest)), 1 << seed % 8)
            checkpoint, failures = folder.newest_whole()

        assert checkpoint is not None
        assert content(checkpoint) == content(numbered(1))
        assert [path for path, _ in failures] == [newest]


def test_a_file_that_cannot_be_read_now_is_passed_over() -> None:
    disk = begun()
    with closing(DataFolder(disk, PATH)) as folder:
        disk.fail_next("read", errno.EIO)
        checkpoint, failures = folder.newest_whole()

    assert checkpoint is not None
    assert checkpoint.sequence == 1
    [(_, error)] = failures
    assert "Input/output error" in str(error)
