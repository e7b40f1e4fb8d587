"""What a data folder holds, found by reading it; nothing is carried out, changed or locked.

The folder may be in use. What is read while it is written can look damaged: a place that was read too early, with
records behind it that came later, or a file that was removed since it was listed. So trouble counts when it is met
twice in the same way.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from distgrad.durable import described, journal_reader
from distgrad.durable.checkpoint_file import read_checkpoint
from distgrad.durable.data_folder import CheckpointName, DataFolder
from distgrad.durable.described import Told
from distgrad.durable.disk import Disk
from distgrad.durable.journal_reader import StoredRecord
from distgrad.durable.segment import Place, Segment, segments
from distgrad.errors import CheckpointError, DataDamaged

# A folder that is written faster than this many readings in a row can follow is given up.
TRIES = 5

_T = TypeVar("_T")


class ShownRecord(NamedTuple):
    """One record, for display: its sequence, what it tells, and the bytes behind its header."""

    sequence: int
    told: Told
    payload_bytes: int


class Damage(NamedTuple):
    """What is damaged, where in it if that is known, and how."""

    path: str
    offset: int | None
    message: str


@dataclasses.dataclass
class SegmentContent:
    """What one segment holds.

    Attributes
    ----------
    segment : Segment
        Its name, first record and size.
    last : int or None
        Sequence of its last whole record; None if it has none.
    end : int
        Bytes up to the end of that record; behind it is room that is reserved.
    versions : tuple of (int, int) or None
        Version before the first update and after the last one; None if it has no updates.
    """

    segment: Segment
    last: int | None = None
    end: int = 0
    versions: tuple[int, int] | None = None


@dataclasses.dataclass
class Survey:
    """What a data folder holds.

    Attributes
    ----------
    segments : list of SegmentContent
        In order.
    checkpoints : list of (CheckpointName, int)
        With their sizes, newest first.
    kinds : Counter of str
        Records by kind.
    workers : Counter of str
        Gradients by worker.
    outcomes : Counter of str
        What became of gradients.
    payload_bytes : int
        Of all gradients.
    versions : tuple of (int, int) or None
        Version before the first update in the journal and after the last one.
    incarnations : list of dict
        Of each process that began: ``incarnation``, ``executor``, ``distgrad``.
    last : deque of ShownRecord
        The last records, if they were asked for.
    damages : list of Damage
        In the order in which they were found.
    torn : Place or None
        Where the journal's end is torn, which is no damage: nobody relied on what is missing.
    """

    segments: list[SegmentContent] = dataclasses.field(default_factory=list)
    checkpoints: list[tuple[CheckpointName, int]] = dataclasses.field(default_factory=list)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    workers: Counter[str] = dataclasses.field(default_factory=Counter)
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    payload_bytes: int = 0
    versions: tuple[int, int] | None = None
    incarnations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    last: deque[ShownRecord] = dataclasses.field(default_factory=deque)
    damages: list[Damage] = dataclasses.field(default_factory=list)
    torn: Place | None = None


def survey(disk: Disk, folder: DataFolder, *, verify: bool = False, keep_last: int = 0) -> Survey:
    """Read a data folder's journal, and list its checkpoints.

    Parameters
    ----------
    disk : Disk
        Where it is.
    folder : DataFolder
        May be a read-only one.
    verify : bool
        Read the checkpoints as well.
    keep_last : int
        How many of the last records are wanted.

    Returns
    -------
    Survey
        What is there, and what of it is damaged.

    Raises
    ------
    CheckpointError
        If the journal is of another format, or cannot be read.
    """
    found = steadily(lambda: _survey(disk, folder, verify, keep_last))
    for _ in range(TRIES - 1):
        if not found.damages:
            break
        former, found = found, steadily(lambda: _survey(disk, folder, verify, keep_last))
        if found.damages == former.damages:
            break
    return found


def steadily(look: Callable[[], _T]) -> _T:
    """Read something that may be written at the same time.

    Parameters
    ----------
    look : callable
        Reads it.

    Returns
    -------
    object
        What the first call gave that raised nothing.

    Raises
    ------
    CheckpointError
        The error that was raised twice in a row, or as often as is tried at most.
    """
    former = ""
    for attempt in range(1, TRIES + 1):
        try:
            return look()
        except (CheckpointError, OSError) as error:
            if str(error) == former or attempt == TRIES:
                if isinstance(error, OSError):
                    raise CheckpointError(f"cannot read {error.filename}: {error.strerror or error}") from error
                raise
            former = str(error)
    raise AssertionError  # the last attempt returns or raises


def _survey(disk: Disk, folder: DataFolder, verify: bool, keep_last: int) -> Survey:
    found = segments(disk, folder.path)
    contents = {segment.path: SegmentContent(segment) for segment in found}
    result = Survey(list(contents.values()), last=deque(maxlen=keep_last))
    first = found[0].first if found else None
    while first is not None:
        reading = journal_reader.read(disk, folder.path, first)
        damaged: DataDamaged | None = None
        try:
            for record in reading:
                _count(result, contents.get(record.path), record, keep_last)
        except DataDamaged as damage:
            damaged = damage
            result.damages.append(Damage(damage.path, damage.offset, damage.message))
        for end in reading.ends:
            if end.path in contents:
                contents[end.path].end = max(contents[end.path].end, end.offset)
        result.torn = reading.torn
        first = None if damaged is None else _first_behind(found, damaged.path, reading.next_sequence)
    for name in folder.checkpoints():
        result.checkpoints.append((name, disk.size(name.path)))
        if verify:
            _verify(disk, folder, name, result)
    return result


def _first_behind(found: list[Segment], path: str, at_least: int) -> int | None:
    """Give the first record of the next segment that begins behind a damaged one."""
    places = [number for number, segment in enumerate(found) if segment.path == path]
    behind = found[places[0] + 1 :] if places else []
    return next((segment.first for segment in behind if segment.first >= at_least), None)


def _count(result: Survey, content: SegmentContent | None, record: StoredRecord, keep_last: int) -> None:
    told = described.read_header(record.header)
    result.kinds[told.kind] += 1
    shown = ShownRecord(record.sequence, told, len(record.payload))
    if keep_last:
        result.last.append(shown)
    before = after = None
    if told.kind == described.GRADIENT:
        inline = told.message.get("payload")
        result.workers[told.message["worker"]] += 1
        result.payload_bytes += len(record.payload) + (len(inline) if isinstance(inline, bytes) else 0)
    elif told.kind == described.DECIDED:
        before = after = told.message["version"]
        for outcome, gradients, _ in described.decisions(told.message):
            result.outcomes[outcome] += len(gradients)
            after += outcome == "applied"
    elif told.kind == "set":
        before = after = told.message["version"]
    elif told.kind == "began":
        result.incarnations.append({key: told.message[key] for key in ("incarnation", "executor", "distgrad")})
    if before is not None and after is not None:
        result.versions = _joined(result.versions, before, after)
    if content is not None:
        content.last = record.sequence
        if before is not None and after is not None:
            content.versions = _joined(content.versions, before, after)


def _joined(versions: tuple[int, int] | None, before: int, after: int) -> tuple[int, int]:
    return (before, after) if versions is None else (min(versions[0], before), max(versions[1], after))


def _verify(disk: Disk, folder: DataFolder, name: CheckpointName, result: Survey) -> None:
    try:
        checkpoint = read_checkpoint(disk, name.path)
        if (checkpoint.sequence, checkpoint.version) != name[:2]:
            path = folder.checkpoint_path(checkpoint.sequence, checkpoint.version)
            raise DataDamaged(f"{name.path} was renamed: it is {path}", path=name.path, offset=0)
    except DataDamaged as damage:
        result.damages.append(Damage(name.path, damage.offset, damage.message))
    except CheckpointError as error:
        result.damages.append(Damage(name.path, None, error.message))
