"""Segments: the files that a journal is cut into, their names and what stands at their beginning.

That a segment is there says that all records before its first were on the disk when it was made: the journal syncs
one segment before it makes the next. Two segments begin with the same record if the first of them was given up before
it held anything for certain; what both have is then the same.
"""

from __future__ import annotations

import os
import re
from struct import Struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from distgrad.durable.disk import Disk

FORMAT = 1
"""Version of the journal's format that is written."""
HEADER_BYTES = 64

_MAGIC = b"DGJOURNL"
_COVERED = Struct("<8sI4xQQ24x")  # what the checksum covers
_HEADER = Struct("<8sI4xQQ24xQ")
_NAME = re.compile(r"journal-([0-9]{20})(?:-([0-9]{1,9}))?\.log")


class Segment(NamedTuple):
    """A file of the journal.

    Attributes
    ----------
    path : str
        The file.
    first : int
        Sequence of its first record.
    size : int
        Bytes of the file, with the room that is reserved in it.
    attempt : int
        Which one it is of those that begin with this record; 0 for the first.
    """

    path: str
    first: int
    size: int
    attempt: int = 0


class Place(NamedTuple):
    """Where something is in the journal.

    Attributes
    ----------
    path : str
        The file.
    offset : int
        Bytes from its beginning.
    """

    path: str
    offset: int


def segments(disk: Disk, folder: str) -> list[Segment]:
    """List a journal's files.

    Parameters
    ----------
    disk : Disk
        Where they are.
    folder : str
        Other files in it are of no concern.

    Returns
    -------
    list of Segment
        In the order of their records.

    Raises
    ------
    OSError
        If the folder cannot be read.
    """
    found = [match for match in map(_NAME.fullmatch, disk.list(folder)) if match]
    beginning = os.path.join(folder, "")
    ordered = sorted((int(match[1]), int(match[2] or 0), beginning + match[0]) for match in found)
    return [Segment(path, first, disk.size(path), attempt) for first, attempt, path in ordered]


def segment_name(first: int, attempt: int) -> str:
    """Name the file of a segment.

    Parameters
    ----------
    first : int
        Sequence of its first record, 0 to 2**64 - 1.
    attempt : int
        How many others begin with the same record.

    Returns
    -------
    str
        Without the folder.
    """
    return f"journal-{first:020d}-{attempt}.log" if attempt else f"journal-{first:020d}.log"


def pack_header(first: int, salt: int) -> bytes:
    """Make the beginning of a segment.

    Parameters
    ----------
    first : int
        Sequence of its first record.
    salt : int
        What its records carry to be told from bytes that only look like records, 64 bits.

    Returns
    -------
    bytes
        `HEADER_BYTES` of them.
    """
    covered = _COVERED.pack(_MAGIC, FORMAT, first, salt)
    return covered + xxh3_64_intdigest(covered).to_bytes(8, "little")


def unpack_header(memory: memoryview) -> tuple[int, int, int] | None:
    """Read and check the beginning of a segment.

    Parameters
    ----------
    memory : memoryview
        The segment's bytes.

    Returns
    -------
    (int, int, int) or None
        Version of the format, first sequence and salt; None if there is no whole and undamaged header.
    """
    if len(memory) < HEADER_BYTES:
        return None
    magic, version, first, salt, checksum = _HEADER.unpack_from(memory)
    if magic != _MAGIC or xxh3_64_intdigest(memory[: _COVERED.size]) != checksum:
        return None
    return version, first, salt
