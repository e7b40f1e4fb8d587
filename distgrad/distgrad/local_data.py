"""The data folder of one process: opened and recovered, and told apart from what the process was started with."""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

import msgpack

from distgrad import log
from distgrad.durable.books import Recovered
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import Disk
from distgrad.durable.disk_writer import DiskWriter
from distgrad.durable.journal import resume
from distgrad.durable.recovery import recover
from distgrad.durable.segment import segments
from distgrad.errors import CheckpointError, ConfigError, DataFolderInUse
from distgrad.gradient_queue import QueuedGradient
from distgrad.holder import ParameterHolder
from distgrad.local_books import LOCAL, LocalBooks
from distgrad.policies import Policy, Weighing

KEEP_CHECKPOINTS = 2

_LOGGER = logging.getLogger(__name__)


class LocalData(NamedTuple):
    """A data folder in use.

    Attributes
    ----------
    books : LocalBooks
        Going on from what was recovered; that this process began is noted.
    writer : DiskWriter
        For the file thread; it closes the folder.
    queued : list of QueuedGradient
        Gradients that were added and not decided on.
    refused : dict of str to int
        How many were refused so far, by reason.
    journal_bytes : int
        Journal behind the newest checkpoint; 0 if that has everything.
    """

    books: LocalBooks
    writer: DiskWriter
    queued: list[QueuedGradient]
    refused: dict[str, int]
    journal_bytes: int


def open_data(path: str, disk: Disk, holder: ParameterHolder, policy: Policy, weighing: Weighing) -> LocalData:
    """Open a data folder, and bring the holder to where the last process left it.

    A mode, or a rule, that is another than the last process was started with wins; otherwise those are in force that
    were in force at its end.

    Parameters
    ----------
    path : str
        The folder; made if it is not there.
    disk : Disk
        Where it is.
    holder : ParameterHolder
        Without parameters, with mode and rule as the process was started.
    policy, weighing : Policy, Weighing
        How gradients become updates.

    Returns
    -------
    LocalData
        Whose writer must be closed.

    Raises
    ------
    ConfigError
        If the path leads to a file, or the folder is that of a broker with workers.
    CheckpointError
        If it is in use, damaged, or of a newer version.
    """
    settings = _started_with(holder, policy, weighing)
    mode, rule = holder.mode, holder.rule
    try:
        folder = DataFolder(disk, path)
    except DataFolderInUse as error:
        error.hint = "end the process that has it, or destroy() the DistributedGradients of this one; or name another"
        raise
    try:
        folder.clean()
        recovered = recover(disk, folder, holder)
        _check_is_ours(path, recovered)
        _warn(recovered, holder)
        if recovered.books.incarnation:
            if recovered.books.settings.get("mode") != settings["mode"]:
                holder.set_mode(mode)
            if recovered.books.settings.get("rule") != settings["rule"]:
                holder.replace_rule(rule)
        journal_bytes = _bytes_behind(disk, folder, recovered)
        journal = resume(disk, path, next_sequence=recovered.sequence + 1, vouched=recovered.vouched)
    except OSError as error:
        folder.close()
        raise CheckpointError(f"cannot use the data folder {path}: {error.strerror or error}") from error
    except BaseException:
        folder.close()
        raise
    books = LocalBooks(recovered, holder.version, os.urandom(8).hex(), settings)
    books.began(holder.executor)
    books.configured(holder.mode, holder.rule, policy, weighing)
    queued = [
        QueuedGradient(gradient.number, None, gradient, gradient.cursor) for gradient in recovered.pending.values()
    ]
    writer = DiskWriter(disk, folder, journal, keep=KEEP_CHECKPOINTS, first_needed=recovered.first_needed)
    return LocalData(books, writer, queued, dict(recovered.books.refused), journal_bytes)


def _started_with(holder: ParameterHolder, policy: Policy, weighing: Weighing) -> dict[str, Any]:
    """Give the settings that decide what an update does, as they come back from a file."""
    rule = holder.rule
    settings = {
        "mode": holder.mode,
        "rule": None if rule is None else [rule.name, rule.settings()],
        "policy": [policy.name, policy.settings()],
        "weighing": weighing.settings(),
    }
    unpacked: dict[str, Any] = msgpack.unpackb(msgpack.packb(settings))
    return unpacked


def _check_is_ours(path: str, recovered: Recovered) -> None:
    others = sorted(worker for worker in recovered.books.members if worker != LOCAL)
    if others:
        raise ConfigError(
            f"{path} is the data folder of a broker, with the workers {', '.join(map(repr, others[:4]))}",
            hint="start a broker on it, or take the parameters out with `distgrad replay`",
        )


def _warn(recovered: Recovered, holder: ParameterHolder) -> None:
    for path, error in recovered.damaged:
        log.event(_LOGGER, logging.ERROR, "checkpoint is damaged, an older one is used", path=path, why=error)
    for place, offset in recovered.skipped:
        log.event(
            _LOGGER, logging.WARNING, "journal is damaged where a checkpoint covers it: nothing is lost",
            path=place, offset=offset,
        )  # fmt: skip
    others = recovered.executors - {holder.executor} if recovered.records else ()
    if others:
        log.event(
            _LOGGER, logging.WARNING, "updates were repeated by another executor, bits may differ by rounding",
            computed_by=",".join(sorted(others)), repeated_by=holder.executor,
        )  # fmt: skip


def _bytes_behind(disk: Disk, folder: DataFolder, recovered: Recovered) -> int:
    """Give the size of the segments that a recovery reads; those that are still open are not full."""
    if not recovered.records:
        return 0
    after = recovered.vouched
    found = segments(disk, folder.path)
    ends = [*(segment.first for segment in found[1:]), recovered.sequence + 1]
    return max(1, sum(segment.size for segment, end in zip(found, ends, strict=False) if end > after + 1))
