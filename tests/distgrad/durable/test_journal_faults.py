"""The writer when the disk fails it, or the process before: a failure is no end, and nothing is lost."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from distgrad.durable.disk import OsDisk
from distgrad.durable.journal import Journal, resume
from distgrad.durable.journal_reader import JournalReading, cut, read
from distgrad.durable.segment import HEADER_BYTES
from distgrad.errors import StateError
from support.journals import FOLDER, after_crash, fill, names, new_disk, new_journal, sequences
from support.sim_disk import SimDisk, Stage


@pytest.fixture
def disk() -> SimDisk:
    return new_disk()


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("name", ["create", "write", "sync", "sync_folder"])
def test_a_failure_is_raised_and_the_next_call_tries_again(disk: SimDisk, name: str, stage: Stage) -> None:
    journal = new_journal(disk)
    fill(journal, 2)
    disk.fail_next(name, errno.EIO, times=3, stage=stage)

    for count in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            journal.sync()
        assert (journal.durable, journal.unsynced_bytes) == (0, (2 + count) * 160)
        if name in ("create", "write"):  # after the others the records may be there, or not
            assert sequences(after_crash(disk)) == []
        fill(journal, 1)
    assert journal.sync() == 5

    assert sequences(after_crash(disk)) == [1, 2, 3, 4, 5]
    if name != "create":
        assert len(names(disk)) == 1


def test_reserving_and_trimming_may_fail(disk: SimDisk) -> None:
    disk.fail_next("allocate", errno.ENOSPC, times=2)
    disk.fail_next("truncate", errno.EIO, times=4)
    journal = new_journal(disk, segment_bytes=1000)
    fill(journal, 12)
    journal.sync()
    journal.close()

    assert sequences(after_crash(disk)) == list(range(1, 13))


def test_a_full_disk_loses_nothing_and_goes_on_when_there_is_room(disk: SimDisk) -> None:
    disk.capacity = 1000
    journal = new_journal(disk, segment_bytes=100_000)
    fill(journal, 3)
    assert journal.sync() == 3
    fill(journal, 7)

    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            journal.sync()
        assert disk.used == HEADER_BYTES + 3 * 160, "what was written of it is taken back"
    assert sequences(after_crash(disk)) == [1, 2, 3]
    disk.capacity = 10_000
    assert journal.sync() == 10

    assert names(disk) == ["1.log"], "it goes on at the same place"
    assert sequences(after_crash(disk)) == list(range(1, 11))


def test_a_short_write_is_a_failure(disk: SimDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = new_journal(disk)
    fill(journal, 1)
    with monkeypatch.context() as patch:
        patch.setattr("support.sim_disk.SimFile.write", lambda *_: 10)
        with pytest.raises(OSError, match="only a part"):
            journal.sync()

    assert journal.sync() == 1
    assert sequences(disk) == [1]


def test_after_a_failed_sync_what_is_not_durable_goes_to_a_new_segment(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 3)
    journal.sync()
    fill(journal, 2)
    journal.write()
    disk.fail_next("sync", errno.EIO)

    with pytest.raises(OSError, match="Input/output"):
        journal.sync()
    assert journal.durable == 3
    fill(journal, 1)
    assert journal.sync() == 6

    assert names(disk) == ["1.log", "4.log"]
    for seed in range(50):
        assert sequences(disk.crash(Random(seed))) == [1, 2, 3, 4, 5, 6]


def test_a_failed_sync_of_a_full_segment_moves_what_it_held(disk: SimDisk) -> None:
    journal = new_journal(disk, segment_bytes=1000)
    fill(journal, 3)
    journal.sync()
    fill(journal, 10)
    disk.fail_next("sync", errno.EIO)

    with pytest.raises(OSError, match="Input/output"):
        journal.write()
    journal.sync()

    assert names(disk) == ["1.log", "4.log", "9.log"]
    assert sequences(after_crash(disk)) == list(range(1, 14))


def test_the_segment_of_a_failed_sync_is_removed_if_it_holds_nothing_else(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 2)
    disk.fail_next("sync", errno.EIO, times=5)

    for _ in range(5):
        with pytest.raises(OSError, match="Input/output"):
            journal.sync()
        assert names(disk) == []
    journal.sync()

    assert names(disk) == ["1.log"]


def test_where_it_cannot_be_removed_the_next_one_has_a_name_of_its_own(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 2)
    disk.fail_next("sync", errno.EIO)
    disk.fail_next("remove", errno.EIO)

    with pytest.raises(OSError, match="Input/output"):
        journal.sync()
    fill(journal, 1)
    journal.write()
    assert names(disk) == ["1.log", "1-1.log"]
    assert sequences(disk) == [1, 2, 3]
    journal.sync()

    assert names(disk) == ["1-1.log"], "it is not needed any more"


def test_a_folder_that_cannot_be_read_is_a_failure_like_others(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 1)
    disk.fail_next("list", errno.EACCES)

    with pytest.raises(PermissionError):
        journal.write()
    assert journal.sync() == 1


def test_a_segment_of_later_records_is_not_written_before(disk: SimDisk) -> None:
    journal = new_journal(disk, next_sequence=5)
    fill(journal, 1)
    journal.sync()

    journal = new_journal(disk, next_sequence=3)
    fill(journal, 1)
    with pytest.raises(StateError, match=r"cannot go on with record 3: .*05\.log has later ones"):
        journal.sync()


# Going on with a journal


def test_an_empty_folder_is_gone_on_with_at_any_record(disk: SimDisk) -> None:
    journal = resume(disk, FOLDER, next_sequence=12, segment_bytes=4096)

    assert (journal.next_sequence, journal.durable) == (12, 11)
    assert names(disk) == []


def test_what_only_the_process_was_outlived_by_is_written_once_more(disk: SimDisk) -> None:
    """Records in the page cache may never reach the disk, if the process before died after a failed sync."""
    journal = new_journal(disk)
    fill(journal, 3)
    journal.sync()
    fill(journal, 3)
    journal.write()
    disk.fail_next("sync", errno.EIO)
    disk.fail_next("create", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        journal.sync()
    disk = disk.crash(Random(1), machine=False)
    assert sequences(disk) == [1, 2, 3, 4, 5, 6]

    journal = resume(disk, FOLDER, next_sequence=7, segment_bytes=4096)

    assert journal.durable == 6
    assert sequences(after_crash(disk)) == [1, 2, 3, 4, 5, 6]


def test_records_that_others_vouch_for_are_not_written_again(disk: SimDisk) -> None:
    journal = new_journal(disk)
    for _ in range(3):
        fill(journal, 2)
        journal.sync()
    journal.close()
    calls = len(disk.calls)

    journal = resume(disk, FOLDER, next_sequence=7, segment_bytes=4096)

    assert names(disk) == ["1.log", "5.log"]
    assert disk.calls[calls:].count("write") == 1
    assert sequences(disk) == [1, 2, 3, 4, 5, 6]
    journal.close()


def test_it_takes_the_place_of_the_segment_that_it_copies_whole(disk: SimDisk) -> None:
    journal = new_journal(disk, segment_bytes=10_000)
    fill(journal, 20)
    journal.sync()
    journal.close()

    journal = resume(disk, FOLDER, next_sequence=21, segment_bytes=500)
    assert names(disk) == ["1-1.log"]
    fill(journal, 3)
    journal.sync()

    assert names(disk) == ["1-1.log", "21.log", "23.log"], "and the next ones have the size that was asked for"
    assert sequences(after_crash(disk)) == list(range(1, 24))


def test_a_torn_end_is_cut_and_gone_on_from(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 3)
    journal.sync()
    fill(journal, 3)
    journal.write()
    disk.flip(f"{FOLDER}/journal-{1:020d}.log", HEADER_BYTES + 4 * 160 + 50)
    reading = read(disk, FOLDER, 1)
    assert [record.sequence for record in reading] == [1, 2, 3, 4]
    assert reading.torn is not None
    cut(disk, reading.torn)

    journal = resume(disk, FOLDER, next_sequence=5, segment_bytes=4096)
    fill(journal, 2)
    journal.sync()

    assert sequences(after_crash(disk)) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_may_cover_more_than_the_journal_has(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 3)
    journal.sync()

    journal = resume(disk, FOLDER, next_sequence=10, segment_bytes=4096)
    fill(journal, 2)
    journal.sync()

    assert names(disk) == ["1.log", "10.log"]
    assert sequences(disk, 10) == [10, 11]


def test_more_records_than_the_caller_knows_are_not_hidden(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 3)
    journal.sync()

    with pytest.raises(StateError, match="records behind 2; cut them off first"):
        resume(disk, FOLDER, next_sequence=3, segment_bytes=4096)


@pytest.mark.parametrize("name", ["write", "sync_folder"])
def test_what_was_not_found_does_not_come_back_later(name: str) -> None:
    """Records that failed to be written and were taken back, when that was not yet on the disk either."""
    for seed in range(20):
        disk = new_disk(seed)
        journal = new_journal(disk)
        if name == "write":
            fill(journal, 2)
            journal.sync()
        first = journal.next_sequence
        fill(journal, 3)
        disk.fail_next(name, errno.EIO, stage=Stage.AFTER)
        with pytest.raises(OSError, match="Input/output"):
            journal.sync()
        disk = disk.crash(Random(seed), machine=False)
        assert sequences(disk) == list(range(1, first))

        journal = resume(disk, FOLDER, next_sequence=first, segment_bytes=4096)
        journal.append(b"new", [])
        journal.write() if seed % 2 else journal.sync()

        for chance in range(40):
            found = [bytes(record.header) for record in read(disk.crash(Random(100 * seed + chance)), FOLDER, 1)]
            assert found[first - 1 :] in ([b"new"], [] if seed % 2 else [b"new"])


def test_going_on_that_fails_leaves_no_file_open_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, folder = OsDisk(), str(tmp_path)
    journal = Journal(disk, folder, next_sequence=1)
    journal.append(b"one", [])
    journal.sync()
    journal.close()
    with monkeypatch.context() as patch:
        patch.setattr("distgrad.durable.disk._write_at", lambda *_: 0)
        with pytest.raises(OSError, match="only a part"):
            resume(disk, folder, next_sequence=2)

    journal = resume(disk, folder, next_sequence=2)
    journal.close()

    reading: JournalReading = read(disk, folder, 1)
    assert [bytes(record.header) for record in reading] == [b"one"]
