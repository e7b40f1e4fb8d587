"""The reader at places that are not whole: a torn end is told from damage, and no wrong byte is ever given."""

from __future__ import annotations

import errno
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad.durable import journal_reader
from distgrad.durable.journal import resume
from distgrad.durable.journal_reader import Place, cut, read, segments
from distgrad.durable.segment import HEADER_BYTES, pack_header
from distgrad.errors import DataDamaged
from support.journals import (
    FOLDER,
    SALT,
    SIZE,
    fill,
    new_disk,
    new_journal,
    packed,
    path_of,
    put,
    read_all,
    sequences,
    written,
)
from support.sim_disk import SimDisk


@pytest.fixture
def disk() -> SimDisk:
    return new_disk()


@pytest.mark.parametrize(
    "size", [*range(0, HEADER_BYTES + 2 * SIZE, 13), HEADER_BYTES - 1, HEADER_BYTES + 2 * SIZE - 1]
)
def test_an_end_that_is_cut_anywhere_is_torn_there(disk: SimDisk, size: int) -> None:
    written(disk, 2)
    file = disk.open(path_of(1))
    file.truncate(size)
    file.close()

    found, reading = read_all(disk)

    whole = max(0, size - HEADER_BYTES) // SIZE
    assert found == list(range(1, whole + 1))
    if size in (HEADER_BYTES, HEADER_BYTES + SIZE):
        assert reading.torn is None
    else:
        offset = HEADER_BYTES + whole * SIZE if size >= HEADER_BYTES else 0
        assert reading.torn == Place(path_of(1), offset)


def test_reserved_room_is_the_end(disk: SimDisk) -> None:
    written(disk, 2)
    file = disk.open(path_of(1))
    file.allocate(100_003)
    file.close()

    found, reading = read_all(disk)

    assert (found, reading.torn) == ([1, 2], None)
    assert reading.ends == [Place(path_of(1), HEADER_BYTES + 2 * SIZE)]


@pytest.mark.parametrize("offset", [0, 1, 8, 100, 99_999, 100_002])
def test_anything_but_zeros_behind_the_end_is_torn(disk: SimDisk, offset: int) -> None:
    written(disk, 2)
    end = HEADER_BYTES + 2 * SIZE
    put(disk, path_of(1), bytes(100_003), end)
    put(disk, path_of(1), b"\x01", end + offset)

    assert read_all(disk)[1].torn == Place(path_of(1), end)


@pytest.mark.parametrize("is_reserved", [False, True])
def test_a_change_of_any_byte_is_found(disk: SimDisk, is_reserved: bool) -> None:
    """Records 1 to 4 are on the disk, as 5 and 6 say; of those two nothing says that they are."""
    written(disk, 2, 2, 2)
    if is_reserved:
        disk.open(path_of(1)).allocate(10_000)
    for place in range(HEADER_BYTES + 6 * SIZE):
        disk.flip(path_of(1), place, 1 << place % 8)
        damaged = (place - HEADER_BYTES) // SIZE + 1
        if damaged <= 4:
            with pytest.raises(DataDamaged, match=f"record {max(1, damaged)} is damaged or missing in d/") as caught:
                read_all(disk)
            offset = HEADER_BYTES + (damaged - 1) * SIZE if damaged > 0 else 0
            assert (caught.value.path, caught.value.offset) == (path_of(1), offset)
            assert caught.value.hint is not None
        else:
            found, reading = read_all(disk)
            assert found == list(range(1, damaged))
            assert reading.torn == Place(path_of(1), HEADER_BYTES + (damaged - 1) * SIZE)
        disk.flip(path_of(1), place, 1 << place % 8)
    assert read_all(disk)[0] == [1, 2, 3, 4, 5, 6]


def test_a_change_in_a_segment_before_the_last_is_damage(disk: SimDisk) -> None:
    written(disk, 8, segment_bytes=1000)
    for place in range(HEADER_BYTES + 5 * SIZE):
        disk.flip(path_of(1), place)
        with pytest.raises(DataDamaged, match=r"as d/journal-0*6\.log behind it shows") as caught:
            read_all(disk)
        assert caught.value.path == path_of(1)
        disk.flip(path_of(1), place)


@pytest.mark.parametrize("lost", [6, 11])
def test_a_missing_segment_is_damage(disk: SimDisk, lost: int) -> None:
    written(disk, 18, segment_bytes=1000)
    disk.remove(path_of(lost))

    with pytest.raises(DataDamaged, match=f"record {lost} is damaged or missing") as caught:
        read_all(disk)
    assert (caught.value.path, caught.value.offset) == (path_of(lost - 5), HEADER_BYTES + 5 * SIZE)


