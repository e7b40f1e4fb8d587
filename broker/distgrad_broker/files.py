"""The file thread: writes parameters to disk while the loop goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from distgrad.errors import CheckpointError
from distgrad.parameter_files import write
from distgrad_broker.events import SaveEnded, SaveParameters


class FileThread:
    """Owner of the files that the broker writes.

    Parameters
    ----------
    path : str or None
        The file that saves go to.
    on_end : callable
        Called on this thread with the outcome of each save.
    """

    def __init__(self, path: str | None, on_end: Callable[[SaveEnded], None]) -> None:
        self._path = path
        self._on_end = on_end
        # One save at a time is asked for, so this queue never holds more than it and the end mark.
        self._jobs: queue.SimpleQueue[SaveParameters | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def save(self, job: SaveParameters) -> None:
        """Write a version; returns at once.

        Parameters
        ----------
        job : SaveParameters
            Arenas that do not change until `on_end` was called.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="distgrad-files", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def close(self) -> None:
        """End the thread after what it was given."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._on_end(SaveEnded(job.ticket, str(self._path), self.write(job)))

    def write(self, job: SaveParameters) -> str | None:
        """Write a version now, on the calling thread.

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
