"""Between the in-process class and its data folder: every change of queue and parameters is noted as it is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from distgrad.arrays import lasting_empty
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.checkpoint_state import pack_state
from distgrad.durable.disk import Disk, OsDisk
from distgrad.durable.disk_events import WriteCheckpoint
from distgrad.errors import GradientRefused
from distgrad.gradient_queue import QueuedGradient
from distgrad.holder import ParameterHolder
from distgrad.local_data import open_data
from distgrad.local_journal import LocalJournal
from distgrad.policies import Asynchronous, Policy, Weighing
from distgrad.queued_updates import apply_together
from distgrad.reports import Reports


class LocalKeeper:
    """Keeps what happens within one process in a data folder. A `Recorder` of the queue.

    Parameters
    ----------
    path : path
        The folder; made if it is not there.
    holder : ParameterHolder
        As it was started; brought to where the last process left it.
    turn : context manager
        Who has it may read and change the holder; the file thread takes it for a checkpoint.
    policy, weighing : Policy or None, Weighing
        How gradients become updates.
    reports : Reports
        Is told how many gradients were refused before. After a failure no checkpoint is made.
    on_written : callable
        Called on the file thread when the disk has got further.
    disk : Disk, optional
        Where the folder is; by default on this machine.

    Attributes
    ----------
    queued : list of QueuedGradient
        What was recovered of the queue.
    added_before : int
        Number of the last gradient that was recovered.

    Raises
    ------
    ConfigError
        If the path leads to a file, or the folder is a broker's.
    CheckpointError
        If it is in use, damaged, or of a newer version.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        holder: ParameterHolder,
        turn: AbstractContextManager[object],
        policy: Policy | None,
        weighing: Weighing,
        reports: Reports,
        on_written: Callable[[], None],
        disk: Disk | None = None,
    ) -> None:
        self._holder = holder
        self._turn = turn
        self._policy = policy or Asynchronous()
        self._weighing = weighing
        self._reports = reports
        self._unfinished: list[int] = []
        try:
            data = open_data(os.fspath(path), disk or OsDisk(), holder, self._policy, weighing)
        finally:
            holder.close()  # the threads that helped to repeat updates
        self.queued = data.queued
        reports.add_counts(data.refused)
        self.added_before = data.books.accepted_number
        self._journal = LocalJournal(data.books, data.writer, self._snapshot, on_written, data.journal_bytes)
        self._journal.start()

    @property
    def behind(self) -> int:
        """Gradients that are not on the disk yet."""
        return self._journal.behind

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written at the moment."""
        return self._journal.trouble

    @property
    def settled(self) -> int:
        """Highest number up to which all gradients are decided on, and the disk knows."""
        return self._journal.settled

    @property
    def cursor(self) -> bytes | str | None:
        """Cursor of the last gradient that is on the disk."""
        return self._journal.cursor

    def added(self, gradient: QueuedGradient) -> None:
        """Note that a gradient was added.

        Parameters
        ----------
        gradient : QueuedGradient
            Its arrays do not change any more.

        Raises
        ------
        LayoutError
            If there are no parameters yet, and it has too many leaves to be kept without.
        """
        with self._journal.noting() as books:
            books.accepted(*gradient)

    def cleared(self, gradients: Iterable[QueuedGradient]) -> None:
        """Note that gradients were dropped.

        Parameters
        ----------
        gradients : iterable of QueuedGradient
            Which.
        """
        with self._journal.noting() as books:
            books.cleared(gradient.number for gradient in gradients)

    def apply(self, step: Sequence[QueuedGradient], refuse: Callable[[GradientRefused], None]) -> None:
        """Make one update, and note what became of its gradients. The caller has the turn.

        Parameters
        ----------
        step, refuse : sequence of QueuedGradient, callable
            As for `apply_together`.
        """

        def note_refusal(refusal: GradientRefused) -> None:
            with self._journal.noting() as books:
                books.refused(refusal)
            refuse(refusal)

        def note_update(numbers: Sequence[int], weights: Sequence[float] | None) -> None:
            with self._journal.noting() as books:
                books.applied(numbers, weights)

        # If that fails they stay undecided: the next process applies them to parameters that are whole.
        self._unfinished = [gradient.number for gradient in step]
        apply_together(self._holder, step, self._weighing, note_refusal, note_update)
        self._unfinished = []

    def configured(self) -> None:
        """Note by what updates are made from now on. The caller has the turn."""
        with self._journal.noting() as books:
            books.configured(self._holder.mode, self._holder.rule, self._policy, self._weighing)

    def replaced(self) -> None:
        """Note that the parameters were replaced or taken away. The caller has the turn."""
        layout = self._holder.layout
        arenas = _copied_arenas(self._holder)
        with self._journal.noting() as books:
            books.cleared(self._unfinished)
            if layout is None:
                books.taken_away()
            else:
                books.replaced(layout, arenas)
        self._unfinished = []

    def check(self) -> None:
        """Raise if nothing will ever be kept any more.

        Raises
        ------
        CheckpointError
            If the file thread ended by an error.
        """
        self._journal.check()

    def wait(self, timeout: float | None, check: Callable[[], None]) -> None:
        """Wait until all that was noted is on the disk.

        Parameters
        ----------
        timeout, check : float or None, callable
            As for `LocalJournal.wait`.

        Raises
        ------
        TimeoutError
            If it takes longer.
        CheckpointError
            If the file thread ended by an error.
        """
        self._journal.wait(timeout, check)

    def close(self) -> None:
        """Write all, and a last checkpoint; give the folder back. Nobody has the turn.

        A call that was interrupted may be repeated; until one has ended, parameters and queue must stay as they are.

        Raises
        ------
        CheckpointError
            If something is not on the disk.
        """
        self._journal.close()

    def _snapshot(self, ticket: int) -> WriteCheckpoint | None:
        holder = self._holder
        with self._turn:
            if self._reports.has_failure:
                return None
            with self._journal.noting() as books:
                sequence, first_needed, kept = books.for_checkpoint()
            content = pack_state(holder, kept, first_needed)
            slots = {slot: [_copy(array) for array in arrays] for slot, arrays in holder.state.items()}
            arenas = _copied_arenas(holder)
            checkpoint = Checkpoint(sequence, holder.version, content, holder.layout, arenas, slots)
        return WriteCheckpoint(ticket, checkpoint, first_needed)


def _copied_arenas(holder: ParameterHolder) -> list[np.ndarray[Any, Any]]:
    layout, storage = holder.layout, holder.storage
    if layout is None or storage is None:
        return []
    if storage.adopted is not None:
        return layout.pack(layout.nest(storage.leaves()))
    return [_copy(arena) for arena in storage.arenas]


def _copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    copy = lasting_empty(array.size, array.dtype)
    np.copyto(copy, array)
    return copy
