"""The simulated disk keeps the protocol, and forgets what a real one may forget."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from distgrad.durable.disk import Disk, OsDisk
from distgrad.errors import DataFolderInUse
from support.sim_disk import Crash, SimDisk, Stage

Outcome = str | bytes | int | list[str] | None


def new_disk(capacity: int | None = None) -> SimDisk:
    disk = SimDisk(1, capacity=capacity)
    disk.make_folder("d")
    return disk


def durable_file(disk: SimDisk, path: str, data: bytes) -> None:
    file = disk.create(path)
    file.write(0, [data])
    file.sync()
    file.close()
    disk.sync_folder(os.path.dirname(path))


def outcomes(look: Callable[[SimDisk], Outcome], disk: SimDisk, *, machine: bool = True) -> list[Outcome]:
    """Look at what many crashes leave."""
    found: list[Outcome] = []
    for seed in range(200):
        outcome = look(disk.crash(Random(seed), machine=machine))
        if outcome not in found:
            found.append(outcome)
    return found


def content(disk: Disk, path: str) -> bytes | None:
    try:
        return bytes(disk.read(path))
    except FileNotFoundError:
        return None


def test_it_does_what_the_real_one_does(tmp_path: Path) -> None:
    """Random calls on both, with the same results and errors."""
    random = Random(3)
    simulated, real = SimDisk(), OsDisk()
    simulated.make_folder("d")
    folders: list[tuple[Disk, str]] = [(simulated, "d"), (real, str(tmp_path))]

    def act(disk: Disk, folder: str, name: str, other: str, what: int, number: int) -> Outcome:
        path = os.path.join(folder, name)
        try:
            if what == 0:
                disk.create(path).close()
            elif what == 1:
                disk.rename(path, os.path.join(folder, other))
            elif what == 2:
                disk.remove(path)
            elif what == 3:
                return bytes(disk.read(path, number, number))
            elif what == 4:
                return disk.size(path)
            elif what == 5:
                return disk.list(folder)
            else:
                file = disk.open(path)
                try:
                    if what == 6:
                        file.truncate(number)
                    elif what == 7:
                        file.allocate(number + 1)
                    elif what == 8:
                        file.sync()
                    else:
                        return file.write(number, [bytes([number % 256]) * number, b"end"])
                finally:
                    file.close()
        except OSError as error:
            return error.errno
        return None

    for _ in range(3000):
        name, other = random.choice("abc"), random.choice("abc")
        what, number = random.randrange(14), random.randrange(2000)
        first, second = [act(disk, folder, name, other, what, number) for disk, folder in folders]
        assert first == second
    for name in "abc":
        assert content(simulated, f"d/{name}") == content(real, str(tmp_path / name))


def test_what_was_synced_outlives_the_machine() -> None:
    disk = new_disk()
    durable_file(disk, "d/a", b"x" * 3000)

    assert outcomes(lambda after: content(after, "d/a"), disk) == [b"x" * 3000]


def test_what_was_written_outlives_the_process_and_is_still_unsynced() -> None:
    disk = new_disk()
    disk.create("d/a").write(0, [b"x" * 600])

    assert outcomes(lambda after: content(after, "d/a"), disk, machine=False) == [b"x" * 600]
    assert None in outcomes(lambda after: content(after, "d/a"), disk.crash(Random(1), machine=False))


def test_sectors_survive_in_any_subset() -> None:
    disk = new_disk()
    durable_file(disk, "d/a", b"a" * 2048)
    disk.open("d/a").write(100, [b"b" * 1500])

    found = outcomes(lambda after: content(after, "d/a"), disk)

    assert len(found) == 2**4
    for data in found:
        assert isinstance(data, bytes)
        assert {data[:100], data[1600:]} == {b"a" * 100, b"a" * 448}
        assert {bytes(set(data[start:stop])) for start, stop in [(100, 512), (512, 1024), (1024, 1536)]} <= {b"a", b"b"}


def test_a_file_may_have_its_old_length_or_any_between() -> None:
    disk = new_disk()
    durable_file(disk, "d/a", b"")
    disk.open("d/a").write(0, [b"b" * 1000])

    lengths = {len(data) for data in outcomes(lambda after: content(after, "d/a"), disk) if isinstance(data, bytes)}

    assert {0, 512, 1000} < lengths


def test_truncating_and_reserving_may_be_forgotten() -> None:
    disk = new_disk()
    durable_file(disk, "d/a", b"a" * 1000)
    durable_file(disk, "d/b", b"b")
    disk.open("d/a").truncate(10)
    disk.open("d/b").allocate(3)

    assert set(outcomes(lambda after: after.size("d/a"), disk)) == {10, 1000}
    assert {1, 3} <= set(outcomes(lambda after: after.size("d/b"), disk))


def test_names_may_be_forgotten_until_the_folder_is_synced() -> None:
    disk = new_disk()
    durable_file(disk, "d/old", b"1")
    durable_file(disk, "d/gone", b"2")
    file = disk.create("d/new")
    file.write(0, [b"3"])
    file.sync()
    disk.rename("d/old", "d/renamed")
    disk.remove("d/gone")

    found = outcomes(lambda after: after.list("d"), disk)
    disk.sync_folder("d")

    assert len(found) == 2**3
    for names in found:
        assert isinstance(names, list)
        assert ("old" in names) != ("renamed" in names)
    assert outcomes(lambda after: after.list("d"), disk) == [["new", "renamed"]]


def test_a_file_that_replaces_another_is_whole_or_the_other() -> None:
    disk = new_disk()
    durable_file(disk, "d/a", b"old")
    durable_file(disk, "d/a.tmp", b"new")
    disk.rename("d/a.tmp", "d/a")

    assert set(outcomes(lambda after: content(after, "d/a"), disk)) == {b"old", b"new"}


def test_a_sync_that_failed_is_not_made_good_by_another() -> None:
    disk = new_disk()
    durable_file(disk, "d/a", b"a" * 5000)
    file = disk.open("d/a")
    file.write(0, [b"b" * 5000])
    disk.fail_next("sync", errno.EIO)

    with pytest.raises(OSError, match="Input/output error"):
        file.sync()
    file.sync()

    assert bytes(disk.read("d/a")) == b"b" * 5000
    [data] = outcomes(lambda after: content(after, "d/a"), disk)
    assert isinstance(data, bytes)
    assert set(data) == set(b"ab")


def test_a_full_disk_takes_what_it_can_and_goes_on_when_there_is_room() -> None:
    disk = new_disk(capacity=100)
    file = disk.create("d/a")
    file.write(0, [b"x" * 60])

    with pytest.raises(OSError, match="No space"):
        file.allocate(101)
    with pytest.raises(OSError, match="No space"):
        file.write(60, [b"y" * 60])
    assert (disk.size("d/a"), disk.used) == (100, 100)
    file.truncate(60)
    disk.capacity = 200
    file.allocate(110)
    assert file.write(60, [b"z" * 60]) == 60

    assert bytes(disk.read("d/a")) == b"x" * 60 + b"z" * 60
    disk.remove("d/a")
    assert disk.used == 0


@pytest.mark.parametrize(("stage", "expected"), [(Stage.BEFORE, 0), (Stage.MIDDLE, None), (Stage.AFTER, 1000)])
def test_a_crash_stops_a_write_where_it_is_told_and_everything_after(stage: Stage, expected: int | None) -> None:
    disk = new_disk()
    file = disk.create("d/a")
    disk.crash_at(2, stage)

    with pytest.raises(Crash):
        file.write(0, [b"x" * 1000])
    for call in (file.sync, lambda: disk.remove("d/a"), lambda: disk.list("d")):
        with pytest.raises(Crash):
            call()
    file.close()

    size = disk.crash(Random(1), machine=False).size("d/a")
    assert size == expected if expected is not None else 0 < size < 1000
    assert disk.calls == ["create", "write"]


def test_calls_fail_as_told_and_then_no_more() -> None:
    disk = new_disk()
    disk.fail_at(1, errno.EACCES)
    disk.fail_next("read", errno.EIO, times=2)
    disk.fail_next("sync_folder", errno.EIO)

    with pytest.raises(PermissionError):
        disk.create("d/a")
    disk.create("d/a").close()
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            disk.read("d/a")
    disk.mend()
    disk.sync_folder("d")

    assert bytes(disk.read("d/a")) == b""


def test_the_same_seed_gives_the_same_disk() -> None:
    disk = new_disk()
    for name in "abc":
        disk.create(f"d/{name}").write(0, [os.urandom(5000)])

    first, second = [disk.crash(Random(8)) for _ in range(2)]

    assert first.paths() == second.paths()
    assert [first.read(path) for path in first.paths()] == [second.read(path) for path in first.paths()]


def test_a_crash_leaves_the_disk_that_it_came_from_alone() -> None:
    disk = new_disk()
    durable_file(disk, "d/a", b"abc")

    after = disk.crash(Random(1), machine=False)
    after.open("d/a").write(0, [b"x"])
    after.remove("d/a")

    assert bytes(disk.read("d/a")) == b"abc"


def test_a_lock_ends_with_its_process() -> None:
    disk = new_disk()
    lock = disk.lock("d/lock")

    with pytest.raises(DataFolderInUse):
        disk.lock("d/lock")
    disk.crash(Random(1), machine=False).lock("d/lock").close()
    lock.close()
    disk.lock("d/lock").close()


def test_between_folders_a_file_may_have_both_names_or_none() -> None:
    disk = new_disk()
    disk.make_folder("e")
    durable_file(disk, "d/a", b"abc")
    disk.rename("d/a", "e/a")

    assert (disk.list("d"), disk.list("e")) == ([], ["a"])
    assert len(outcomes(lambda after: after.list("d") + after.list("e"), disk)) > 1
    disk.sync_folder("e")
    disk.sync_folder("d")
    assert outcomes(lambda after: after.paths(), disk) == [["e/a"]]


def test_a_closed_file_and_missing_folders_are_errors() -> None:
    disk = new_disk()
    file = disk.create("d/a")
    file.close()

    for call in (lambda: file.write(0, [b"x"]), file.sync, lambda: disk.list("e"), lambda: disk.sync_folder("e")):
        with pytest.raises(OSError):  # noqa: PT011 - the kinds differ
            call()
    with pytest.raises(FileNotFoundError):
        disk.create("e/a")


def test_a_changed_byte_is_changed_for_good() -> None:
    disk = new_disk()
    durable_file(disk, "d/a", b"abc")

    disk.flip("d/a", 1, 0x20)

    assert bytes(disk.read("d/a")) == b"aBc"
    assert bytes(disk.crash(Random(1)).read("d/a")) == b"aBc"
