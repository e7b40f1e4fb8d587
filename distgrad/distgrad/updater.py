"""The updater: one thread that takes gradients from the queue and applies them until it is told to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock

from .call_guard import CallGuard
from .gradient_queue import GradientQueue, QueuedGradient
from .holder import ParameterHolder
from .joinable_thread import JoinableThread
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
    guard : CallGuard
        Knows whether there is to be no thread any more.
    """

    def __init__(
        self,
        queue: GradientQueue,
        holder: ParameterHolder,
        apply: Callable[[list[QueuedGradient]], None],
        reports: Reports,
        guard: CallGuard,
    ) -> None:
        self._queue = queue
        self._holder = holder
        self._apply = apply
        self._reports = reports
        self._guard = guard
        self._starting = Lock()  # guards _thread: it is either running, or ended, or not there
        self._thread: JoinableThread | None = None

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
        Destroyed
            If there is to be none any more.
        """
        with self._starting:
            self._guard.check_alive()  # under the lock: `end` finds whatever was started before
            self._queue.open()
            thread = JoinableThread(lambda: self._run(handle), "distgrad-updater")
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
        with self._starting:  # a thread that is just being started must not miss it
            self._queue.stop(drain=drain)
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