def test_damage_before_the_first_record_that_is_wanted_is_of_no_concern(disk: SimDisk) -> None:
    written(disk, 18, segment_bytes=1000)
    disk.flip(path_of(6), HEADER_BYTES)

    assert read_all(disk, 11)[0] == list(range(11, 19))


def test_the_abandoned_end_of_a_segment_is_passed_over(disk: SimDisk) -> None:
    written(disk, 5)
    put(disk, path_of(1), b"rubbish", HEADER_BYTES + 3 * SIZE)
    written(disk, 4, first=4)

    found, reading = read_all(disk)

    assert found == list(range(1, 8))
    assert (reading.torn, reading.next_sequence) == (None, 8)


def test_records_that_are_there_twice_are_given_once(disk: SimDisk) -> None:
    journal = new_journal(disk)
    fill(journal, 3)
    journal.sync()
    fill(journal, 4)
    journal.write()
    disk.fail_next("sync", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        journal.sync()
    fill(journal, 2)
    journal.sync()

    assert [segment.first for segment in segments(disk, FOLDER)] == [1, 4]
    for seed in range(30):
        after = disk.crash(Random(seed))
        assert read_all(after)[0] == list(range(1, 10))
        assert read_all(after, 6)[0] == [6, 7, 8, 9]


def test_a_copy_that_was_not_finished_does_not_hide_what_it_copies(disk: SimDisk) -> None:
    written(disk, 6)
    put(disk, f"{FOLDER}/journal-{1:020d}-1.log", pack_header(1, 7) + packed(1, 0, salt=7) + b"torn")
    put(disk, path_of(4), b"torn")

    for first in range(1, 8):
        found, reading = read_all(disk, first)
        assert found == list(range(first, 7))
        assert reading.torn == Place(path_of(4), 0)


def test_who_goes_on_sees_no_more_behind_a_hole_than_who_read_before(disk: SimDisk) -> None:
    """Regression: a copy of the end that had lost its middle kept a broker from starting for ever."""
    written(disk, 6)
    hole = bytes(len(packed(5, 3)) + len(packed(6, 3)))
    put(disk, path_of(4), pack_header(4, 7) + packed(4, 3, salt=7) + hole + packed(7, 3, salt=7))
    found, reading = read_all(disk, 4)
    assert found == [4, 5, 6]

    journal = resume(disk, FOLDER, next_sequence=reading.next_sequence, vouched=3)
    fill(journal, 1)
    journal.sync()
    journal.close()

    assert sequences(disk, 1) == [1, 2, 3, 4, 5, 6, 7]


def test_a_gap_within_a_segment_is_judged_like_damage(disk: SimDisk) -> None:
    data = pack_header(1, SALT) + packed(1, 0)
    put(disk, path_of(1), data + packed(3, 1))
    assert read_all(disk)[1].torn == Place(path_of(1), len(data))

    put(disk, path_of(1), data + packed(3, 2))
    with pytest.raises(DataDamaged, match=r"record 2 is damaged or missing .*, as record 3 behind it shows"):
        read_all(disk)


def test_unsynced_records_behind_a_torn_place_do_not_count(disk: SimDisk) -> None:
    put(disk, path_of(1), pack_header(1, SALT) + packed(1, 0) + bytes(80) + packed(3, 1) + packed(4, 1))

    found, reading = read_all(disk)

    assert found == [1]
    assert reading.torn is not None


def test_records_within_a_payload_vouch_for_nothing(disk: SimDisk) -> None:
    """A peer decides what is in a payload, and could otherwise keep a broker from starting after a crash."""
    forged = packed(9, 8, salt=SALT + 1)
    data = pack_header(1, SALT) + packed(1, 0)
    put(disk, path_of(1), data + packed(2, 0, bytes(-len(data) % 8) + forged * 3)[:-1])
    assert read_all(disk)[1].torn == Place(path_of(1), len(data))

    # Where the segment's own salt is lost, too, caution comes first.
    disk.flip(path_of(1), 0)
    with pytest.raises(DataDamaged, match="as record 9 behind it shows"):
        read_all(disk)


def test_a_record_of_another_journal_is_none_of_this_one(disk: SimDisk) -> None:
    """A file system may give a new file the old bytes of one that was removed."""
    data = pack_header(1, SALT) + packed(1, 0)
    put(disk, path_of(1), data + packed(2, 1, salt=SALT + 1))

    found, reading = read_all(disk)

    assert found == [1]
    assert reading.torn == Place(path_of(1), len(data))


def test_a_place_that_only_looks_like_a_record_vouches_for_nothing(disk: SimDisk) -> None:
    lure = bytearray(packed(9, 8))
    lure[-20] ^= 1
    data = pack_header(1, SALT) + packed(1, 0)
    put(disk, path_of(1), data + b"\x01" * 8 + bytes(lure) + packed(9, 8)[:40])

    assert read_all(disk)[1].torn == Place(path_of(1), len(data))


def test_a_file_under_another_name_is_damage(disk: SimDisk) -> None:
    written(disk, 3, 3)
    disk.rename(path_of(1), path_of(2))

    with pytest.raises(DataDamaged, match="record 2 is damaged or missing"):
        read_all(disk, 2)


def test_a_disk_that_cannot_be_read_is_an_error_of_the_system(disk: SimDisk) -> None:
    written(disk, 3)
    disk.fail_next("read", errno.EIO)

    with pytest.raises(OSError, match="Input/output"):
        read_all(disk)


@pytest.mark.parametrize("piece", [64, 200])
def test_damage_is_judged_alike_in_pieces_of_any_size(
    disk: SimDisk, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(disk, 2, 2, 2)
    for place in range(HEADER_BYTES + 6 * SIZE):
        disk.flip(path_of(1), place, 0x80)
        outcomes = []
        for size in (piece, 1 << 20):
            monkeypatch.setattr(journal_reader, "PIECE_BYTES", size)
            try:
                found, reading = read_all(disk)
                outcomes.append((found, reading.torn))
            except DataDamaged as damage:
                outcomes.append(([], Place(damage.path, damage.offset)))
        assert outcomes[0] == outcomes[1]
        disk.flip(path_of(1), place, 0x80)


# Cutting


def test_a_torn_end_is_cut_for_good(disk: SimDisk) -> None:
    written(disk, 3)
    put(disk, path_of(1), b"rubbish", HEADER_BYTES + 3 * SIZE)
    torn = read_all(disk)[1].torn
    assert torn is not None

    cut(disk, torn)

    for seed in range(20):
        found, reading = read_all(disk.crash(Random(seed)))
        assert (found, reading.torn) == ([1, 2, 3], None)


def test_a_segment_without_a_header_is_removed(disk: SimDisk) -> None:
    written(disk, 3)
    put(disk, path_of(4), b"torn")
    torn = read_all(disk)[1].torn
    assert torn == Place(path_of(4), 0)

    cut(disk, torn)

    assert disk.crash(Random(1)).paths() == [path_of(1)]


@pytest.mark.parametrize("damage", [1, 7, 12, 17])
def test_cutting_where_damage_was_found_leaves_what_came_before(disk: SimDisk, damage: int) -> None:
    written(disk, 17, 3, segment_bytes=1000)
    segment, index = divmod(damage - 1, 5)
    disk.flip(path_of(segment * 5 + 1), HEADER_BYTES + index * SIZE + 60)
    with pytest.raises(DataDamaged) as caught:
        read_all(disk)

    cut(disk, Place(caught.value.path, caught.value.offset))

    for seed in range(5):
        found, reading = read_all(disk.crash(Random(seed)))
        assert found == list(range(1, damage))
        assert reading.torn is None


# Anything at all


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batches=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    segment_bytes=st.sampled_from([100, 700, 5000]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 255)), max_size=3),
)
def test_no_change_makes_the_reader_give_a_wrong_record(
    batches: list[int], segment_bytes: int, changes: list[tuple[int, int, int]]
) -> None:
    disk = new_disk()
    written(disk, *batches, segment_bytes=segment_bytes)
    paths = disk.paths()
    for which, place, mask in changes:
        path = paths[which % len(paths)]
        disk.flip(path, place % disk.size(path), mask)
    reading = read(disk, FOLDER, 1)
    count = 0
    try:
        for each in reading:
            count += 1
            assert each.sequence == count
            assert each.header == b"r %06d" % count
            assert each.payload == bytes([count]) * 100
    except DataDamaged:
        assert changes
        return
    assert reading.torn is not None or count == sum(batches)
    # One change does not hide what others vouch for; more may hit those, too.
    assert len(changes) > 1 or count >= sum(batches[:-1])
