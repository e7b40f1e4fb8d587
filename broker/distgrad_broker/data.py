"""A broker's data folder: opened, recovered, and told apart from what the broker was started with this time."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack

from distgrad import log, policies
from distgrad.durable.books import Recovered
from distgrad.durable.checkpoint_file import CheckpointWriter
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.checkpoint_state import pack_state
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import Disk
from distgrad.durable.disk_writer import RETRY_S, DiskWriter
from distgrad.durable.journal import Journal, resume
from distgrad.durable.recovery import recover
from distgrad.errors import CheckpointError, DataDamaged
from distgrad.holder import ParameterHolder
from distgrad.malloc import keep_freed_memory
from distgrad.policies import Policy, Weighing
from distgrad.rules import Rule
from distgrad_broker.config import BrokerConfig
from distgrad_broker.core_settings import JOURNAL, NONE, DataSettings

_LOGGER = logging.getLogger("distgrad_broker")

# A long recovery tells how far it is this often.
PROGRESS_S = 2.0
# What the system says where room is missing: that can be mended while the broker waits.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_HOW_TO_GO_BACK_AGAIN = "--recover-until counts once, and again after a start without it"


class OpenData(NamedTuple):
    """A data folder in use.

    Attributes
    ----------
    recovered : Recovered
        What was found.
    settings : DataSettings
        For the core.
    writer : DiskWriter
        For the file thread; it closes the folder.
    policy, weighing : Policy, Weighing
        In force: the recovered ones, unless the broker was started with others than the last time.
    """

    recovered: Recovered
    settings: DataSettings
    writer: DiskWriter
    policy: Policy
    weighing: Weighing


def open_data(
    config: BrokerConfig,
    disk: Disk,
    holder: ParameterHolder,
    policy: Policy,
    *,
    salt: int | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> OpenData:
    """Open the data folder, and bring the holder to where the last broker left it.

    Parameters
    ----------
    config : BrokerConfig
        With a data folder.
    disk : Disk
        Where it is.
    holder : ParameterHolder
        Without parameters, with mode and rule as the broker was started.
    policy : Policy
        As the broker was started.
    salt : int, optional
        Of the journal; by default a random one.
    pause : callable
        Called with seconds to wait while the disk has no room for the journal.

    Returns
    -------
    OpenData
        Whose writer must be closed.

    Raises
    ------
    ConfigError
        If the folder is a file.
    CheckpointError
        If it is in use, damaged, or of a newer version.
    """
    path = os.fspath(config.data) if config.data is not None else ""
    keep_freed_memory()  # as for messages: the pieces of a journal that are read are as large
    started_with = _started_with(holder, policy, config.weighing())
    mode, rule = holder.mode, holder.rule
    folder = DataFolder(disk, path)
    try:
        folder.clean()
        until = _version_to_go_back_to(folder, config.recover_until)
        try:
            recovered = recover(disk, folder, holder, until=until, on_progress=_progress())
        except DataDamaged as damage:
            if until != config.recover_until:
                damage.hint = f"{damage.hint}; {_HOW_TO_GO_BACK_AGAIN}"
            raise
        for damaged, reason in recovered.damaged:
            log.event(_LOGGER, logging.ERROR, "checkpoint is damaged, an older one is used", path=damaged, why=reason)
        for place, offset in recovered.skipped:
            log.event(
                _LOGGER, logging.WARNING, "journal is damaged where a checkpoint covers it: nothing is lost",
                path=place, offset=offset,
            )  # fmt: skip
        others = recovered.executors - {holder.executor}
        if others:
            log.event(
                _LOGGER, logging.WARNING, "recovered by another executor than before: it may round otherwise",
                executor=holder.executor, before=",".join(sorted(others)),
            )  # fmt: skip
        if until is not None:
            recovered = _set_aside(disk, folder, holder, recovered, until)
            folder.note_going_back(until)
        policy, weighing = _settle_settings(config, holder, recovered, started_with, mode, rule, policy)
        durability = config.durability or JOURNAL
        journal = None
        if durability != NONE:
            journal = _resume(disk, path, recovered, config.segment_bytes, salt, pause)
    except OSError as error:
        folder.close()
        raise CheckpointError(f"cannot use the data folder {path}: {error.strerror or error}") from error
    except BaseException:
        folder.close()
        raise
    sync_s, sync_bytes = config.sync_pace()
    return OpenData(
        recovered,
        DataSettings(
            durability=durability,
            every_s=config.checkpoint_every,
            every_updates=config.checkpoint_updates,
            every_bytes=config.checkpoint_journal,
            started_with=started_with,
            sequence=recovered.sequence,
        ),
        DiskWriter(
            disk,
            folder,
            journal,
            sync_s=sync_s,
            sync_bytes=sync_bytes,
            keep=config.keep_checkpoints,
            first_needed=recovered.first_needed,
        ),
        policy,
        weighing,
    )


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


def _settle_settings(
    config: BrokerConfig,
    holder: ParameterHolder,
    recovered: Recovered,
    started_with: dict[str, Any],
    mode: str,
    rule: Rule | None,
    policy: Policy,
) -> tuple[Policy, Weighing]:
    """Decide between what was in force and what the broker is started with: who changes a setting means it."""
    books = recovered.books
    if not books.incarnation:
        return policy, config.weighing()
    changed = {name for name, value in started_with.items() if books.settings.get(name) != value}
    if changed:
        log.event(_LOGGER, logging.INFO, "started with other settings than before", changed=",".join(sorted(changed)))
    if "mode" in changed:
        holder.set_mode(mode)
    if "rule" in changed:
        holder.replace_rule(rule)
    weighing = config.weighing()
    if "weighing" not in changed and books.weighing:
        weighing = Weighing(**books.weighing)
    if "policy" in changed:
        if books.policy is not None and books.policy[0] != policy.name:
            books.policy_memory, books.policy_step = {}, {}
    elif books.policy is not None:
        name, settings = books.policy
        if [name, settings] != started_with["policy"]:
            policy = policies.build(name, {key: value for key, value in settings.items() if value is not None})
    return policy, weighing


def _resume(
    disk: Disk,
    path: str,
    recovered: Recovered,
    segment_bytes: int,
    salt: int | None,
    pause: Callable[[float], None],
) -> Journal:
    """Go on with the journal; on a full disk wait for room, as a broker does that runs."""
    was_full = False
    while True:
        try:
            journal = resume(
                disk, path, next_sequence=recovered.sequence + 1, vouched=recovered.vouched,
                segment_bytes=segment_bytes, salt=salt,
            )  # fmt: skip
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            if not was_full:
                phrase = "the disk is full, the broker starts as soon as there is room for the journal"
                log.event(_LOGGER, logging.ERROR, phrase, data=path, reason=error.strerror)
                was_full = True
            pause(RETRY_S)
        else:
            if was_full:
                log.event(_LOGGER, logging.INFO, "the disk takes the journal again", data=path)
            return journal


def _version_to_go_back_to(folder: DataFolder, asked: int | None) -> int | None:
    """Let `recover_until` count once: left in a unit file, it must not take the run back at every start."""
    if asked is not None and folder.has_gone_back(asked):
        log.event(
            _LOGGER, logging.WARNING, "went back to this version already, goes on from the newest: remove the option",
            recover_until=asked, again=_HOW_TO_GO_BACK_AGAIN,
        )  # fmt: skip
        return None
    folder.note_going_back(None)
    return asked


def _set_aside(disk: Disk, folder: DataFolder, holder: ParameterHolder, recovered: Recovered, until: int) -> Recovered:
    """Make an older version the newest one, and keep what came after it in a folder of its own."""
    if holder.version != until:
        raise CheckpointError(
            f"version {until} is not in {folder.path}: the nearest before it is {holder.version}",
            hint=f"name that one: --recover-until {holder.version}",
        )
    books = recovered.books
    for member in books.members.values():
        # What was accepted and not decided is in the journal that is set aside; its worker sends it again.
        member.accepted, member.cursor = member.decided, member.decided_cursor
    content = pack_state(holder, books, recovered.sequence + 1)
    arenas = [] if holder.storage is None else holder.storage.arenas
    checkpoint = Checkpoint(recovered.sequence, until, content, holder.layout, arenas, holder.state)
    path = folder.checkpoint_path(recovered.sequence, until)
    writer = CheckpointWriter(disk, path, checkpoint)
    while not writer.step():
        pass
    aside = folder.set_aside(path)
    log.event(_LOGGER, logging.WARNING, "went back to an older version", version=until, set_aside=aside)
    return recovered._replace(pending={})


def _progress() -> Callable[[int, int], None]:
    told_at = time.monotonic()

    def tell(records: int, version: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= PROGRESS_S:
            told_at = now
            log.event(_LOGGER, logging.INFO, "recovering", records=records, version=version)

    return tell
