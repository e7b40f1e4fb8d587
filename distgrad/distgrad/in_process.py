"""Gradients queued and applied within one process: no socket, one thread."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from threading import Condition, Thread
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from . import nests
from .arrays import as_array, carried_dtype
from .errors import (
    AlreadyRunning,
    ConfigError,
    Destroyed,
    Forked,
    GradientRefused,
    LayoutError,
    NoParameters,
    QueueFull,
    StateError,
    UpdaterFailed,
)
from .fair_lock import FairLock
from .holder import ParameterHolder, checked_mode
from .layout import Layout
from .nests import Nest
from .rules import Rule

logger = logging.getLogger(__name__)


class _Queued(NamedTuple):
    """A gradient that waits: packed for a layout, or as a nest if there were no parameters yet."""

    number: int
    layout: Layout | None
    content: Any


class UpdaterHandle:
    """Tells about one run of the updater, from `DistributedGradients.start` to its end."""

    def __init__(self, thread: Thread) -> None:
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


class DistributedGradients:
    """Queue gradients and apply each one, in order, to one set of parameters.

    Every method may be called from any thread. A gradient that cannot be applied (NaN, too large,
    parameters of another layout since it was added) is refused whole, counted in `refused`, and raised as
    `GradientRefused` by the next call of a method, which then has done nothing and can be repeated
    (`stop` and `destroy` have done their work first).

    Parameters
    ----------
    gradient_change_mode : str, default "descent"
        ``"descent"`` or ``"ascent"``, in any case.
    optimizer : Rule, optional
        `SGD`, `Adam` or `AdamW`. Without, the gradient is the step: ``p - g``, or ``p + g``.
    max_queue : int, default 64
        Gradients that may wait; memory is bounded by that many times the size of the parameters.
    threads : int, optional
        Threads that share a large update. By default one per core, at most 8.

    Raises
    ------
    InvalidMode
        If the mode is neither.
    ConfigError
        If another argument is impossible.

    Examples
    --------
    >>> import numpy as np
    >>> with DistributedGradients() as gradients:
    ...     gradients.set_model_parameters({"w": np.ones(3)})
    ...     handle = gradients.start()
    ...     number = gradients.add_gradients({"w": np.array([0.0, 0.5, 1.0])})
    ...     gradients.flush()
    ...     gradients.get_model_parameters()
    {'w': array([1. , 0.5, 0. ])}
    """

    def __init__(
        self,
        gradient_change_mode: str = "descent",
        *,
        optimizer: Rule | None = None,
        max_queue: int = 64,
        threads: int | None = None,
    ) -> None:
        if type(max_queue) is not int or max_queue < 1:
            raise ConfigError(f"max_queue must be an integer of at least 1, got {max_queue!r}")
        self._holder = ParameterHolder(gradient_change_mode, optimizer, threads=threads)
        self._turn = FairLock()  # who has it owns the holder; never taken while holding _changed
        self._changed = Condition()  # guards and announces everything below
        self._queue: deque[_Queued] = deque()
        self._max_queue = max_queue
        self._added = 0
        self._applying: _Queued | None = None
        self._refused: Counter[str] = Counter()
        self._refusals: list[GradientRefused] = []  # not reported yet; only the first is kept, and how many
        self._n_refusals = 0
        self._failure: Exception | None = None
        self._failure_reported = False
        self._thread: Thread | None = None
        self._running = False
        self._stop_after: int | None = None  # while stopping, the number of the last gradient to apply
        self._destroyed = False
        self._pid = os.getpid()

    @property
    def version(self) -> int:
        """Updates applied so far."""
        return self._holder.version

    @property
    def queued(self) -> int:
        """Gradients that wait, without the one that is being applied."""
        return len(self._queue)

    @property
    def refused(self) -> dict[str, int]:
        """Gradients refused so far, by reason (``docs/wire.md``)."""
        with self._changed:
            return dict(self._refused)

    @property
    def running(self) -> bool:
        """Whether the updater runs."""
        return self._running

    @property
    def gradient_change_mode(self) -> str:
        """``"descent"`` or ``"ascent"``."""
        return self._holder.mode

    @property
    def optimizer(self) -> Rule | None:
        """The rule with the numbers now in force."""
        return self._holder.rule

    def set_parameters(self, gradient_change_mode: str | None = None, **numbers: Any) -> None:
        """Change the mode, or numbers of the optimizer, from the next gradient applied on.

        Parameters
        ----------
        gradient_change_mode : str, optional
            ``"descent"`` or ``"ascent"``, in any case; ``None`` keeps the former one.
        **numbers : float or bool
            Settings of the optimizer, such as ``lr``. Its state is kept.

        Raises
        ------
        InvalidMode
            If the mode is neither.
        ConfigError
            If the optimizer has no such number, or it is out of range. Nothing is changed then.
        """
        self._begin()
        mode = None if gradient_change_mode is None else checked_mode(gradient_change_mode)
        with self._turn:
            if numbers:
                self._holder.set_rule_numbers(**numbers)
            if mode is not None:
                self._holder.set_mode(mode)

    def add_gradients(self, gradients: Nest, *, block: bool = True, timeout: float | None = None) -> int:
        """Queue a gradient. That it is queued does not mean that it is applied: see `flush`.

        Parameters
        ----------
        gradients : nest of array_like
            Matched to the parameters by path. Copied, and cast to their dtypes as ``same_kind``; integer
            and boolean leaves are absent or ``None``. Before parameters are set, it is only copied,
            and checked when it is applied.
        block : bool, default True
            Wait for room while the queue is full and the updater runs.
        timeout : float, optional
            Seconds to wait at most.

        Returns
        -------
        int
            Number of the gradient: 1 for the first one added.

        Raises
        ------
        QueueFull
            If there is no room: at once while stopped or without `block`, else after `timeout`.
        LayoutError
            If paths, shapes or dtypes do not fit the parameters.
        """
        self._begin()
        layout = self._holder.layout
        content = _copied(gradients) if layout is None else layout.pack_gradient(gradients)
        deadline = _deadline(timeout)
        with self._changed:
            while len(self._queue) >= self._max_queue:
                if not block or not self._running:
                    state = "" if self._running else "; the updater does not run, call start()"
                    raise QueueFull(f"{self._max_queue} gradients wait, which is the bound{state}")
                if not self._changed.wait(_left(deadline)):
                    raise QueueFull(f"{self._max_queue} gradients still wait after {timeout} s")
                self._check_usable()
            self._added += 1
            self._queue.append(_Queued(self._added, layout, content))
            self._changed.notify_all()
            return self._added

    def set_model_parameters(self, parameters: Nest, do_not_deep_copy: bool = False) -> None:
        """Set the parameters, also while the updater runs.

        The optimizer's state is reset, the version is kept. Queued gradients of the same layout are
        applied to the new parameters, others are refused.

        Parameters
        ----------
        parameters : nest of array_like or None
            Dict, list, tuple or namedtuple of arrays, or one array. ``None`` takes the parameters away,
            and gradients wait until there are some again.
        do_not_deep_copy : bool, default False
            The arrays themselves are the storage and change in place.

        Raises
        ------
        LayoutError
            If the parameters cannot be laid out; with `do_not_deep_copy`, if an array is read-only or
            shares memory with another. The former parameters then stay.
        """
        self._begin(heals=True)
        with self._turn:
            if parameters is None:
                self._holder.clear()
            else:
                self._holder.set_nest(parameters, adopt=do_not_deep_copy)
        with self._changed:
            self._failure, self._failure_reported = None, False
            self._changed.notify_all()

    def get_model_parameters(self, do_not_deep_copy: bool = False) -> Nest:
        """Return the parameters in the nest that they were set in.

        Parameters
        ----------
        do_not_deep_copy : bool, default False
            Return read-only views, which change as gradients are applied.

        Returns
        -------
        nest or None
            A copy of one version; ``None`` if there are no parameters.
        """
        self._begin()
        with self._turn:
            return self._holder.nest(copy=not do_not_deep_copy)

    def start(self) -> UpdaterHandle:
        """Start the updater, a daemon thread: at the program's end it just ends; call `flush` before.

        Returns
        -------
        UpdaterHandle
            Tells whether it runs, waits for its end, and has its error.

        Raises
        ------
        NoParameters
            If no parameters are loaded. Checked first.
        AlreadyRunning
            If it runs already.
        """
        self._begin()
        with self._changed:
            if self._holder.layout is None:
                raise NoParameters("no parameters are loaded: call set_model_parameters() first")
            if self._running:
                raise AlreadyRunning("the updater runs already")
            self._thread = thread = Thread(name="distgrad-updater", target=lambda: self._run(handle), daemon=True)
            handle = UpdaterHandle(thread)
            self._stop_after = None
            self._running = True
            try:
                thread.start()
            except RuntimeError:  # the system has no thread left
                self._running, self._thread = False, None
                raise
        return handle

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop the updater, and return when it has ended. Nothing happens if it does not run.

        Parameters
        ----------
        drain : bool, default True
            First apply what is queued at this moment. Without parameters nothing can be applied, and
            the queue stays.
        timeout : float, optional
            Seconds to wait for the end.

        Raises
        ------
        TimeoutError
            If it has not ended in time. It still will; ``stop(drain=False)`` makes it soon.
        """
        self._check_usable()
        self._end(drain, timeout)
        self._report()

    def clear_gradients(self) -> int:
        """Drop every gradient that waits. One that is being applied is still applied.

        Returns
        -------
        int
            How many were dropped.
        """
        self._begin()
        with self._changed:
            dropped = len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        return dropped

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every gradient added so far was applied, refused or cleared.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; as long as it takes without.

        Raises
        ------
        TimeoutError
            If gradients still wait then.
        StateError
            If gradients wait and the updater does not run.
        """
        self._begin()
        deadline = _deadline(timeout)
        with self._changed:
            last = self._added
            while self._oldest() <= last:
                if not self._running:
                    raise StateError(f"{len(self._queue)} gradients wait and the updater does not run: call start()")
                if not self._changed.wait(_left(deadline)):
                    raise TimeoutError(f"{len(self._queue)} gradients still wait after {timeout} s")
                self._check_usable()
        self._report()

    def destroy(self) -> None:
        """Stop the updater without applying what is queued, and drop queue and parameters.

        Every later call of a method raises `Destroyed`, except this one, which then does nothing.
        """
        if self._destroyed:
            return
        if self._in_child():
            self._destroyed = True  # the thread, and whatever holds the locks, is in the parent
            return
        with self._changed:
            self._destroyed = True
            self._changed.notify_all()
        self._end(drain=False, timeout=None)
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()
        with self._turn:
            self._holder.clear()
            self._holder.close()
        self._report()

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.destroy()
        except (GradientRefused, UpdaterFailed):
            if error is None:
                raise
