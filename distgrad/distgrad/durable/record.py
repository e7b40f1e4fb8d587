"""One record of the journal: a prefix with a checksum, a header that nobody here reads, padding, a payload, padding.

``docs/journal.md`` has the byte table. Invariants:

- A record takes a multiple of 8 bytes, and a segment's header does too, so records are looked for at every 8th byte. A
  payload begins at one, so that its numbers are used where they lie.
- The checksum is of all that is behind the prefix, padding included, and its seed is one of the rest of the prefix: so
  no bit can change unseen.
- What a record says in ``synced`` was on the disk before the record was made. So a record that is found behind a
  damaged one tells a torn end, which nobody relied on, from damage to what somebody did.
- The salt is one that no peer can know. So a payload that looks like records is not taken for any.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

from xxhash import xxh3_64, xxh3_64_intdigest

MAGIC = 0x4352_4744  # "DGRC" in the file
PREFIX_BYTES = 48
ALIGNMENT_BYTES = 8

# Up to here one more copy of a payload costs less than a checksum in several steps.
_JOIN_UP_TO_BYTES = 8 * 1024

_COVERED = Struct("<IIQQQQ")  # what the checksum covers of the prefix
_PREFIX = Struct("<IIQQQQQ")
_PADDING = [bytes(count) for count in range(ALIGNMENT_BYTES)]

Found = tuple[int, int, int, int, int, int]
"""Sequence, synced and salt of a record; where its header begins and ends, and where its payload ends."""


def pack(header: bytes, parts: Sequence[Any], sequence: int, synced: int, salt: int = 0) -> tuple[list[Any], int]:
    """Make a whole record.

    Parameters
    ----------
    header : bytes
        Anything, less than 4 GiB.
    parts : sequence of buffers of bytes
        The payload's pieces.
    sequence : int
        The record's own number.
    synced : int
        Up to this record everything is known to be on the disk.
    salt : int
        As in the header of its segment, 64 bits.

    Returns
    -------
    list of buffers
        To be written behind one another; the payload's own among them, which must not change before.
    int
        How many bytes they are.
    """
    payload_bytes = sum(map(len, parts))
    covered = _COVERED.pack(MAGIC, len(header), payload_bytes, sequence, synced, salt)
    seed = xxh3_64_intdigest(covered)
    head = header + _PADDING[-len(header) % ALIGNMENT_BYTES]
    tail = _PADDING[-payload_bytes % ALIGNMENT_BYTES]
    if payload_bytes <= _JOIN_UP_TO_BYTES:
        body = b"".join((head, *parts, tail))
        record = covered + xxh3_64_intdigest(body, seed).to_bytes(8, "little") + body
        return [record], len(record)
    digest = xxh3_64(head, seed)
    for part in parts:
        digest.update(part)
    digest.update(tail)
    first = covered + digest.intdigest().to_bytes(8, "little") + head
    return [first, *parts, tail], len(first) + payload_bytes + len(tail)


def unpack(memory: memoryview, offset: int) -> Found | None:
    """Read and check the record at a place.

    Parameters
    ----------
    memory : memoryview
        A segment's bytes.
    offset : int
        Where the record would begin.

    Returns
    -------
    Found or None
        None if there is no whole and undamaged record.
    """
    body = offset + PREFIX_BYTES
    size = len(memory)
    if body > size:
        return None
    magic, header_bytes, payload_bytes, sequence, synced, salt, checksum = _PREFIX.unpack_from(memory, offset)
    header_end = body + header_bytes
    # As `next_offset`, which takes longer: this runs for every record of a recovery.
    end = header_end + -header_end % ALIGNMENT_BYTES + payload_bytes
    following = end + -end % ALIGNMENT_BYTES
    if magic != MAGIC or following > size:
        return None
    seed = xxh3_64_intdigest(memory[offset : offset + _COVERED.size])
    if xxh3_64_intdigest(memory[body:following], seed) != checksum:
        return None
    return sequence, synced, salt, body, header_end, end


def size_claimed(memory: memoryview, offset: int) -> int:
    """Tell how long the record at a place says it is, so that as much can be read before it is checked.

    Parameters
    ----------
    memory : memoryview
        A piece of a segment.
    offset : int
        Where the record would begin.

    Returns
    -------
    int
        Bytes; those of a prefix if there is no prefix of a record.
    """
    if offset + PREFIX_BYTES > len(memory):
        return PREFIX_BYTES
    magic, header_bytes, payload_bytes, *_ = _PREFIX.unpack_from(memory, offset)
    if magic != MAGIC:
        return PREFIX_BYTES
    return next_offset(next_offset(PREFIX_BYTES + header_bytes) + int(payload_bytes))


def next_offset(end: int) -> int:
    """Tell where a payload begins, or the record behind one.

    Parameters
    ----------
    end : int
        Where the header ends, or the payload.

    Returns
    -------
    int
        The next multiple of 8.
    """
    return end + -end % ALIGNMENT_BYTES
