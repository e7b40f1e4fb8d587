"""What an updater has to tell its callers: gradients it refused, and the error that ended it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from threading import Lock

from .errors import GradientRefused, UpdaterFailed
from .joinable_thread import JoinableThread


class UpdaterHandle:
    """Tells about one run of the updater, from `DistributedGradients.start` to its end.

    Parameters
    ----------
    thread : JoinableThread
        The updater's thread.
    """

    def __init__(self, thread: JoinableThread) -> None:
        self._thread = thread
        self._error: Exception | None = None

    def is_alive(self) -> bool:
        """Tell whether the updater still runs.

        Returns
        -------
        bool
            False once it was stopped, or failed.
        """
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the updater has ended. This does not stop it.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; as long as it takes without.

        Returns
        -------
        bool
            Whether it has ended.
        """
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def exception(self) -> Exception | None:
        """Return the error that ended the updater.

        Returns
        -------
        Exception or None
            ``None`` while it runs, and if it was stopped. A refused gradient ends no updater.
        """
        return self._error

    def failed(self, error: Exception) -> None:
        """Note the error that ends the updater. Only the updater calls this.

        Parameters
        ----------
        error : Exception
            The error.
        """
        self._error = error


class Reports:
    """Counts refusals, and raises each piece of news once in a caller's thread.

    A refusal is raised once; a failure by every call, until `healed`.
    """

    def __init__(self) -> None:
        self._lock = Lock()  # taken last, and never held while waiting
        self._refused: Counter[str] = Counter()
        self._first: GradientRefused | None = None  # that nobody was told of
        self._unreported = 0
        self._failure: Exception | None = None
        self._failure_told = False

    def counts(self) -> dict[str, int]:
        """Count refusals.

        Returns
        -------
        dict of str to int
            By reason, since the beginning.
        """
        with self._lock:
            return dict(self._refused)

    def add_counts(self, refused: Mapping[str, int]) -> None:
        """Count what an earlier process refused, and told.

        Parameters
        ----------
        refused : mapping of str to int
            By reason.
        """
        with self._lock:
            self._refused.update(refused)

    def add_refusal(self, refusal: GradientRefused) -> None:
        """Note a refused gradient.

        Parameters
        ----------
        refusal : GradientRefused
            What will be raised. Of several before the next call, only the first is kept.
        """
        with self._lock:
            self._refused[refusal.reason] += 1
            self._unreported += 1
            self._first = self._first or refusal

    def add_failure(self, error: Exception) -> None:
        """Note that the updater ended by an error.

        Parameters
        ----------
        error : Exception
            The error.
        """
        with self._lock:
            self._failure, self._failure_told = error, False

    @property
    def has_failure(self) -> bool:
        """Whether the updater has failed, and what it may have left half written is still there."""
        return self._failure is not None

    def healed(self) -> None:
        """Forget the failure: what it may have left half written was replaced."""
        with self._lock:
            self._failure = None

    def raise_failure(self, *, again: bool = True) -> None:
        """Raise if the updater has failed.

        Parameters
        ----------
        again : bool, default True
            Also if a caller was told before.

        Raises
        ------
        UpdaterFailed
            With the updater's error as cause.
        """
        with self._lock:
            failure = self._failure if again or not self._failure_told else None
            self._failure_told = self._failure_told or failure is not None
        if failure is not None:
            raise UpdaterFailed(
                f"the updater failed: {failure!r}; the parameters may be half written",
                hint="set_model_parameters() makes this usable again",
            ) from failure

    def raise_refusal(self) -> None:
        """Raise if gradients were refused that no caller was told of.

        Raises
        ------
        GradientRefused
            The first of them.
        """
        with self._lock:
            refusal, others = self._first, self._unreported - 1
            self._first, self._unreported = None, 0
        if refusal is None:
            return
        if others:
            text = f"{refusal.message} (and {others} more were refused after it)"
            refusal = GradientRefused(refusal.reason, text, leaf=refusal.leaf, number=refusal.number)
        raise refusal
