"""The writer: records keep their order, nothing counts before it is on the disk, and what is old is removed."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from distgrad.durable.disk import OsDisk
from distgrad.durable.journal import SEGMENT_BYTES, Journal
from distgrad.durable.journal_reader import read, segments
from distgrad.durable.record import PREFIX_BYTES
from distgrad.durable.segment import HEADER_BYTES
from support.journals import FOLDER, after_crash, fill, names, new_disk, new_journal, sequences
from support.sim_disk import SimDisk


@pytest.fixture
def disk() -> SimDisk:
    return new_disk()


def test_records_are_numbered_one_after_the_other(disk: SimDisk) -> None:
    journal = new_journal(disk, next_sequence=7)

    assert [journal.append(b"", []) for _ in range(3)] == [7, 8, 9]
    assert (journal.next_sequence, journal.durable) == (10, 6)


def test_appending_touches_memory_only(disk: SimDisk) -> None:
    fill(new_journal(disk), 10)

    assert disk.calls == []


def test_what_was_written_outlives_the_process_and_what_was_synced_the_machine(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 3)
    assert journal.sync() == 3
    fill(journal, 2)
    journal.write()
    fill(journal, 1)

    assert journal.durable == 3
    assert sequences(disk.crash(Random(1), machine=False)) == [1, 2, 3, 4, 5]
    assert sequences(after_crash(disk)) == [1, 2, 3]


def test_a_batch_is_one_write_and_a_sync_of_nothing_is_no_call(disk: SimDisk) -> None:
    journal = new_journal(disk)
    assert journal.sync() == 0
    fill(journal, 10)
    journal.sync()
    fill(journal, 10)
    journal.sync()
    journal.sync()
    journal.write()

    assert disk.calls == ["create", "allocate", "sync_folder", "write", "sync", "write", "sync"]


def test_bytes_are_counted(disk: SimDisk) -> None:
    journal = new_journal(disk)
    size = PREFIX_BYTES + 8 + 104  # with the padding
    fill(journal, 3)
    assert (journal.unsynced_bytes, journal.appended_bytes) == (3 * size, 3 * size)

    journal.write()
    assert journal.unsynced_bytes == 3 * size
    journal.sync()
    assert journal.unsynced_bytes == 0
    fill(journal, 1)

    assert (journal.unsynced_bytes, journal.appended_bytes) == (size, 4 * size)


def test_a_payload_may_come_in_parts_of_any_kind(disk: SimDisk) -> None:
    array = np.arange(30_000, dtype=np.uint8)
    parts: list[Any] = [b"abc", array[:10_000].data, bytearray(b"def"), array[10_000:], b""]
    journal = new_journal(disk)

    journal.append(b"head", parts)
    journal.sync()

    [record] = read(disk, FOLDER, 1)
    assert bytes(record.header) == b"head"
    assert record.payload == b"".join(map(bytes, parts))


def test_a_full_segment_is_synced_and_gives_its_room_back_before_the_next_one_begins(disk: SimDisk) -> None:
    journal = new_journal(disk, segment_bytes=1000)
    fill(journal, 14)

    journal.write()

    assert names(disk) == ["1.log", "6.log", "11.log"]
    assert [segment.size for segment in segments(disk, FOLDER)] == [
        HEADER_BYTES + 5 * 160,
        HEADER_BYTES + 5 * 160,
        1000,
    ]
    assert journal.durable == 10
    assert sequences(after_crash(disk)) == list(range(1, 11))
    assert sequences(disk) == list(range(1, 15))


def test_a_record_larger_than_a_segment_gets_one_of_its_own(disk: SimDisk) -> None:
    journal = new_journal(disk, segment_bytes=1000)
    fill(journal, 2)
    fill(journal, 1, 1_000_000)
    fill(journal, 2)
    journal.sync()

    assert names(disk) == ["1.log", "3.log", "4.log"]
    assert sequences(disk) == [1, 2, 3, 4, 5]


def test_many_small_records_and_a_huge_one_on_a_real_disk(tmp_path: Path) -> None:
    disk, folder = OsDisk(), str(tmp_path)
    journal = Journal(disk, folder, next_sequence=1)
    huge = np.full(SEGMENT_BYTES + 5, 3, np.uint8)
    for index in range(10_000):
        journal.append(b"%d" % index, [b"x" * (index % 50)])
        if index % 1000 == 0:
            journal.write()
    journal.append(b"huge", [huge])
    assert journal.sync() == 10_001
    journal.close()

    count = 0
    for index, record in enumerate(read(disk, folder, 1)):
        assert record.sequence == index + 1
        if index < 10_000:
            assert (bytes(record.header), len(record.payload)) == (b"%d" % index, index % 50)
        else:
            assert np.array_equal(np.frombuffer(record.payload, np.uint8), huge)
        count += 1
    assert count == 10_001
    assert sum(segment.size for segment in segments(disk, folder)) < SEGMENT_BYTES + 2_000_000, "room is given back"


def test_old_segments_are_removed_and_the_open_one_never(disk: SimDisk) -> None:
    journal = new_journal(disk, segment_bytes=1000)
    fill(journal, 14)
    journal.sync()

    journal.remove_before(6)
    assert names(disk) == ["6.log", "11.log"]
    journal.remove_before(10)
    assert names(disk) == ["6.log", "11.log"]
    journal.remove_before(100)
    assert names(disk) == ["11.log"]
    assert sequences(disk, 11) == [11, 12, 13, 14]


def test_before_anything_is_written_all_that_is_there_may_be_old(disk: SimDisk) -> None:
    journal = new_journal(disk, segment_bytes=1000)
    fill(journal, 7)
    journal.sync()
    journal.close()

    journal = new_journal(disk, next_sequence=8)
    journal.remove_before(7)
    assert names(disk) == ["6.log"]
    journal.remove_before(8)
    assert names(disk) == []


def test_closing_gives_the_reserved_room_back(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 1)
    journal.sync()
    assert segments(disk, FOLDER)[0].size == 4096

    journal.close()
    journal.close()

    assert segments(disk, FOLDER)[0].size == HEADER_BYTES + 160
    assert sequences(disk) == [1]
