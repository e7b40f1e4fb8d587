"""Gradients queued and applied within one process: no socket, one thread, and one more if they are kept on disk."""

from __future__ import annotations

import os
import time
from typing import Any, Self

from .call_guard import CallGuard
from .errors import CheckpointError, GradientRefused, NoParameters, UpdaterFailed
from .fair_lock import FairLock
from .gradient_queue import GradientQueue, QueuedGradient, copied
from .holder import ParameterHolder
from .layout import Layout
from .local_keeper import LocalKeeper
from .modes import checked_mode
from .nests import Nest
from .policies import Policy, Weighing
from .queued_updates import apply_together, step_size
from .reports import Reports, UpdaterHandle
from .rules import Rule
from .updater import Updater
from .wire import checked_cursor


class DistributedGradients:
    """Queue gradients and apply each one, in order, to one set of parameters.

    Every method may be called from any thread. A gradient that cannot be applied (it holds NaN, or the
    parameters have another layout than when it was added) is refused whole, counted in `refused`, and
    raised as `GradientRefused` by the next method called. That call has then done nothing and can be
    repeated, except `stop`, `flush` and `destroy`, which do their work first.

    Parameters
    ----------
    gradient_change_mode : str, default "descent"
        ``"descent"`` or ``"ascent"``, in any case.
    optimizer : Rule, optional
        `SGD`, `Adam` or `AdamW`. Without, the gradient is the step: ``p - g``, or ``p + g``.
    policy : Policy, optional
        ``policies.Buffered(K)`` makes the mean of every K gradients one update; fewer, when `flush` or a draining
        `stop` waits for them. By default every gradient is one. Other policies tell workers apart, and need a broker.
    reduction : str, default "mean"
        ``"mean"`` or ``"sum"`` of the gradients of one update.
    max_queue : int, default 64
        Gradients that may wait; memory is bounded by that many times the size of the parameters.
    threads : int, optional
        Threads that share a large update. By default one per core, at most 8.
    data : path, optional
        Folder that keeps all that happens: a process that was killed at any moment goes on where it was
        (``docs/replay.md``). Made if it is not there; one process at a time has it. Of `gradient_change_mode`
        and `optimizer` what is in force is recovered, too, unless another one is given than the last time.

    Raises
    ------
    InvalidMode
        If the mode is neither.
    ConfigError
        If another argument is impossible.
    CheckpointError
        If the data folder is in use (`DataFolderInUse`), damaged, or cannot be written to.

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
        policy: Policy | None = None,
        reduction: str = "mean",
        max_queue: int = 64,
        threads: int | None = None,
        data: str | os.PathLike[str] | None = None,
    ) -> None:
        self._weighing = Weighing(reduction)
        self._holder = ParameterHolder(gradient_change_mode, optimizer, threads=threads)
        self._turn = FairLock()  # who has it owns the holder
        self._reports = Reports()
        self._guard = CallGuard(self._reports, lambda: self._queue.running, has_files=data is not None)
        self._queue = GradientQueue(max_queue, self._check_waiting, step_size(policy, max_queue))
        self._updater = Updater(self._queue, self._holder, lambda step: self._apply(step), self._reports, self._guard)
        self._is_empty = False  # the end of `destroy`
        self._keeper: LocalKeeper | None = None
        if data is not None:
            self._keeper = keeper = LocalKeeper(
                data, self._holder, self._turn, policy, self._weighing, self._reports, self._queue.wake
            )
            self._queue.restore(keeper.queued, keeper.added_before)
            self._queue.recorder = keeper

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
        return self._reports.counts()

    @property
    def settled(self) -> int:
        """Highest number up to which all gradients are applied, refused or cleared, and that is on the disk."""
        return self._queue.decided if self._keeper is None else self._keeper.settled

    @property
    def cursor(self) -> bytes | str | None:
        """Cursor of the last gradient that is on the disk: where a restarted program goes on. None without `data`."""
        return None if self._keeper is None else self._keeper.cursor

    @property
    def disk_trouble(self) -> str | None:
        """Why nothing can be written at the moment. It is tried again and again, and nothing is lost meanwhile."""
        return None if self._keeper is None else self._keeper.trouble

    @property
    def running(self) -> bool:
        """Whether the updater runs."""
        return self._queue.running

    @property
    def gradient_change_mode(self) -> str:
        """``"descent"`` or ``"ascent"``."""
        return self._holder.mode

    @property
    def optimizer(self) -> Rule | None:
        """The rule, with the numbers now in force."""
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
        self._guard.begin()
        mode = None if gradient_change_mode is None else checked_mode(gradient_change_mode)
        with self._turn:
            if numbers:
                self._holder.set_rule_numbers(**numbers)
            self._holder.set_mode(mode or self._holder.mode)
            if self._keeper is not None:
                self._keeper.configured()

    def add_gradients(
        self,
        gradients: Nest,
        *,
        block: bool = True,
        timeout: float | None = None,
        cursor: bytes | str | None = None,
    ) -> int:
        """Queue a gradient. That it is queued does not mean that it is applied, or on the disk: see `flush`.

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
        cursor : bytes or str, optional
            Where the program stands in its data once this gradient counts; at most 4 KiB. Kept with it.

        Returns
        -------
        int
            Number of the gradient: 1 for the first one added; with `data` it goes on across restarts.

        Raises
        ------
        QueueFull
            If there is no room: at once while stopped or without `block`, else after `timeout`. With `data`,
            a gradient takes up room until it is on the disk, so memory stays bounded while that is slow or full.
        LayoutError
            If paths, shapes or dtypes do not fit the parameters.
        """
        self._guard.begin()
        layout = self._holder.layout
        content = copied(gradients) if layout is None else layout.pack_gradient(gradients)
        return self._queue.put(layout, content, block=block, timeout=timeout, cursor=checked_cursor(cursor))

    def set_model_parameters(self, parameters: Nest, do_not_deep_copy: bool = False) -> None:
        """Set the parameters, also while the updater runs.

        The optimizer's state is reset, the version is kept. Queued gradients of the same layout are
        applied to the new parameters, others are refused. With `data` this replaces what was recovered, so begin
        with ``if shared.get_model_parameters() is None: shared.set_model_parameters(...)``.

        Parameters
        ----------
        parameters : nest of array_like or None
            Dict, list, tuple or namedtuple of arrays, or one array. ``None`` takes the parameters away,
            and gradients wait until there are some again.
        do_not_deep_copy : bool, default False
            The arrays themselves are the storage and change in place. With `data`, the journal keeps copies; what
            you change in them yourself is not in it.

        Raises
        ------
        LayoutError
            If the parameters cannot be laid out; with `do_not_deep_copy`, if an array is read-only or
            shares memory with another. The former parameters then stay.
        """
        self._guard.begin(heals=True)
        if self._keeper is not None and parameters is not None:
            Layout.of(parameters).to_frame()  # one that is too long for the journal is refused before it is set
        with self._turn:
            if parameters is None:
                self._holder.clear()
            else:
                self._holder.set_nest(parameters, adopt=do_not_deep_copy)
            if self._keeper is not None:
                self._keeper.replaced()
        self._reports.healed()
        self._queue.wake()

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
        self._guard.begin()
        with self._turn:
            return self._holder.nest(copy=not do_not_deep_copy)

    def start(self) -> UpdaterHandle:
        """Start the updater, a daemon thread: when the program ends, it just ends; `flush` before.

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
        self._guard.begin()
        if self._holder.layout is None:
            raise NoParameters("no parameters are loaded", hint="call set_model_parameters() first")
        return self._updater.start()

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
        self._guard.check_alive()
        self._updater.end(drain=drain, timeout=timeout)
        self._guard.report()

    def clear_gradients(self) -> int:
        """Drop every gradient that waits. One that is being applied is still applied.

        Returns
        -------
        int
            How many were dropped.
        """
        self._guard.begin()
        return self._queue.clear()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every gradient added so far was applied, refused or cleared; with `data`, and is on the disk.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; as long as it takes without.

        Raises
        ------
        TimeoutError
            If gradients still wait then; it says so if the disk is what they wait for, and why.
        StateError
            If gradients wait and the updater does not run.
        """
        self._check_waiting()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._queue.join(timeout)
        if self._keeper is not None:
            self._keeper.wait(None if deadline is None else deadline - time.monotonic(), self._check_waiting)
        self._guard.report()

    def destroy(self) -> None:
        """Stop the updater without applying what is queued, and drop queue and parameters.

        Every later call of a method raises `Destroyed`, except this one, which does what is left to do if Ctrl-C has
        ended the one before, and else nothing. With `data` the folder keeps all for the next object.

        Raises
        ------
        CheckpointError
            If the disk does not take what was not written yet.
        """
        self._guard.is_destroyed = True
        if self._is_empty or self._guard.is_bound_elsewhere:  # in a child the threads are not there
            return
        # Ctrl-C may end each of these waits. Parameters and queue stay until the last checkpoint, which copies them.
        self._updater.end(drain=False, timeout=None)
        try:
            if self._keeper is not None:
                self._keeper.close()
        except CheckpointError:
            self._drop_all()
            raise
        self._drop_all()
        self._guard.report()

    def __enter__(self) -> Self:
        self._guard.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            try:
                if error is None and self._queue.running and not self._guard.is_destroyed:
                    self.flush()  # what was added in the block counts, if it ends well
            finally:
                self.destroy()
        except (GradientRefused, UpdaterFailed, CheckpointError):
            if error is None:  # otherwise the caller has a worse problem
                raise

    def _drop_all(self) -> None:
        self._queue.recorder = None
        self._queue.clear()
        with self._turn:
            self._holder.clear()
            self._holder.close()
        self._is_empty = True

    def _check_waiting(self) -> None:
        """Raise in a caller that waits, if there is no point any more."""
        self._guard.check_waiting()
        if self._keeper is not None:
            self._keeper.check()

    def _apply(self, step: list[QueuedGradient]) -> None:
        with self._turn:
            if self._holder.layout is None:  # taken away since
                self._queue.put_back(step)
            elif self._keeper is None:
                apply_together(self._holder, step, self._weighing, self._reports.add_refusal)
            else:
                self._keeper.apply(step, self._reports.add_refusal)
