"""The file thread's work, a step at a time: what is told when, what a failing disk costs, what may be removed."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk_events import CheckpointEnded, DiskTroubled, RecordsWritten, WriteCheckpoint
from distgrad.durable.disk_writer import PIECE_BYTES, RETRY_S, DiskWriter
from distgrad.durable.journal import resume
from distgrad.durable.journal_reader import read, segments
from distgrad.durable.records import Record
from distgrad.layout import Layout
from support.sim_disk import SimDisk

FOLDER = "data"
LAYOUT = Layout.of(np.zeros(4, np.float32))


class Desk:
    """A writer, its disk, and a clock."""

    def __init__(self, *, journal: bool = True, segment_bytes: int = 4096, **settings: Any) -> None:
        self.disk = SimDisk()
        self.folder = DataFolder(self.disk, FOLDER)
        self.journal = (
            resume(self.disk, FOLDER, next_sequence=1, segment_bytes=segment_bytes, salt=3) if journal else None
        )
        self.writer = DiskWriter(self.disk, self.folder, self.journal, **settings)
        self.now = 100.0
        self.sequence = 0
        self.tickets = 0

    def record(self, count: int = 1, size: int = 8) -> None:
        self.sequence += count
        self.writer.records([Record(b"\x92", [bytes(size)]) for _ in range(count)])

    def checkpoint(
        self, sequence: int | None = None, version: int | None = None, first_needed: int | None = None, size: int = 4
    ) -> str:
        """Ask for a checkpoint, by default of all that was recorded; give its path."""
        sequence = self.sequence if sequence is None else sequence
        version = self.tickets if version is None else version
        self.tickets += 1
        layout = Layout.of(np.zeros(size, np.float32))
        checkpoint = Checkpoint(sequence, version, b"", layout, layout.pack(np.ones(size, np.float32)))
        self.writer.checkpoint(WriteCheckpoint(self.tickets, checkpoint, first_needed or sequence + 1))
        return self.folder.checkpoint_path(sequence, version)

    def step(self) -> list[Any]:
        return self.writer.step(self.now)

    def run(self) -> list[Any]:
        """Step until nothing is due."""
        told = self.step()
        while self.writer.wait_s(self.now) == 0.0:
            told += self.step()
        return told

    def on_disk(self) -> list[int]:
        return [record.sequence for record in read(self.disk, FOLDER, self.first)]

    @property
    def first(self) -> int:
        return segments(self.disk, FOLDER)[0].first

    def checkpoints(self) -> list[str]:
        return [name.path for name in reversed(self.folder.checkpoints())]


def test_records_are_told_as_written_when_they_are_on_the_disk() -> None:
    desk = Desk()
    desk.record(3)

    assert desk.writer.wait_s(desk.now) == 0.0
    assert desk.step() == [RecordsWritten(3)]

    assert desk.on_disk() == [1, 2, 3]
    assert desk.disk.calls[-1] in ("sync", "sync_folder")
    assert desk.writer.wait_s(desk.now) is None
    assert desk.step() == []


def test_what_comes_together_is_synced_once() -> None:
    desk = Desk()
    desk.record(1)
    desk.step()
    before = desk.disk.calls.count("sync")

    desk.record(5)
    desk.record(5)
    desk.step()

    assert desk.disk.calls.count("sync") == before + 1


def test_records_wait_for_a_sync_that_is_to_come_later_and_then_go_together() -> None:
    desk = Desk(sync_s=0.5)
    desk.record()

    assert desk.writer.wait_s(desk.now) == 0.5
    assert desk.step() == []
    desk.now += 0.3
    desk.record()
    assert desk.writer.wait_s(desk.now) == pytest.approx(0.2)
    desk.now += 0.2

    assert desk.step() == [RecordsWritten(2)]
    desk.record()
    assert desk.writer.wait_s(desk.now) == 0.5, "the next ones wait anew"


def test_enough_bytes_do_not_wait() -> None:
    desk = Desk(sync_s=1.0, sync_bytes=100)
    desk.record(size=50)
    assert desk.step() == []

    desk.record(size=50)

    assert desk.writer.wait_s(desk.now) == 0.0
    assert desk.step() == [RecordsWritten(2)]


def test_at_the_end_nothing_waits_for_more() -> None:
    desk = Desk(sync_s=1000.0)
    desk.record()

    desk.writer.hurry()

    assert desk.step() == [RecordsWritten(1)]


def test_a_checkpoint_does_not_wait_for_the_time_of_its_records() -> None:
    desk = Desk(sync_s=1000.0)
    desk.record()

    path = desk.checkpoint()

    assert desk.run() == [RecordsWritten(1), CheckpointEnded(1, path, None)]


def test_much_is_told_a_piece_at_a_time() -> None:
    desk = Desk(segment_bytes=1 << 26)
    desk.record(5, PIECE_BYTES // 2)

    assert desk.step() == [RecordsWritten(2)]
    assert desk.writer.wait_s(desk.now) == 0.0
    assert desk.run() == [RecordsWritten(4), RecordsWritten(5)]


def test_a_disk_that_fails_is_told_once_a_try_and_nothing_is_told_as_written() -> None:
    desk = Desk()
    desk.disk.fail_next("sync", errno.EIO, times=2)
    desk.record(2)

    (trouble,) = desk.step()
    assert isinstance(trouble, DiskTroubled)
    assert trouble.reason is not None
    assert "Input/output error" in trouble.reason
    assert desk.writer.wait_s(desk.now) == pytest.approx(RETRY_S)
    assert desk.step() == [], "not before its time"

    desk.record(1)
    desk.now += RETRY_S
    (again,) = desk.step()
    assert again == trouble
    desk.now += RETRY_S
    assert desk.step() == [DiskTroubled(None), RecordsWritten(3)]
    assert desk.on_disk() == [1, 2, 3]


def test_a_full_disk_gets_everything_once_there_is_room() -> None:
    desk = Desk()
    desk.disk.capacity = desk.disk.used
    desk.record(20, 200)

    (trouble,) = desk.step()
    assert "No space left" in trouble.reason
    desk.disk.capacity = None
    desk.now += RETRY_S

    assert desk.step() == [DiskTroubled(None), RecordsWritten(20)]
    assert desk.on_disk() == list(range(1, 21))


def test_a_checkpoint_is_begun_only_when_the_journal_has_what_it_covers() -> None:
    desk = Desk()
    desk.disk.fail_next("sync", errno.EIO)
    desk.record()
    desk.checkpoint()

    desk.step()
    assert desk.checkpoints() == []
    assert desk.writer.wait_s(desk.now) == pytest.approx(RETRY_S)
    desk.now += RETRY_S

    assert [type(event) for event in desk.run()] == [DiskTroubled, RecordsWritten, CheckpointEnded]
    assert len(desk.checkpoints()) == 1


def test_a_checkpoint_is_not_whole_before_the_records_that_it_covers_are_on_the_disk() -> None:
    """What is removed behind it may be needed by a recovery that does not find them."""
    desk = Desk(segment_bytes=1 << 26)
    desk.record(5, PIECE_BYTES // 2)
    path = desk.checkpoint()

    assert desk.step() == [RecordsWritten(2)]
    assert desk.disk.paths() == [p for p in desk.disk.paths() if "checkpoint" not in p], "it is not even begun"

    assert desk.run() == [RecordsWritten(4), RecordsWritten(5), CheckpointEnded(1, path, None)]


def test_the_journal_gets_its_turn_between_two_pieces_of_a_checkpoint() -> None:
    desk = Desk()
    desk.checkpoint(size=4 << 20)  # in several pieces
    desk.step()

    desk.record()

    assert desk.step() == [RecordsWritten(1)]
    assert desk.checkpoints() == []
    assert [type(event) for event in desk.run()] == [CheckpointEnded]


def test_a_checkpoint_that_fails_is_told_with_the_reason_and_leaves_nothing_behind() -> None:
    desk = Desk()
    desk.record()
    desk.run()
    before = desk.disk.paths()
    desk.disk.fail_next("rename", errno.ENOSPC)

    path = desk.checkpoint()

    assert desk.run() == [CheckpointEnded(1, path, "No space left on device")]
    assert desk.disk.paths() == before
    second = desk.checkpoint()
    assert desk.run() == [CheckpointEnded(2, second, None)]


def test_a_checkpoint_that_no_file_can_hold_is_told_too() -> None:
    desk = Desk()
    checkpoint = Checkpoint(0, 0, b"", LAYOUT, [np.zeros(3, np.float32)])

    desk.writer.checkpoint(WriteCheckpoint(1, checkpoint, 1))

    (ended,) = desk.run()
    assert "must be 4 contiguous elements" in ended.error


def test_without_a_journal_checkpoints_are_written_all_the_same() -> None:
    desk = Desk(journal=False)

    path = desk.checkpoint(sequence=5)

    assert desk.run() == [CheckpointEnded(1, path, None)]
    assert desk.writer.wait_s(desk.now) is None


def test_only_the_newest_checkpoints_are_kept() -> None:
    desk = Desk(keep=2)
    paths = []
    for _ in range(4):
        desk.record()
        paths.append(desk.checkpoint())
        desk.run()

    assert desk.checkpoints() == paths[-2:]


def test_the_journal_is_kept_from_what_the_oldest_kept_checkpoint_needs() -> None:
    desk = Desk(keep=2)
    for _ in range(4):
        desk.record(100)
        desk.checkpoint()
        desk.run()

    (older, _) = desk.folder.checkpoints()[::-1]
    assert desk.first <= older.sequence + 1
    assert segments(desk.disk, FOLDER)[1].first > older.sequence + 1, "and what is older is gone"


def test_nothing_of_the_journal_goes_before_all_kept_checkpoints_are_known() -> None:
    """A checkpoint of an earlier process may be among those that are kept, and need all of it."""
    desk = Desk(keep=3)
    for _ in range(2):
        desk.record(100)
        desk.checkpoint()
        desk.run()
    assert desk.first == 1

    desk.record(100)
    desk.checkpoint()
    desk.run()

    assert desk.first > 1


def test_the_checkpoint_that_was_recovered_from_counts_as_known() -> None:
    desk = Desk(keep=2, first_needed=150)
    desk.record(200)
    desk.checkpoint()
    desk.run()

    assert 1 < desk.first <= 150


def test_a_gradient_that_is_held_for_long_keeps_its_record() -> None:
    desk = Desk(keep=1)
    desk.record(100)
    for _ in range(3):
        desk.record(100)
        desk.checkpoint(first_needed=90)
        desk.run()

    assert 1 < desk.first <= 90


def test_the_same_checkpoint_written_twice_is_one_of_those_that_are_kept() -> None:
    """`save`, and `save` again before anything has happened: the older checkpoint must stay of use."""
    desk = Desk(keep=2)
    desk.record(100)
    desk.checkpoint(version=0)
    desk.run()
    desk.record(200)
    for _ in range(2):
        desk.checkpoint(version=1)
        desk.run()

    (older, _) = desk.folder.checkpoints()[::-1]
    assert desk.first <= older.sequence + 1


def test_a_checkpoint_tried_again_after_a_failed_removal_is_one_of_those_that_are_kept() -> None:
    def write_three(desk: Desk) -> int:
        for version in range(3):
            desk.record(200)
            before = len(desk.disk.calls)
            desk.checkpoint(version=version)
            desk.run()
        return before

    calm = Desk(keep=2)
    calls = calm.disk.calls[write_three(calm) :]
    desk = Desk(keep=2)
    # The old checkpoint goes, an old segment does not.
    last_removal = len(calm.disk.calls) - calls[::-1].index("remove")
    desk.disk.fail_at(last_removal, errno.EIO)
    write_three(desk)
    desk.checkpoint(version=2)
    desk.run()

    (older, _) = desk.folder.checkpoints()[::-1]
    assert desk.first <= older.sequence + 1


def test_closing_gives_the_folder_back_and_leaves_no_half_checkpoint() -> None:
    desk = Desk()
    desk.checkpoint(size=4 << 20)
    desk.step()

    desk.writer.close()

    assert not [path for path in desk.disk.paths() if path.endswith(".tmp")]
    DataFolder(desk.disk, FOLDER).close()
