"""The file thread: journal, checkpoints and saves go to the disk while the loop goes on.

| thread | owns | receives through | gives away |
|---|---|---|---|
| files (``distgrad-files``) | the data folder, and the file of a save | a queue | what was written, by `on_event` |
| sync (``distgrad-sync``) | nothing: waits for the disk while the file thread writes on | a queue | that it is done |

The queue is bounded by the grants: a gradient in it is not settled, and so counts for its worker.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from distgrad.durable.disk_events import DiskTroubled, WriteCheckpoint
from distgrad.durable.disk_writer import DiskWriter, Written
from distgrad.durable.records import Record
from distgrad.errors import CheckpointError
from distgrad.parameter_files import write
from distgrad_broker.events import SaveEnded, SaveParameters

_LOGGER = logging.getLogger(__name__)

Job = SaveParameters | WriteCheckpoint | Sequence[Record] | None


class FileThread:
    """Owner of the files that the broker writes.

    Parameters
    ----------
    path : str or None
        The file that saves go to.
    on_event : callable
        Called on this thread with what was written, or what went wrong.
    writer : DiskWriter, optional
        Of the data folder, if there is one; used on this thread from the first job on, and closed by the caller.
    """

    def __init__(
        self,
        path: str | None,
        on_event: Callable[[SaveEnded | Written], None],
        writer: DiskWriter | None = None,
    ) -> None:
        self._path = path
        self._writer = writer
        self._on_event = on_event
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._syncs: ThreadPoolExecutor | None = None

    def save(self, job: SaveParameters) -> None:
        """Write a version to its file; returns at once.

        Parameters
        ----------
        job : SaveParameters
            Arenas that do not change until `on_event` was called.
        """
        self._put(job)

    def checkpoint(self, job: WriteCheckpoint) -> None:
        """Write a checkpoint; returns at once.

        Parameters
        ----------
        job : WriteCheckpoint
            What it holds does not change until `on_event` was called.
        """
        self._put(job)

    def write(self, records: Sequence[Record]) -> None:
        """Write records to the journal; returns at once.

        Parameters
        ----------
        records : sequence of Record
            In order.
        """
        if records:
            self._put(records)

    def close(self) -> None:
        """End the thread after what it was given, as far as the disk takes it."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        if self._syncs is not None:
            self._syncs.shutdown()
            self._syncs = None

    def write_now(self, job: SaveParameters) -> str | None:
        """Write a version to its file on the calling thread.

        Parameters
        ----------
        job : SaveParameters
            What to write.

        Returns
        -------
        str or None
            What went wrong, or None.
        """
        if self._path is None:
            return "no file was named"
        try:
            write(self._path, job.layout.nest(job.layout.views(job.arenas, writeable=False)))
        except CheckpointError as error:
            return error.message
        except OSError as error:
            return f"{error.strerror} ({error.filename or self._path})"
        return None

    def _put(self, job: Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="distgrad-files", daemon=True)
            if self._writer is not None:
                self._syncs = ThreadPoolExecutor(1, "distgrad-sync")
                self._writer.sync_beside(self._sync)
            self._thread.start()
        self._jobs.put(job)

    def _sync(self, call: Callable[[], None]) -> Future[None]:
        """Have the disk waited for, and the file thread woken after that."""
        assert self._syncs is not None
        future = self._syncs.submit(call)
        future.add_done_callback(lambda _: self._jobs.put(()))
        return future

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        # The one place of this thread that catches everything: the core must know that nothing is settled any more.
        except Exception as error:
            _LOGGER.exception("the file thread failed")
            self._on_event(DiskTroubled(f"the file thread failed, restart the broker: {error!r}"))

    def _turn(self) -> bool:
        """Do what there is to do; tell whether there may be more."""
        writer = self._writer
        is_ending = False
        for job in self._take():
            if job is None:
                is_ending = True
            elif isinstance(job, SaveParameters):
                self._on_event(SaveEnded(job.ticket, str(self._path), self.write_now(job)))
            elif writer is not None:
                if isinstance(job, WriteCheckpoint):
                    writer.checkpoint(job)
                else:
                    writer.records(job)
        if writer is not None:
            now = time.monotonic()
            for event in writer.finish(now) if is_ending else writer.step(now):
                self._on_event(event)
        return not is_ending

    def _take(self) -> list[Job]:
        """Take all jobs there are; wait for one if there is nothing else to do."""
        wait_s = None if self._writer is None else self._writer.wait_s(time.monotonic())
        jobs: list[Job] = []
        try:
            jobs.append(self._jobs.get(timeout=wait_s) if wait_s != 0 else self._jobs.get_nowait())
            while True:
                jobs.append(self._jobs.get_nowait())
        except queue.Empty:
            return jobs
