"""The operating system's files do what the protocol promises."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad.durable import disk as disk_module
from distgrad.durable.disk import Disk, OsDisk
from distgrad.errors import DataFolderInUse
from support.processes import clean_environment

HOLD = """
import sys
from distgrad.durable.disk import OsDisk

lock = OsDisk().lock(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def disk() -> Disk:
    return OsDisk()


def test_buffers_are_written_behind_one_another(disk: Disk, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    buffers = [b"", b"one", memoryview(b"two"), np.arange(5000, dtype=np.uint8), bytearray(b"x" * 5000), b"", b"end"]
    whole = b"".join(map(bytes, buffers))

    file = disk.create(path)
    assert file.write(0, [b"0123456789"]) == 10
    assert file.write(4, buffers) == len(whole)
    assert file.write(2, []) == 0
    file.sync()
    file.close()

    assert bytes(disk.read(path)) == b"0123" + whole
    assert disk.size(path) == 4 + len(whole)


def test_more_buffers_than_one_call_takes_are_all_written(disk: Disk, tmp_path: Path) -> None:
    buffers = [bytes([index % 251]) * 4096 for index in range(2100)]

    file = disk.create(str(tmp_path / "a"))
    assert file.write(0, buffers) == 2100 * 4096
    file.close()

    assert bytes(disk.read(str(tmp_path / "a"))) == b"".join(buffers)


def test_writing_goes_on_where_the_system_stopped(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take a part of what it is given: 7 bytes at a time here."""

    def write_little(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        return os.pwrite(descriptor, b"".join(buffers)[:7], offset)

    monkeypatch.setattr(disk_module, "_write_at", write_little)
    buffers = [os.urandom(5000), b"abc", os.urandom(4096)]

    file = disk.create(str(tmp_path / "a"))
    assert file.write(3, buffers) == 9099
    file.close()

    assert bytes(disk.read(str(tmp_path / "a"), 3)) == b"".join(buffers)


def test_a_system_that_takes_nothing_ends_the_writing(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "_write_at", lambda *_: 0)
    file = disk.create(str(tmp_path / "a"))

    assert file.write(0, [b"abc"]) == 0
    file.close()


def test_writing_works_without_gathered_writes(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwritev")
    buffers = [b"a" * 5000, b"b" * 5000]

    file = disk.create(str(tmp_path / "a"))
    assert file.write(2, buffers) == 10_000
    file.close()

    assert bytes(disk.read(str(tmp_path / "a"))) == bytes(2) + b"".join(buffers)


def test_reserved_room_reads_as_zeros_and_can_be_given_back(disk: Disk, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    file = disk.create(path)
    file.write(0, [b"abc"])

    file.allocate(10_000)
    assert bytes(disk.read(path)) == b"abc" + bytes(9997)
    file.truncate(2)
    file.close()

    assert bytes(disk.read(path)) == b"ab"


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [(0, None, b"0123456789"), (3, 4, b"3456"), (3, 100, b"3456789"), (10, None, b""), (20, 5, b""), (0, 0, b"")],
)
def test_a_piece_is_read_into_memory_of_its_own(
    disk: Disk, tmp_path: Path, offset: int, size: int | None, expected: bytes
) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")

    piece = disk.read(str(tmp_path / "a"), offset, size)
    (tmp_path / "a").write_bytes(b"")

    assert piece == expected
    assert (piece.format, piece.itemsize) == ("B", 1)


def test_large_files_are_read_whole(disk: Disk, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)

    assert bytes(disk.read(str(tmp_path / "a"))) == data


def test_a_file_is_made_once_and_opened_only_if_it_is_there(disk: Disk, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    disk.create(path).close()

    with pytest.raises(FileExistsError):
        disk.create(path)
    with pytest.raises(FileNotFoundError):
        disk.open(path + "b")
    file = disk.open(path)
    file.write(0, [b"again"])
    file.close()

    assert bytes(disk.read(path)) == b"again"


def test_names_change_as_asked(disk: Disk, tmp_path: Path) -> None:
    folder = str(tmp_path / "x" / "y")
    disk.make_folder(folder)
    disk.make_folder(folder)
    for name in ("b", "a", "c"):
        file = disk.create(os.path.join(folder, name))
        file.write(0, [name.encode()])
        file.close()

    disk.rename(os.path.join(folder, "a"), os.path.join(folder, "c"))
    disk.remove(os.path.join(folder, "b"))
    disk.sync_folder(folder)

    assert disk.list(folder) == ["c"]
    assert bytes(disk.read(os.path.join(folder, "c"))) == b"a"
    with pytest.raises(FileNotFoundError):
        disk.sync_folder(folder + "z")


def test_a_lock_is_held_until_it_is_closed(disk: Disk, tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    lock = disk.lock(path)

    with pytest.raises(DataFolderInUse, match=f"{tmp_path} is in use by another process") as caught:
        disk.lock(path)
    assert caught.value.hint
    lock.close()

    disk.lock(path).close()


def test_the_end_of_a_process_however_it_ends_gives_its_lock_back(disk: Disk, tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(DataFolderInUse):
            disk.lock(path)
        process.kill()
        process.wait()

        disk.lock(path).close()


def test_a_lock_file_that_cannot_be_made_is_no_folder_in_use(disk: Disk, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        disk.lock(str(tmp_path / "missing" / "lock"))
    assert caught.value.errno == errno.ENOENT


def test_a_second_close_does_not_close_what_got_the_number_since(tmp_path: Path) -> None:
    disk = OsDisk()
    file, lock = disk.create(str(tmp_path / "file")), disk.lock(str(tmp_path / "lock"))
    file.close()
    lock.close()
    others = [os.open(tmp_path, os.O_RDONLY) for _ in range(2)]

    file.close()
    lock.close()

    for other in others:
        os.close(other)  # an error if it is not open any more


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_what_is_on_the_disk_is_not_kept_in_memory_a_page_that_is_not_full_is(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up: list[int] = []
    file = disk.create(str(tmp_path / "file"))
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, size, advice: given_up.append(offset + size))

    file.write(0, [bytes(1000)])
    file.sync()
    assert given_up == []  # little: not worth a call
    file.write(1000, [bytes(2 << 20)])
    del given_up[:]  # the system was told to begin writing
    file.sync()
    file.sync()

    assert given_up == [1000 + (2 << 20)]  # up to where there is something, so that Linux keeps the page it ends in
    file.close()
