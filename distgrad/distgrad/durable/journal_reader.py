"""Reading a journal: every record that is whole, in order, and a judgement of the place where they stop.

A process or a machine may stop in the middle of writing, so the end of the last segment may be *torn*: nobody was told
that what is missing there was on the disk. Damage that a later record, or a later segment, shows to have been on the
disk is another matter, and ends the reading with `DataDamaged`, unless a checkpoint vouches for all that is missing.
``docs/journal.md`` has the rules.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from distgrad.durable.disk import Disk
from distgrad.durable.record import MAGIC, next_offset, size_claimed, unpack
from distgrad.durable.segment import FORMAT, HEADER_BYTES, Place, Segment, segments, unpack_header
from distgrad.errors import CheckpointError, DataDamaged

__all__ = ["JournalReading", "Place", "Segment", "StoredRecord", "cut", "read", "segments", "trim"]

# Read at a time: little enough to be in a cache of the processor still when it is applied, and memory of this size is
# used again and again, where that of a whole segment would be new each time. Measured on gradients of 40 KB, beside the
# floor of ``bench_recovery``: 0.51 with 512 KiB, 0.54 with 2 and 4 MiB, 0.43 with 16.
PIECE_BYTES = 2 << 20
# Where the words of a record's prefix are that the search for records looks at; see `distgrad.durable.record`.
_SYNCED_WORD, _SALT_WORD = 3, 4


class StoredRecord(NamedTuple):
    """A record as it was found; its header and payload keep the memory of a whole piece of the segment.

    Attributes
    ----------
    sequence : int
        Its number.
    header, payload : memoryview
        What it holds.
    path, offset : str, int
        Where it begins.
    """

    sequence: int
    header: memoryview
    payload: memoryview
    path: str
    offset: int


class JournalReading:
    """One pass through a journal; iterate over it once.

    Parameters
    ----------
    disk : Disk
        Where it is.
    folder : str
        Its folder.
    first : int
        Sequence of the first record that is wanted.
    vouched : int
        Records up to this one may be missing, because a checkpoint covers what they tell.

    Attributes
    ----------
    next_sequence : int
        One more than the last record given, `first` before there is one.
    synced : int
        Up to this record everything was known to be on the disk, by what was read; 0 if nothing tells.
    torn : Place or None
        At the end of the iteration: where the last segment is torn.
    ends : list of Place
        Where the whole records of each segment end that was read.
    skipped : list of Place
        Where damage was passed over, as a checkpoint vouches for what it hides.
    """

    def __init__(self, disk: Disk, folder: str, first: int, vouched: int) -> None:
        self._disk = disk
        self._folder = folder
        self._vouched = vouched
        self.skipped: list[Place] = []
        self.next_sequence = first
        self.synced = 0
        self.torn: Place | None = None
        self.ends: list[Place] = []

    def __iter__(self) -> Iterator[StoredRecord]:
        found = segments(self._disk, self._folder)
        for segment, following in pairwise([*found[_start(found, self.next_sequence) :], None]):
            assert segment is not None  # only the last is
            yield from self._read(segment, following)

    def _read(self, segment: Segment, following: Segment | None) -> Iterator[StoredRecord]:
        # A piece of the file; `base` is where in the file it begins.
        base, memory = 0, self._piece(segment, 0, PIECE_BYTES)
        # A segment is made when what comes before it is on the disk.
        self.synced = max(self.synced, segment.first - 1)
        path = segment.path
        expected = segment.first
        offset = 0
        salt = _salt(memory, segment)
        if salt is not None:
            offset = HEADER_BYTES
            while True:
                record = unpack(memory, offset - base)
                if record is None and base + len(memory) < segment.size:
                    # It may only begin in this piece. What a record says of its size is checked with all the rest.
                    wanted = max(size_claimed(memory, offset - base), PIECE_BYTES)
                    if offset > base or wanted > len(memory):
                        base, memory = offset, self._piece(segment, offset, wanted)
                        record = unpack(memory, 0)
                    if record is None and wanted < (claimed := size_claimed(memory, 0)) <= segment.size - base:
                        memory = self._piece(segment, offset, claimed)
                        record = unpack(memory, 0)
                if record is None or record[0] != expected or record[2] != salt:
                    resumed = self._skip(segment, following, offset, expected, salt)
                    if resumed is None:
                        break
                    offset, expected = resumed
                    base, memory = offset, self._piece(segment, offset, PIECE_BYTES)
                    continue
                sequence, synced, _, body, header_end, end = record
                expected += 1
                if synced > self.synced:
                    self.synced = synced
                # Two segments may hold the same records, if writing the first one had failed.
                if sequence == self.next_sequence:
                    self.next_sequence = expected
                    payload = memory[next_offset(header_end) : end]
                    yield StoredRecord(sequence, memory[body:header_end], payload, path, offset)
                offset = base + next_offset(end)
        self.ends.append(Place(path, offset))
        if following is None:
            self._judge_end(Place(path, offset), max(expected, self._vouched + 1), salt)
        elif following.first > self.next_sequence:
            if following.first > self._vouched + 1:
                raise _damaged(Place(path, offset), expected, f"{following.path} behind it")
            self._pass_over(Place(path, offset), following.first)

    def _skip(
        self, segment: Segment, following: Segment | None, offset: int, expected: int, salt: int
    ) -> tuple[int, int] | None:
        """Find where a segment goes on behind damage that hides nothing but what a checkpoint vouches for."""
        if expected > self._vouched or (following is not None and following.first <= expected):
            return None  # it is needed, or the next segment has it
        rest = self._disk.read(segment.path, offset)
        words = np.frombuffer(rest, "<u8", count=len(rest) // 8)
        for place in _places(words, salt):
            record = unpack(rest, place)
            if record is not None and expected < record[0] <= self._vouched + 1:
                self._pass_over(Place(segment.path, offset), record[0])
                return offset + place, record[0]
        return None

    def _pass_over(self, place: Place, sequence: int) -> None:
        """Note damage that does not matter; reading goes on with this record."""
        self.skipped.append(place)
        self.next_sequence = max(self.next_sequence, sequence)

    def _piece(self, segment: Segment, offset: int, size: int) -> memoryview:
        return self._disk.read(segment.path, offset, min(size, segment.size - offset))

    def _judge_end(self, end: Place, expected: int, salt: int | None) -> None:
        rest = self._disk.read(end.path, end.offset)
        words = np.frombuffer(rest, "<u8", count=len(rest) // 8)
        if salt is not None and not words.any() and not any(rest[words.nbytes :]):
            return  # nothing but the room that was reserved
        witness = _witness(rest, words, expected, salt)
        if witness is not None:
            raise _damaged(end, expected, f"record {witness} behind it")
        self.torn = end


def read(disk: Disk, folder: str, first: int, vouched: int = 0) -> JournalReading:
    """Read a journal from a record on.

    Parameters
    ----------
    disk : Disk
        Where it is.
    folder : str
        Its folder.
    first : int
        Sequence of the first record that is wanted; there may be none so high yet.
    vouched : int
        A checkpoint covers all records up to this one: damage to them is passed over. Those before `first` are not
        needed in any case.

    Returns
    -------
    JournalReading
        Yields `StoredRecord`. While it is iterated it raises `DataDamaged` if records are missing that were on the
        disk, `CheckpointError` if the journal is of another format, `OSError` if it cannot be read.
    """
    return JournalReading(disk, folder, first, max(vouched, first - 1))


def cut(disk: Disk, place: Place) -> None:
    """End a journal at a place, for good: what is behind it is removed.

    Parameters
    ----------
    disk : Disk
        Where the journal is; nobody writes to it.
    place : Place
        Where a record begins, or a segment.

    Raises
    ------
    OSError
        If that fails; call it again.
    """
    folder = os.path.dirname(place.path)
    # From the last one on, so that what a crash leaves behind has no gap.
    for segment in reversed(segments(disk, folder)):
        if segment.path == place.path:
            break
        disk.remove(segment.path)
    trim(disk, place)
    disk.sync_folder(folder)


def trim(disk: Disk, place: Place) -> None:
    """Cut one segment off; remove it if not even its header stays.

    Parameters
    ----------
    disk : Disk
        Where it is; nobody writes to it.
    place : Place
        Where its whole records end.

    Raises
    ------
    OSError
        If that fails.
    """
    if place.offset < HEADER_BYTES:
        disk.remove(place.path)
        return
    file = disk.open(place.path)
    try:
        file.truncate(place.offset)
        file.sync()
    finally:
        file.close()


def _start(found: list[Segment], first: int) -> int:
    """Find the segment to begin with."""
    if not found:
        return 0
    firsts = [segment.first for segment in found]
    index = bisect_right(firsts, first) - 1
    if index < 0:
        raise DataDamaged(
            f"record {first} is needed, but the journal begins with record {firsts[0]} ({found[0].path})",
            path=found[0].path,
            offset=0,
            hint=_hint(),
        )
    # The last segment may be one that copies the end of the one before it, and was not finished when that was needed.
    return firsts.index(firsts[max(0, firsts.index(firsts[index]) - 1)])


def _salt(memory: memoryview, segment: Segment) -> int | None:
    """Give the salt of a segment; None if its header is damaged."""
    header = unpack_header(memory)
    if header is None or header[1] != segment.first:
        return None
    if header[0] != FORMAT:
        raise CheckpointError(
            f"{segment.path} has journal format {header[0]}; this distgrad reads format {FORMAT}",
            hint="use the distgrad that wrote it, or a newer one",
        )
    return header[2]


def _witness(rest: memoryview, words: np.ndarray, expected: int, salt: int | None) -> int | None:
    """Find a record that was written when the expected one was on the disk already; give its sequence."""
    for place in _places(words, salt, expected):
        record = unpack(rest, place)
        if record is not None:
            return record[0]
    return None


def _places(words: np.ndarray, salt: int | None, synced: int = 0) -> list[int]:
    """List where something lies that looks like a record with this salt; None is any."""
    hits = np.flatnonzero(words.view("<u4")[::2] == MAGIC)
    hits = hits[hits + _SALT_WORD < len(words)]
    hits = hits[words[hits + _SYNCED_WORD] >= synced]
    if salt is not None:
        hits = hits[words[hits + _SALT_WORD] == salt]
    return [int(hit) * 8 for hit in hits]


def _damaged(place: Place, sequence: int, witness: str) -> DataDamaged:
    return DataDamaged(
        f"record {sequence} is damaged or missing in {place.path} at byte {place.offset}; "
        f"it was on the disk, as {witness} shows",
        path=place.path,
        offset=place.offset,
        hint=_hint(),
    )


def _hint() -> str:
    return "give up what came after a version with --recover-until VERSION, or begin with an older checkpoint"
