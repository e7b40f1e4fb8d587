"""A thread that can be waited for again after a wait was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread, current_thread


class JoinableThread(Thread):
    """A daemon thread whose `join` may be ended by Ctrl-C, and repeated.

    In Python before 3.13 an exception in ``Thread.join`` marks the thread as ended though it runs on (seen with 3.11);
    whoever joins it again returns at once. This waits for an event first, which does not have that fault.

    Parameters
    ----------
    target : callable
        What the thread does.
    name : str
        Its name.
    """

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self._target_ended = Event()

    def run(self) -> None:
        """Call the target."""
        try:
            super().run()
        finally:
            self._target_ended.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; as long as it takes without.

        Raises
        ------
        RuntimeError
            If it was not started, or is the caller's own.
        """
        # In a child of fork it is not alive, and nobody would set the event.
        if self is not current_thread() and self.is_alive() and not self._target_ended.wait(timeout):
            return
        super().join()
