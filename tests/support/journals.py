"""Journals on a simulated disk, for tests: written, read, and looked into."""

from __future__ import annotations

from random import Random

from distgrad.durable import record
from distgrad.durable.disk import Disk
from distgrad.durable.journal import Journal
from distgrad.durable.journal_reader import JournalReading, read, segments
from support.sim_disk import SimDisk

FOLDER = "d"
SALT = 99
SIZE = 160
"""Bytes of a record of `fill`."""


def new_disk(seed: int = 0) -> SimDisk:
    """Make a disk with the folder."""
    disk = SimDisk(seed)
    disk.make_folder(FOLDER)
    return disk


def new_journal(disk: Disk, *, next_sequence: int = 1, segment_bytes: int = 4096) -> Journal:
    """Begin a journal with small segments."""
    return Journal(disk, FOLDER, next_sequence=next_sequence, segment_bytes=segment_bytes, salt=SALT)


def fill(journal: Journal, count: int, size: int = 100) -> None:
    """Append records that can be told from each other."""
    for _ in range(count):
        journal.append(b"r %06d" % journal.next_sequence, [bytes([journal.next_sequence % 256]) * size])


def written(disk: SimDisk, *batches: int, segment_bytes: int = 4096, first: int = 1) -> None:
    """Write a journal, with a sync after each batch."""
    journal = new_journal(disk, next_sequence=first, segment_bytes=segment_bytes)
    for batch in batches:
        fill(journal, batch)
        journal.sync()
    journal.close()


def packed(sequence: int, synced: int, payload: bytes = b"", salt: int = SALT) -> bytes:
    """Give the bytes of a record."""
    return b"".join(record.pack(b"r %06d" % sequence, [payload], sequence, synced, salt)[0])


def put(disk: SimDisk, path: str, data: bytes, offset: int = 0) -> None:
    """Write bytes to a file, for certain."""
    file = disk.open(path) if path in disk.paths() else disk.create(path)
    file.write(offset, [data])
    file.sync()
    file.close()


def read_all(disk: Disk, first: int = 1) -> tuple[list[int], JournalReading]:
    """Read a journal that was filled; give the sequences of its records, and the reading."""
    reading = read(disk, FOLDER, first)
    found = []
    for each in reading:
        assert each.header == b"r %06d" % each.sequence
        assert set(each.payload) <= {each.sequence % 256}
        assert reading.next_sequence == each.sequence + 1
        found.append(each.sequence)
    return found, reading


def sequences(disk: Disk, first: int = 1) -> list[int]:
    """Give the sequences of the records of a journal that is not torn, but for a new segment without anything in it."""
    found, reading = read_all(disk, first)
    assert reading.torn is None or reading.torn.offset == 0
    return found


def path_of(first: int) -> str:
    """Give the path of the segment that begins with a record."""
    return f"{FOLDER}/journal-{first:020d}.log"


def names(disk: SimDisk) -> list[str]:
    """Name the segments, shortened."""
    return [segment.path.removeprefix(f"{FOLDER}/journal-").lstrip("0") for segment in segments(disk, FOLDER)]


def after_crash(disk: SimDisk, *, machine: bool = True) -> SimDisk:
    """Give the disk after a crash that loses all that is not certain."""
    for seed in range(1000):
        random = Random(seed)
        random.getrandbits(32)
        if random.choice(range(5)) == 0:
            return disk.crash(Random(seed), machine=machine)
    raise AssertionError
