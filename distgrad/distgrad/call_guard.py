"""How calls of the in-process class open and close: what refuses them, and what they have to tell first."""

from __future__ import annotations

import os
from collections.abc import Callable

from .errors import Destroyed, Forked
from .reports import Reports


class CallGuard:
    """Refuses calls after the end and in forked children, and raises news from the updater.

    Parameters
    ----------
    reports : Reports
        The news.
    is_running : callable
        Whether there is an updater, which a forked child lacks.
    has_files : bool
        Whether files are open, which a forked child must leave alone.

    Attributes
    ----------
    is_destroyed : bool
        Whether there are to be no calls any more.
    """

    def __init__(self, reports: Reports, is_running: Callable[[], bool], *, has_files: bool) -> None:
        self.is_destroyed = False
        self._reports = reports
        self._is_running = is_running
        self._has_files = has_files
        self._pid = os.getpid()

    @property
    def is_bound_elsewhere(self) -> bool:
        """Whether this is a forked child, and threads, locks or files are the parent's."""
        return os.getpid() != self._pid and (self._has_files or self._is_running())

    def begin(self, *, heals: bool = False) -> None:
        """Open a call: refuse it if nothing can be done, or if there is news to be told first.

        Parameters
        ----------
        heals : bool
            Whether the call puts right what a failed updater may have left; then the failure is told once.

        Raises
        ------
        Destroyed
            After the end.
        Forked
            In a forked child.
        UpdaterFailed
            If the updater has failed.
        GradientRefused
            If gradients were refused that nobody was told of.
        """
        self.check_alive()
        self._reports.raise_failure(again=not heals)
        self._reports.raise_refusal()

    def check_alive(self) -> None:
        """Refuse a call if nothing can be done.

        Raises
        ------
        Destroyed
            After the end.
        Forked
            In a forked child.
        """
        if self.is_destroyed:
            raise Destroyed("destroy() was called")
        if self.is_bound_elsewhere:
            what = "the data folder is" if self._has_files else "the updater runs"
            raise Forked(f"{what} in process {self._pid}, which this one was forked from")
        self._pid = os.getpid()  # in a child where nothing was running: it has a copy of its own

    def check_waiting(self) -> None:
        """Raise in a caller that waits for the updater, if there is no point any more.

        Raises
        ------
        Destroyed
            After the end.
        Forked
            In a forked child.
        UpdaterFailed
            If the updater has failed.
        """
        self.check_alive()
        self._reports.raise_failure()

    def report(self) -> None:
        """Close a call whose work is done: raise what happened in the updater and was not told yet.

        Raises
        ------
        UpdaterFailed
            If the updater has failed.
        GradientRefused
            If gradients were refused that nobody was told of.
        """
        self._reports.raise_failure()
        self._reports.raise_refusal()
