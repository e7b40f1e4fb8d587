"""The file thread of one process: notes go to the journal, and checkpoints to their files, while updates go on.

| thread | owns | receives through | gives away |
|---|---|---|---|
| files (``distgrad-files``) | the data folder | `LocalBooks` | how far the disk has got |

The lock is taken last, by whoever may hold the queue's lock or the turn to change the parameters, and never held while
waiting for either, or for the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock

from distgrad import log
from distgrad.durable.disk_events import CheckpointEnded, DiskTroubled, WriteCheckpoint
from distgrad.durable.disk_writer import DiskWriter, Written
from distgrad.errors import CheckpointError
from distgrad.joinable_thread import JoinableThread
from distgrad.local_books import LocalBooks

CHECKPOINT_S = 300.0
"""A checkpoint is written after this long, if anything has happened."""
CHECKPOINT_BYTES = 2 << 30
"""Or after this much journal, which bounds a recovery."""
# After a checkpoint that could not be written, or taken, the next is tried this much later.
RETRY_S = 5.0

# Differs from every state.
_NO_STATE = (-1, -1, -1)

_LOGGER = logging.getLogger(__name__)


class LocalJournal:
    """Keeps what is noted.

    Parameters
    ----------
    books : LocalBooks
        Guarded by this from now on.
    writer : DiskWriter
        Of the data folder; closed with this.
    snapshot : callable
        Given a ticket, makes a checkpoint of this moment on the file thread, or None if there can be none now.
    on_written : callable
        Called on the file thread when the disk has got further, or has failed.
    journal_bytes : int
        Journal behind the newest checkpoint; 0 if that has everything.
    """

    def __init__(
        self,
        books: LocalBooks,
        writer: DiskWriter,
        snapshot: Callable[[int], WriteCheckpoint | None],
        on_written: Callable[[], None],
        journal_bytes: int = 0,
    ) -> None:
        self._books = books
        self._writer = writer
        self._snapshot = snapshot
        self._on_written = on_written
        lock = Lock()
        self._noted, self._advanced = Condition(lock), Condition(lock)
        self._trouble: str | None = None
        self._failure: Exception | None = None
        self._is_closing = False
        # Of checkpoints; used on the file thread only.
        self._ticket = 0
        self._is_under_way = self._is_final = self._has_tried = False
        self._begun_at, self._retry_at = time.monotonic(), 0.0
        self._begun_bytes = books.noted_bytes - journal_bytes
        self._begun_state = _NO_STATE if journal_bytes else self._state()
        self._thread = JoinableThread(self._run, "distgrad-files")

    @property
    def settled(self) -> int:
        """Highest number up to which all gradients are decided on, and the disk knows."""
        return self._books.settled

    @property
    def cursor(self) -> bytes | str | None:
        """Cursor of the last gradient that is on the disk."""
        return self._books.cursor

    @property
    def behind(self) -> int:
        """Gradients that are not on the disk yet."""
        return self._books.behind

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written at the moment; None if all is well."""
        return self._trouble

    def start(self) -> None:
        """Start the file thread, a daemon."""
        try:
            self._thread.start()
        except RuntimeError:  # the system has no thread left
            self._writer.close()
            raise

    @contextmanager
    def noting(self) -> Iterator[LocalBooks]:
        """Give out the books for a few quick notes, which are then written.

        Yields
        ------
        LocalBooks
            Nobody else touches them meanwhile.
        """
        with self._noted:
            yield self._books
            self._noted.notify()

    def check(self) -> None:
        """Raise if nothing will ever be written any more.

        Raises
        ------
        CheckpointError
            If the file thread ended by an error.
        """
        if self._failure is not None:
            raise CheckpointError(f"the file thread failed: {self._failure!r}") from self._failure

    def wait(self, timeout: float | None, check: Callable[[], None]) -> None:
        """Wait until all that was noted before this call is on the disk.

        Parameters
        ----------
        timeout : float or None
            Seconds to wait at most.
        check : callable
            Raises if the caller should give up; called after every wait.

        Raises
        ------
        TimeoutError
            If that takes longer; it says what is wrong with the disk.
        CheckpointError
            If the file thread ended by an error.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._advanced:
            target = self._books.sequence
            while True:  # not with a condition: GradientQueue.put says why
                if self._books.durable >= target:
                    return
                self.check()
                if not self._advanced.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    because = "" if self._trouble is None else f": {self._trouble}"
                    raise TimeoutError(f"what was done is not on the disk yet{because}")
                check()

    def close(self) -> None:
        """Write all, and a last checkpoint, as far as the disk takes it; end the thread and give the folder back.

        A call that was interrupted may be repeated.

        Raises
        ------
        CheckpointError
            If something is not on the disk.
        """
        with self._noted:
            self._is_closing = True
            self._noted.notify()
        self._thread.join()
        with self._advanced:
            self._advanced.notify_all()  # who still waits looks again, and gives up
        self.check()
        if self._books.durable < self._books.sequence:
            raise CheckpointError(
                f"what came after gradient {self._books.settled} is lost, it is not on the disk: {self._trouble}"
            )

    def _run(self) -> None:
        """Write until told to close: what the file thread does."""
        try:
            while not self._is_done():
                self._work()
        except Exception as error:  # a bug of ours, or a folder that somebody else changed
            _LOGGER.exception("the file thread failed")
            with self._advanced:
                self._failure = error
                self._advanced.notify_all()
            self._on_written()
        finally:
            self._writer.close()

    def _is_done(self) -> bool:
        if self._trouble is not None:
            return self._has_tried  # once more, since it was told to close
        with self._noted:
            is_written = self._books.durable >= self._books.sequence
        return self._is_final and not self._is_under_way and is_written

    def _work(self) -> None:
        """Wait for something to do, and do one step of it."""
        with self._noted:
            while not (records := self._books.take()) and not self._is_closing:
                now = time.monotonic()
                wait_s = self._wait_s(now)
                if wait_s <= 0:
                    break
                self._noted.wait(wait_s)
        self._writer.records(records)
        now = time.monotonic()
        if self._is_closing:
            self._writer.hurry()
            self._has_tried = True
        if self._is_checkpoint_due(now):
            self._begin_checkpoint(now)
        for event in self._writer.step(time.monotonic()):
            self._take_note(event)

    def _wait_s(self, now: float) -> float:
        """Tell how long nothing needs to be done if nothing is noted."""
        write_s = self._writer.wait_s(now)
        if self._is_under_way:
            checkpoint_s = CHECKPOINT_S
        elif self._books.noted_bytes - self._begun_bytes >= CHECKPOINT_BYTES:
            checkpoint_s = self._retry_at - now
        else:
            # If nothing has happened by then, it is looked at again.
            checkpoint_s = max(self._begun_at + CHECKPOINT_S, self._retry_at) - now
        return checkpoint_s if write_s is None else min(write_s, checkpoint_s)

    def _is_checkpoint_due(self, now: float) -> bool:
        if self._is_closing:
            return not self._is_final and not self._is_under_way
        if self._is_under_way or now < self._retry_at:
            return False
        is_due = now - self._begun_at >= CHECKPOINT_S
        return is_due or self._books.noted_bytes - self._begun_bytes >= CHECKPOINT_BYTES

    def _begin_checkpoint(self, now: float) -> None:
        self._is_final = self._is_closing
        with self._noted:
            state, noted_bytes = self._state(), self._books.noted_bytes
        if state == self._begun_state:
            self._begun_at = now
            return
        self._ticket += 1
        job = self._snapshot(self._ticket)
        if job is None:
            self._retry_at = now + RETRY_S
            return
        with self._noted:
            records = self._books.take()
        self._writer.records(records)
        self._begun_at, self._begun_bytes, self._begun_state = now, noted_bytes, state
        self._is_under_way = True
        self._writer.checkpoint(job)

    def _state(self) -> tuple[int, int, int]:
        return self._books.version, self._books.generation, self._books.sequence

    def _take_note(self, event: Written) -> None:
        if isinstance(event, CheckpointEnded):
            self._is_under_way = False
            if event.error is not None:
                self._retry_at = time.monotonic() + RETRY_S
                self._begun_state = _NO_STATE
                self._begun_at -= CHECKPOINT_S
                log.event(_LOGGER, logging.ERROR, "checkpoint failed", path=event.path, error=event.error)
            return
        if isinstance(event, DiskTroubled):
            if event.reason is None:
                log.event(_LOGGER, logging.WARNING, "journal can be written again")
            elif self._trouble is None:
                log.event(_LOGGER, logging.ERROR, "journal cannot be written", reason=event.reason)
        with self._advanced:
            if isinstance(event, DiskTroubled):
                self._trouble = event.reason
            else:
                self._books.written(event.sequence)
            self._advanced.notify_all()
        self._on_written()
