"""Writing a journal: records go to memory, to a file, and to the disk, and are forgotten only then.

States of a record: *pending* (appended), *written* (in the open segment, so that it outlives the process), *durable*
(outlives the machine). The disk may be waited for on another thread (`start_sync`), while more is written. Invariants:

- Records become durable in order; `Journal.durable` is the last one.
- A segment is made only when all records before its first one are durable, so only the last one can have a torn end.
- A sync that failed is final for its file: the operating system may since take what it could not write for written.
  All that is not durable goes back to pending, and into a new segment.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import chain
from typing import Any

from distgrad.durable.disk import Disk
from distgrad.durable.journal_reader import JournalReading, read, trim
from distgrad.durable.open_segment import OpenSegment, Submit, at_once
from distgrad.durable.record import pack
from distgrad.durable.segment import HEADER_BYTES, pack_header, segment_name, segments
from distgrad.errors import StateError

SEGMENT_BYTES = 64 << 20
"""Size of a segment: what is read, and removed, at a time."""


class Journal:
    """The journal of one process; one thread uses it.

    To go on with one that is there use `resume`.

    Parameters
    ----------
    disk : Disk
        Where it is.
    folder : str
        Its folder, which must be there.
    next_sequence : int
        Sequence of the first record, at least 1. All records before are on the disk, or not needed any more.
    segment_bytes : int
        Size of a file. A record that is larger gets a file of its own.
    salt : int, optional
        Unsigned, 64 bits, and unknown to all who may decide what is in a payload; by default a random one.

    Attributes
    ----------
    next_sequence : int
        Of the record to be appended next.
    durable : int
        Sequence up to which all records outlive a crash of the machine.
    unsynced_bytes : int
        Bytes of the records that do not yet.
    appended_bytes : int
        Bytes of all records so far.
    submit : callable
        Where `start_sync` waits for the disk; by default it does so by itself.
    """

    def __init__(
        self,
        disk: Disk,
        folder: str,
        *,
        next_sequence: int,
        segment_bytes: int = SEGMENT_BYTES,
        salt: int | None = None,
    ) -> None:
        self.next_sequence = next_sequence
        self.durable = next_sequence - 1
        self.unsynced_bytes = 0
        self.appended_bytes = 0
        self.submit: Submit = at_once
        self._disk = disk
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._salt = secrets.randbits(64) if salt is None else salt
        self._pending: list[tuple[list[Any], int]] = []
        self._written: list[tuple[list[Any], int]] = []
        self._segment: OpenSegment | None = None
        # For how many of the written records the disk is waited for, their bytes, and the outcome.
        self._syncing: tuple[int, int, Future[None]] | None = None

    @property
    def is_syncing(self) -> bool:
        """Whether `end_sync` must still be called."""
        return self._syncing is not None

    @property
    def idle_bytes(self) -> int:
        """Bytes of the records that no sync is under way for."""
        return self.unsynced_bytes if self._syncing is None else self.unsynced_bytes - self._syncing[1]

    def append(self, header: bytes, parts: Sequence[Any]) -> int:
        """Take a record, in memory only.

        Parameters
        ----------
        header : bytes
            Anything.
        parts : sequence of buffers of bytes
            The payload. They must not change until the record is durable.

        Returns
        -------
        int
            Its sequence.
        """
        sequence = self.next_sequence
        record = pack(header, parts, sequence, self.durable, self._salt)
        self._pending.append(record)
        self.next_sequence = sequence + 1
        self.unsynced_bytes += record[1]
        self.appended_bytes += record[1]
        return sequence

    def write(self) -> None:
        """Write what was appended; it then outlives this process, but not yet the machine.

        Raises
        ------
        OSError
            If the disk does not take it all. Nothing is lost: the next call tries again.
        """
        while self._pending:
            segment = self._segment or self._begin()
            count = self._count_that_fits(segment)
            if count:
                self._write(segment, count)
            else:
                self._end(segment)

    def sync(self) -> int:
        """Write what was appended and wait until it is on the disk.

        Returns
        -------
        int
            The sequence up to which all records are.

        Raises
        ------
        OSError
            If the disk does not take it all. Nothing is lost: `durable` tells how far it got, the next call tries
            again.
        """
        self.end_sync()
        self.write()
        self.start_sync()
        self.end_sync()
        return self.durable

    def start_sync(self) -> None:
        """Begin to force what was written to the disk, if there is something; `end_sync` must follow."""
        assert self._syncing is None
        if self._written:
            assert self._segment is not None  # it has what was written
            size = sum(size for _, size in self._written)
            self._syncing = len(self._written), size, self.submit(self._segment.file.sync)

    def end_sync(self, *, waits: bool = True) -> bool:
        """Take note of what the disk has, if a sync was begun.

        Parameters
        ----------
        waits : bool
            Whether to wait for it.

        Returns
        -------
        bool
            Whether none is under way any more.

        Raises
        ------
        OSError
            If the disk did not take it all; as for `sync`.
        """
        if self._syncing is None:
            return True
        count, size, future = self._syncing
        if not (waits or future.done()):
            return False
        segment = self._segment
        assert segment is not None
        try:
            future.result()
        except OSError:
            self._give_up()
            raise
        self._syncing = None
        self.durable += count
        self.unsynced_bytes -= size
        del self._written[:count]
        if not segment.is_on_disk:
            segment.is_on_disk = True
            for path in segment.replaced:
                with suppress(OSError):  # it holds only what this one holds, too
                    self._disk.remove(path)
        return True

    def remove_before(self, sequence: int) -> None:
        """Remove the segments that hold nothing from a record on.

        Parameters
        ----------
        sequence : int
            The first record that is still needed.

        Raises
        ------
        OSError
            If one cannot be removed; the later ones are there.
        """
        found = segments(self._disk, self._folder)
        ends = [*(segment.first for segment in found[1:]), self.durable + 1]
        for segment, end in zip(found, ends, strict=False):
            is_open = self._segment is not None and self._segment.path == segment.path
            if is_open or end > sequence:
                break
            self._disk.remove(segment.path)

    def close(self) -> None:
        """Close the file. What was not synced may be lost: call `sync` before."""
        self._stop_syncing()
        if self._segment is not None:
            self._segment.trim()
            self._segment.close()
            self._segment = None

    def abandon(self) -> None:
        """Close the file, and remove it if nothing in it counts: those of many tries would fill the disk."""
        self._stop_syncing()
        if self._segment is not None:
            segment, self._segment = self._segment, None
            segment.close()
            if not segment.is_on_disk:
                with suppress(OSError):
                    self._disk.remove(segment.path)

    def _begin(self) -> OpenSegment:
        """Make the next segment; nothing has changed if that fails."""
        first = self.durable + 1
        found = segments(self._disk, self._folder)
        if found and found[-1].first > first:
            raise StateError(f"the journal cannot go on with record {first}: {found[-1].path} has later ones")
        same = [segment for segment in found if segment.first == first]
        path = os.path.join(self._folder, segment_name(first, same[-1].attempt + 1 if same else 0))
        size = max(self._segment_bytes, HEADER_BYTES + self._pending[0][1])
        segment = OpenSegment(path, self._disk.create(path), size, [each.path for each in same])
        segment.reserve()
        try:
            # Before there is anything in it: later, Linux would have to write all of that first.
            self._disk.sync_folder(self._folder)
        except OSError:
            segment.close()
            with suppress(OSError):
                self._disk.remove(path)
            raise
        self._segment = segment
        return segment

    def _count_that_fits(self, segment: OpenSegment) -> int:
        room = segment.size - (segment.offset or HEADER_BYTES)
        for count, (_, size) in enumerate(self._pending):
            if size > room:
                return count
            room -= size
        return len(self._pending)

    def _write(self, segment: OpenSegment, count: int) -> None:
        batch = self._pending[:count]
        buffers = list(chain.from_iterable(record for record, _ in batch))
        size = sum(size for _, size in batch)
        if not segment.offset:
            buffers.insert(0, pack_header(self.durable + 1, self._salt))
            size += HEADER_BYTES
        try:
            if segment.file.write(segment.offset, buffers) != size:
                raise OSError(errno.EIO, "the disk took only a part", segment.path)
        except OSError:
            segment.trim()  # what was written of it; the next try begins at the same place
            raise
        segment.offset += size
        self._written += batch
        del self._pending[:count]

    def _end(self, segment: OpenSegment) -> None:
        """Close a full segment, once all of it is on the disk."""
        self.end_sync()
        segment.trim()
        self.start_sync()
        self.end_sync()
        segment.close()
        self._segment = None

    def _stop_syncing(self) -> None:
        """Wait until nobody uses the file any more, whatever comes of it."""
        if self._syncing is not None:
            self._syncing[2].exception()
            self._syncing = None

    def _give_up(self) -> None:
        """Take back what is not durable, to be written to another segment."""
        self._pending[:0] = self._written
        self._written.clear()
        self.abandon()


def resume(
    disk: Disk,
    folder: str,
    *,
    next_sequence: int,
    vouched: int = 0,
    segment_bytes: int = SEGMENT_BYTES,
    salt: int | None = None,
) -> Journal:
    """Go on with a journal that was read to its end.

    What a reader finds may not be on the disk yet, or never get there: the process before may have died after a sync
    that failed. So the last records, those that nothing shows to be durable, are written once more, into a new segment,
    and damaged ends are cut off.

    Parameters
    ----------
    disk : Disk
        Where it is.
    folder : str
        Its folder.
    next_sequence : int
        One more than the last record that counts, by the journal or by a checkpoint.
    vouched : int
        Up to this record a checkpoint covers all: they were durable before it was written.
    segment_bytes, salt : int, int
        As for `Journal`.

    Returns
    -------
    Journal
        All records before `next_sequence` are durable.

    Raises
    ------
    OSError
        If the disk does not take it; the journal is as good as before.
    DataDamaged
        If it is damaged.
    StateError
        If there are more records than that; cut them off first.
    """
    # Damage is passed over only where the reader before did so: it did not see what lies behind.
    reading = JournalReading(disk, folder, next_sequence, vouched)
    if any(True for _ in reading):
        raise StateError(f"the journal has records behind {next_sequence - 1}; cut them off first")
    first = min(max(reading.synced, vouched) + 1, next_sequence)
    tail = read(disk, folder, first)
    records = list(tail)
    for end in tail.ends:
        trim(disk, end)
    disk.sync_folder(folder)  # or an old end may come back, and hide what is written in its place
    if tail.next_sequence < next_sequence:  # a checkpoint covers more than the journal has
        first, records = next_sequence, []
    journal = Journal(disk, folder, next_sequence=first, segment_bytes=segment_bytes, salt=salt)
    for record in records:
        journal.append(record.header.tobytes(), [record.payload])
    # All into one segment: they are in the old ones until its first sync, and then may be gone from there.
    journal._segment_bytes = max(segment_bytes, HEADER_BYTES + journal.unsynced_bytes)
    try:
        journal.sync()
    except BaseException:
        journal.abandon()
        raise
    journal._segment_bytes = segment_bytes
    return journal
