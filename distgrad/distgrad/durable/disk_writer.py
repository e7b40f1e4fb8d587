"""What the file thread does, a step at a time and without a thread or a clock: journal first, checkpoints beside it.

While the disk is waited for, the next records are copied to the file: each takes about as long as the other.

A checkpoint is written in pieces of a few megabytes; between two of them the journal gets its turn, so that settling
does not wait for a checkpoint. Where the disk fails nothing is lost: records stay here until they are on it, and
writing is tried again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from distgrad.durable.checkpoint_file import CheckpointWriter
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import Disk
from distgrad.durable.disk_events import CheckpointEnded, DiskTroubled, RecordsWritten, WriteCheckpoint
from distgrad.durable.journal import Journal
from distgrad.durable.open_segment import Submit, at_once
from distgrad.durable.records import Record
from distgrad.errors import DistgradError

# At most about this much is forced to the disk at a time: workers then hear of the first while the rest is written, and
# send more, so that the disk never waits for them.
PIECE_BYTES = 16 << 20
# A disk that has failed is tried again this often.
RETRY_S = 0.25

Written = RecordsWritten | CheckpointEnded | DiskTroubled


class DiskWriter:
    """Writes one data folder.

    Parameters
    ----------
    disk : Disk
        Where the folder is.
    folder : DataFolder
        Locked by this process.
    journal : Journal or None
        None if nothing but checkpoints is written.
    sync_s, sync_bytes : float, int
        Wait for so long, or for so many bytes, before records are forced to the disk; 0 and 0 is after every batch.
    keep : int
        How many checkpoints are kept.
    first_needed : int or None
        The oldest record that the checkpoint needs that was recovered from.
    """

    def __init__(
        self,
        disk: Disk,
        folder: DataFolder,
        journal: Journal | None,
        *,
        sync_s: float = 0.0,
        sync_bytes: int = 0,
        keep: int = 2,
        first_needed: int | None = None,
    ) -> None:
        self._disk = disk
        self._folder = folder
        self._journal = journal
        self._sync_s = sync_s
        self._sync_bytes = sync_bytes
        self._keep = keep
        self._waits_since: float | None = None
        self._retry_at = 0.0
        self._is_troubled = False
        self._is_hurried = False
        # The oldest record that each checkpoint needs, newest last: of the one that was recovered from, and of those
        # written here. Others may be kept: nothing of the journal is removed before all that are kept are known.
        self._needed: dict[str, int] = {} if first_needed is None else {"": first_needed}
        self._waiting: deque[Record] = deque()
        self._waiting_bytes = 0
        self._job: WriteCheckpoint | None = None
        self._checkpoint: CheckpointWriter | None = None
        self._path = ""

    def records(self, records: Sequence[Record]) -> None:
        """Take records; they are written by the next steps.

        Parameters
        ----------
        records : sequence of Record
            In order.
        """
        assert self._journal is not None  # the core notes records only for a journal
        self._waiting.extend(records)
        self._waiting_bytes += sum(record.size for record in records)

    def checkpoint(self, job: WriteCheckpoint) -> None:
        """Take a checkpoint; the core asks for one at a time.

        Parameters
        ----------
        job : WriteCheckpoint
            It covers the records that were taken before.
        """
        assert self._job is None
        self._job = job

    def sync_beside(self, submit: Submit) -> None:
        """Have the disk waited for elsewhere from now on.

        Parameters
        ----------
        submit : callable
            Does what it is given on another thread; when that has ended, `step` is to be called.
        """
        if self._journal is not None:
            self._journal.submit = submit

    def hurry(self) -> None:
        """Write what there is without waiting for more: nothing more comes."""
        self._is_hurried = True
        self._retry_at = 0.0

    def wait_s(self, now: float) -> float | None:
        """Tell how long nothing needs to be done.

        Parameters
        ----------
        now : float
            Seconds on the caller's clock.

        Returns
        -------
        float or None
            Seconds; None if only more records or another checkpoint can bring work.
        """
        journal, job = self._journal, self._job
        if self._is_troubled:
            return max(0.0, self._retry_at - now) if self._has_records or job is not None else None
        is_syncing = journal is not None and journal.is_syncing
        if job is not None and not (is_syncing and self._must_wait_for_records(job)):
            return 0.0
        if is_syncing:
            return 0.0 if self._may_write_more else None
        return max(0.0, self._due_at(now) - now) if self._has_records else None

    def step(self, now: float) -> list[Written]:
        """Do what is due, for a few milliseconds if the disk is a fast one.

        Parameters
        ----------
        now : float
            Seconds on the caller's clock.

        Returns
        -------
        list
            What the core must be told.
        """
        events: list[Written] = []
        journal = self._journal
        if journal is not None and (journal.is_syncing or (self._has_records and now >= self._due_at(now))):
            self._write(journal, events, now)
        if self._job is not None and now >= self._retry_at:
            self._advance(self._job, events)
        return events

    def finish(self, now: float) -> list[Written]:
        """Do all that is left, as far as the disk takes it: nothing more comes.

        Parameters
        ----------
        now : float
            Seconds on the caller's clock.

        Returns
        -------
        list
            What the core must be told.
        """
        self.hurry()
        if self._journal is not None:
            self._journal.submit = at_once
        events = self.step(now)
        while not self._is_troubled and (self._has_records or self._job is not None):
            events += self.step(now)
        return events

    def close(self) -> None:
        """Close all files."""
        if self._checkpoint is not None:
            self._checkpoint.abandon()
        if self._journal is not None:
            self._journal.close()
        self._folder.close()

    @property
    def _has_records(self) -> bool:
        return bool(self._waiting) or (self._journal is not None and self._journal.unsynced_bytes > 0)

    @property
    def _may_write_more(self) -> bool:
        """Whether there are records for the piece that is being gathered."""
        return bool(self._waiting) and self._journal is not None and self._journal.idle_bytes < PIECE_BYTES

    def _must_wait_for_records(self, job: WriteCheckpoint) -> bool:
        """Tell whether the disk does not have all records yet that a checkpoint covers."""
        return self._journal is not None and self._journal.durable < job.checkpoint.sequence

    def _due_at(self, now: float) -> float:
        """Tell when records must be forced to the disk."""
        if self._is_troubled:
            return self._retry_at
        if self._waits_since is None:
            self._waits_since = now
        gathered = self._waiting_bytes + (0 if self._journal is None else self._journal.idle_bytes)
        is_awaited = self._job is not None and self._must_wait_for_records(self._job)
        is_enough = gathered >= self._sync_bytes > 0
        return now if self._is_hurried or is_enough or is_awaited else self._waits_since + self._sync_s

    def _write(self, journal: Journal, events: list[Written], now: float) -> None:
        """Write the next piece, and have it forced to the disk as soon as the one before is there."""
        before, trouble = journal.durable, None
        try:
            self._write_piece(journal, now)
        except OSError as error:
            trouble = f"{error.strerror or error} ({error.filename or self._folder.path})"
        if journal.durable > before:
            if self._is_troubled:
                self._is_troubled = False
                events.append(DiskTroubled(None))
            events.append(RecordsWritten(journal.durable))
        if trouble is not None:
            self._retry_at = now + RETRY_S
            self._is_troubled = True
            events.append(DiskTroubled(trouble))

    def _write_piece(self, journal: Journal, now: float) -> None:
        journal.end_sync(waits=self._is_hurried)
        if self._is_troubled and now < self._retry_at:
            return
        while self._may_write_more:
            record = self._waiting.popleft()
            self._waiting_bytes -= record.size
            journal.append(record.header, list(map(bytes, record.parts)) if record.is_shared else record.parts)
        journal.write()
        if journal.end_sync(waits=False) and journal.idle_bytes and now >= self._due_at(now):
            journal.start_sync()
            if not self._waiting:
                self._waits_since = None
            journal.end_sync(waits=False)

    def _advance(self, job: WriteCheckpoint, events: list[Written]) -> None:
        """Write the next piece of a checkpoint, once the journal has all that it covers."""
        checkpoint = job.checkpoint
        if self._must_wait_for_records(job):
            return
        path = self._path
        try:
            if self._checkpoint is None:
                path = self._path = self._folder.checkpoint_path(checkpoint.sequence, checkpoint.version)
                self._checkpoint = CheckpointWriter(self._disk, path, checkpoint)
            if not self._checkpoint.step():
                return
            self._folder.prune(self._keep)
            # The same once more, if nothing has happened since, is still one.
            self._needed.pop(path, None)
            self._needed[path] = job.first_needed
            while len(self._needed) > self._keep:
                del self._needed[next(iter(self._needed))]
            if self._journal is not None and len(self._needed) == self._keep:
                self._journal.remove_before(min(self._needed.values()))
        except (OSError, DistgradError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            events.append(CheckpointEnded(job.ticket, path, reason))
        else:
            events.append(CheckpointEnded(job.ticket, path, None))
        self._job = self._checkpoint = None
