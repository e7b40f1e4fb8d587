"""The reader: every whole record in order, from any record on."""

from __future__ import annotations

from random import Random

import pytest

from distgrad.durable import journal_reader
from distgrad.durable.journal_reader import read, segments
from distgrad.durable.segment import HEADER_BYTES, pack_header
from distgrad.errors import CheckpointError, DataDamaged
from support.journals import FOLDER, SALT, SIZE, new_disk, new_journal, path_of, put, read_all, written
from support.sim_disk import SimDisk


@pytest.fixture
def disk() -> SimDisk:
    return new_disk()


def test_records_come_in_order_with_their_places(disk: SimDisk) -> None:
    written(disk, 8, segment_bytes=1000)

    found = list(read(disk, FOLDER, 1))

    assert [each.sequence for each in found] == list(range(1, 9))
    assert [bytes(each.payload) for each in found] == [bytes([sequence]) * 100 for sequence in range(1, 9)]
    places = [(path_of(1), HEADER_BYTES + index * SIZE) for index in range(5)]
    places += [(path_of(6), HEADER_BYTES + index * SIZE) for index in range(3)]
    assert [(each.path, each.offset) for each in found] == places


@pytest.mark.parametrize("piece", [64, 72, 200, 1000])
def test_records_longer_than_a_piece_or_across_two_are_whole(
    disk: SimDisk, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_reader, "PIECE_BYTES", piece)
    random = Random(piece)
    journal = new_journal(disk)
    payloads = [random.randbytes(random.choice([0, 5, 8, 300, 5000])) for _ in range(100)]
    for payload in payloads:
        journal.append(b"x" * (len(payload) % 20), [payload])
    journal.sync()

    found = list(read(disk, FOLDER, 1))

    assert [bytes(each.payload) for each in found] == payloads
    assert [len(each.header) for each in found] == [len(payload) % 20 for payload in payloads]


def test_a_payload_stays_when_the_file_is_gone(disk: SimDisk) -> None:
    written(disk, 1)
    [found] = read(disk, FOLDER, 1)

    disk.remove(path_of(1))

    assert found.payload == b"\x01" * 100


@pytest.mark.parametrize("first", [1, 2, 5, 6, 7, 11, 13, 14])
def test_reading_begins_where_it_is_told(disk: SimDisk, first: int) -> None:
    written(disk, 13, segment_bytes=1000)

    found, reading = read_all(disk, first)

    assert found == list(range(first, 14))
    assert (reading.next_sequence, reading.torn) == (14, None)


def test_only_the_segments_that_may_be_needed_are_read(disk: SimDisk) -> None:
    written(disk, 40, segment_bytes=1000)

    _, reading = read_all(disk, 33)

    assert [place.path for place in reading.ends] == [path_of(first) for first in (26, 31, 36)]


def test_an_empty_folder_and_a_first_record_behind_the_end_are_empty(disk: SimDisk) -> None:
    found, reading = read_all(disk, 7)
    assert (found, reading.next_sequence, reading.torn, reading.ends) == ([], 7, None, [])

    written(disk, 3)
    found, reading = read_all(disk, 7)
    assert (found, reading.next_sequence, reading.torn) == ([], 7, None)


def test_other_files_are_of_no_concern(disk: SimDisk) -> None:
    written(disk, 3)
    for name in (
        "checkpoint-1-1.safetensors",
        "journal-1.log",
        f"{path_of(7)[2:]}.bak",
        f".{path_of(7)[2:]}.tmp",
        "lock",
    ):
        put(disk, f"{FOLDER}/{name}", b"anything")

    assert [segment[1:] for segment in segments(disk, FOLDER)] == [(1, HEADER_BYTES + 3 * SIZE, 0)]
    assert read_all(disk)[0] == [1, 2, 3]


def test_a_missing_beginning_is_damage(disk: SimDisk) -> None:
    written(disk, 3, first=5)

    with pytest.raises(DataDamaged, match="record 4 is needed, but the journal begins with record 5") as caught:
        list(read(disk, FOLDER, 4))

    assert (caught.value.path, caught.value.offset) == (path_of(5), 0)
    assert caught.value.hint is not None
    assert "--recover-until VERSION" in caught.value.hint
    assert "older checkpoint" in caught.value.hint


def test_what_is_known_to_be_on_the_disk_is_told(disk: SimDisk) -> None:
    written(disk, 2, 2, 2)
    assert read_all(disk)[1].synced == 4

    written(disk, 1, first=7)
    assert read_all(disk)[1].synced == 6
    assert read_all(disk, 7)[1].synced == 6


def test_a_newer_format_is_refused(disk: SimDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("distgrad.durable.segment.FORMAT", 2)
        put(disk, path_of(1), pack_header(1, SALT))

    with pytest.raises(CheckpointError, match="has journal format 2; this distgrad reads format 1"):
        list(read(disk, FOLDER, 1))
