"""Going on where a process stopped: the newest whole checkpoint, then the journal behind it."""

from __future__ import annotations

from collections.abc import Callable

from distgrad.durable import journal_reader
from distgrad.durable.books import Books, Recovered
from distgrad.durable.checkpoint_state import computed_by, restore
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import Disk
from distgrad.durable.replay import Replay, ReplayFailed, recut
from distgrad.errors import DataDamaged
from distgrad.holder import ParameterHolder

# Progress is told about this often, in records.
_REPORT_EVERY = 4096


def recover(
    disk: Disk,
    folder: DataFolder,
    holder: ParameterHolder,
    *,
    until: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recovered:
    """Bring a holder to the last state that a data folder knows.

    Parameters
    ----------
    disk : Disk
        Where the folder is.
    folder : DataFolder
        Locked by this process.
    holder : ParameterHolder
        Without parameters; its rule is replaced by the recorded one.
    until : int, optional
        The version to stop at.
    on_progress : callable, optional
        Told now and then how many records were carried out, and the version.

    Returns
    -------
    Recovered
        Everything beside the holder.

    Raises
    ------
    DataDamaged
        If the journal is damaged before its end.
    CheckpointError
        If what is there cannot be used.
    """
    found, damaged = folder.newest_whole(until)
    books = Books()
    first = 1
    after = 0
    if found is not None:
        books, first = restore(holder, found)
        after = found.sequence
    replay = Replay(holder, books, until)
    if found is not None:
        replay.executors.add(computed_by(found))
    reading = journal_reader.read(disk, folder.path, first, vouched=after)
    count = n_bytes = 0
    try:
        for record in reading:
            if record.sequence <= after:
                replay.remember(record.header, record.payload, record.sequence)
                continue
            replay.execute(record.header, record.payload, record.sequence)
            if replay.is_done:
                break
            count += 1
            n_bytes += len(record.header) + len(record.payload)
            if on_progress is not None and count % _REPORT_EVERY == 0:
                on_progress(count, holder.version)
    except DataDamaged as damage:
        if holder.version != until:  # else all that was asked for is there
            damage.hint = _choices(holder.version)
            raise
    except ReplayFailed as failure:
        raise DataDamaged(
            f"record {record.sequence} cannot be carried out: {failure.message}",
            path=record.path,
            offset=record.offset,
            hint=_choices(holder.version),
        ) from failure
    is_new = found is None and not books.incarnation
    if damaged and until is None and (is_new or books.durability == "checkpoint"):
        # No journal leads to what was settled by this one.
        path, why = damaged[0]
        older = "" if found is None else f", or give up what came later: --recover-until {found.version}"
        hint = f"restore it from a copy{older}"
        raise DataDamaged(f"{path} is damaged, and gradients were settled by it: {why}", path=path, offset=0, hint=hint)
    if until is None:
        _check_queue(replay, folder.path)
    if holder.layout is not None:
        for gradient in replay.pending.values():
            recut(holder.layout, gradient)
    for gradient in replay.pending.values():
        # Of their own, so that they do not keep a whole segment in memory.
        gradient.parts = [bytes(part) for part in gradient.parts]
    sequence = max(after, reading.next_sequence - 1)
    return Recovered(
        replay.books,
        replay.pending,
        sequence,
        count,
        None if found is None else (found.sequence, found.version),
        damaged,
        frozenset(replay.executors),
        holder.layout is not None,
        None if found is None else first,
        n_bytes,
        reading.skipped,
        replay.is_forked,
    )


def _check_queue(replay: Replay, path: str) -> None:
    """Stop where accepted gradients are missing: their workers will not send them again."""
    for member in replay.books.members.values():
        numbers = range(member.decided + 1, member.accepted + 1)
        missing = [n for n in numbers if (member.worker, n) not in replay.pending and n not in member.ahead]
        if missing:
            raise DataDamaged(
                f"gradient {missing[0]} of {member.worker!r} was in the queue, and is not in the journal of {path}",
                path=path,
                offset=0,
                hint=f"copy the journal beside the checkpoint, or use --recover-until {replay.holder.version}",
            )


def _choices(version: int) -> str:
    return (
        f"version {version} is the last whole one: go on from there with --recover-until {version} "
        "(what came after it is set aside), or from an older checkpoint with its version"
    )
