"""The updater: one thread that takes gradients from the queue and applies them until it is told to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock, Thread

from .gradient_queue import GradientQueue, QueuedGradient
from .holder import ParameterHolder
from .reports import Reports, UpdaterHandle

logger = logging.getLogger(__name__)


class Updater:
    """Starts and ends the thread.

    Parameters
    ----------
    queue : GradientQueue
        Where gradients come from.
    holder : ParameterHolder
        Gradients are taken while it has parameters; its threads end with the updater.
    apply : callable
        What is done with those of one update.
    reports : Reports
        Is told of a failure.
    """

    def __init__(
        self,
        queue: GradientQueue,
        holder: ParameterHolder,
        apply: Callable[[list[QueuedGradient]], None],
        reports: Reports,
    ) -> None:
        self._queue = queue
        self._holder = holder
        self._apply = apply
        self._reports = reports
        self._starting = Lock()  # guards _thread: it is either running, or ended, or not there
        self._thread: Thread | None = None

    def start(self) -> UpdaterHandle:
        """Start the thread, a daemon.

        Returns
        -------
        UpdaterHandle
            Tells about it.

        Raises
        ------
        AlreadyRunning
            If there is one.
        """
        with self._starting:
            self._queue.open()
            thread = Thread(name="distgrad-updater", target=lambda: self._run(handle), daemon=True)
            handle = UpdaterHandle(thread)
            try:
                thread.start()
            except RuntimeError:  # the system has no thread left
                self._queue.ended()
                raise
            self._thread = thread
        return handle

    def end(self, *, drain: bool, timeout: float | None) -> None:
        """Ask the thread to end, and wait for it. Nothing happens if there is none.

        Parameters
        ----------
        drain : bool
            Let it first apply what waits now.
        timeout : float or None
            Seconds to wait at most.

        Raises
        ------
        TimeoutError
            If it takes longer.
        """
        self._queue.stop(drain=drain)
        with self._starting:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                raise TimeoutError(f"the updater still runs after {timeout} s; {len(self._queue)} gradients wait")

    def _run(self, handle: UpdaterHandle) -> None:
        try:
            while step := self._queue.take(lambda: self._holder.layout is not None):
                self._apply(step)
        except Exception as error:  # a bug of ours: parameters may be half written, so nothing more is applied
            logger.exception("the updater failed")
            handle.failed(error)
            self._reports.add_failure(error)
        finally:
            self._holder.close()
            self._queue.ended()
