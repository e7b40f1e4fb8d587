"""One record of the journal: a prefix with a checksum, a header that nobody here reads, a payload, padding.

``docs/journal.md`` has the byte table. Invariants:

- A record takes a multiple of 8 bytes, and a segment's header does too, so records are looked for at every 8th byte.
- The checksum covers everything but the padding, and the padding is zeros, so that no bit can change unseen.
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
"""Sequence, synced and salt of a record; where its header begins, its payload begins, its payload ends."""


def pack_prefix(header: bytes, parts: Sequence[Any], sequence: int, synced: int, salt: int = 0) -> bytes:
    """Make what stands before a record's header.

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
    bytes
        `PREFIX_BYTES` of them.
    """
    payload_bytes = sum(map(len, parts))
    covered = _COVERED.pack(MAGIC, len(header), payload_bytes, sequence, synced, salt)
    if payload_bytes <= _JOIN_UP_TO_BYTES:
        checksum = xxh3_64_intdigest(b"".join((covered, header, *parts)))
    else:
        digest = xxh3_64(covered + header)
        for part in parts:
            digest.update(part)
        checksum = digest.intdigest()
    return covered + checksum.to_bytes(8, "little")


def pack(header: bytes, parts: Sequence[Any], sequence: int, synced: int, salt: int = 0) -> tuple[list[Any], int]:
    """Make a whole record; see `pack_prefix` for the parameters.

    Parameters
    ----------
    header, parts, sequence, synced, salt : bytes, sequence of buffers, int, int, int
        What the record holds.

    Returns
    -------
    list of buffers
        To be written behind one another; the payload's own among them, which must not change before.
    int
        How many bytes they are.
    """
    prefix = pack_prefix(header, parts, sequence, synced, salt)
    size = PREFIX_BYTES + len(header) + sum(map(len, parts))
    padding = _PADDING[-size % ALIGNMENT_BYTES]
    return [prefix + header, *parts, padding], size + len(padding)


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
    if body > len(memory):
        return None
    magic, header_bytes, payload_bytes, sequence, synced, salt, checksum = _PREFIX.unpack_from(memory, offset)
    payload = body + header_bytes
    end = payload + payload_bytes
    following = next_offset(end)
    if magic != MAGIC or following > len(memory):
        return None
    digest = xxh3_64(memory[offset : offset + _COVERED.size])
    digest.update(memory[body:end])
    if digest.intdigest() != checksum or memory[end:following] != _PADDING[following - end]:
        return None
    return sequence, synced, salt, body, payload, end


def next_offset(end: int) -> int:
    """Tell where the record behind one begins.

    Parameters
    ----------
    end : int
        Where the payload of that one ends.

    Returns
    -------
    int
        The next multiple of 8.
    """
    return end + -end % ALIGNMENT_BYTES
