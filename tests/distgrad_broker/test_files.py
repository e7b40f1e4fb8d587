"""Tests of `distgrad_broker.files`."""

from __future__ import annotations

import errno
import os
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import Disk, OsDisk
from distgrad.durable.disk_events import DiskTroubled, RecordsWritten, WriteCheckpoint
from distgrad.durable.disk_writer import PIECE_BYTES, DiskWriter
from distgrad.durable.journal import resume
from distgrad.durable.journal_reader import read as read_journal
from distgrad.durable.records import Record
from distgrad.layout import Layout
from distgrad.parameter_files import as_nest, read
from distgrad_broker import files
from distgrad_broker.events import SaveEnded, SaveParameters
from distgrad_broker.files import FileThread
from support.sim_disk import SimDisk

NEST = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array([3])}
LAYOUT = Layout.of(NEST)


def job(ticket: int) -> SaveParameters:
    return SaveParameters(ticket, LAYOUT, LAYOUT.pack(NEST), 7)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_save_is_written_and_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    thread = FileThread(str(path), ended.put)

    thread.save(job(3))

    assert ended.get(timeout=20) == SaveEnded(3, str(path), None)
    thread.close()
    written = as_nest(read(path))
    np.testing.assert_array_equal(written["w"], NEST["w"])
    np.testing.assert_array_equal(written["n"], NEST["n"])


def test_what_goes_wrong_is_told_and_the_thread_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    thread = FileThread(str(folder / "w.npz"), ended.put)

    thread.save(job(1))
    error = ended.get(timeout=20).error
    assert error is not None
    assert "later" in error
    folder.mkdir()
    thread.save(job(2))
    assert ended.get(timeout=20).error is None
    thread.close()


def test_close_ends_the_thread_after_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    ended: list[Any] = []

    def slow_write(_path: str, _nest: object) -> None:
        gate.wait(20)

    monkeypatch.setattr(files, "write", slow_write)
    thread = FileThread(str(tmp_path / "w.npz"), ended.append)
    thread.save(job(1))
    closing = threading.Thread(target=thread.close)
    closing.start()
    assert ended == []
    gate.set()
    closing.join()

    assert [save.ticket for save in ended] == [1]


def test_a_thread_that_was_never_needed_is_never_started(tmp_path: Path) -> None:
    thread = FileThread(str(tmp_path / "w.npz"), lambda _: None)

    thread.close()
    thread.close()


def test_without_a_path_nothing_is_written() -> None:
    assert FileThread(None, lambda _: None).write_now(job(1)) == "no file was named"


# With a data folder


class Desk:
    """A file thread with a data folder, and a list of what it told."""

    def __init__(self, folder: Path, disk: Disk | None = None, **settings: Any) -> None:
        self.disk = disk or OsDisk()
        self.path = str(folder)
        self.folder = DataFolder(self.disk, self.path)
        journal = resume(self.disk, self.path, next_sequence=1)
        self.writer = DiskWriter(self.disk, self.folder, journal, **settings)
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = FileThread(None, self.told.put, self.writer)

    def next(self) -> Any:
        return self.told.get(timeout=20)

    def close(self) -> list[int]:
        """End the thread, and give the sequences that are on the disk."""
        self.thread.close()
        self.writer.close()
        return [record.sequence for record in read_journal(self.disk, self.path, 1)]


def records(count: int, size: int = 8) -> list[Record]:
    return [Record(b"\x92", [bytes(size)]) for _ in range(count)]


def test_records_are_written_and_told(tmp_path: Path) -> None:
    desk = Desk(tmp_path)

    desk.thread.write(records(3))

    assert desk.next() == RecordsWritten(3)
    assert desk.close() == [1, 2, 3]


def test_no_records_start_no_thread(tmp_path: Path) -> None:
    desk = Desk(tmp_path)

    desk.thread.write([])

    assert not [thread for thread in threading.enumerate() if thread.name == "distgrad-files"]
    desk.close()


def test_a_checkpoint_comes_after_the_records_that_it_covers(tmp_path: Path) -> None:
    desk = Desk(tmp_path, sync_s=1000.0)
    checkpoint = Checkpoint(2, 7, b"", LAYOUT, LAYOUT.pack(NEST))

    desk.thread.write(records(2))
    desk.thread.checkpoint(WriteCheckpoint(4, checkpoint, 3))

    assert desk.next() == RecordsWritten(2)
    ended = desk.next()
    assert (ended.ticket, ended.error) == (4, None)
    assert os.path.exists(ended.path)
    desk.close()


def test_a_disk_that_fails_is_tried_again_without_more_to_do(tmp_path: Path) -> None:
    disk = SimDisk()
    disk.make_folder(str(tmp_path))
    desk = Desk(tmp_path, disk)
    disk.fail_next("sync", errno.EIO)

    desk.thread.write(records(1))

    assert isinstance(desk.next(), DiskTroubled)
    assert desk.next() == DiskTroubled(None)
    assert desk.next() == RecordsWritten(1)
    desk.close()


def test_records_that_may_wait_are_written_at_the_end(tmp_path: Path) -> None:
    desk = Desk(tmp_path, sync_s=1000.0)
    desk.thread.write(records(2))

    assert desk.close() == [1, 2]


def test_all_records_are_written_at_the_end_also_where_they_are_more_than_a_piece(tmp_path: Path) -> None:
    desk = Desk(tmp_path, sync_s=1000.0)
    desk.thread.write(records(3, PIECE_BYTES // 2 + 1))

    assert desk.close() == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_that_nobody_has_thought_of_is_told(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    Path(tmp_path, "journal-00000000000000000009.log").touch()  # somebody else's, of later records

    desk.thread.write(records(1))
    desk.thread.close()
    desk.writer.close()

    assert not desk.told.empty()
