"""One record and one segment header: every byte is as docs/journal.md says, and none can change unseen."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from distgrad.durable import record, segment

BUFFERS = st.lists(st.binary(max_size=100), max_size=4)


def packed(header: bytes, parts: list[Any], sequence: int = 7, synced: int = 5, salt: int = 3) -> bytes:
    buffers, size = record.pack(header, parts, sequence, synced, salt)
    data = b"".join(buffers)
    assert len(data) == size
    return data


def test_the_bytes_are_those_of_the_table() -> None:
    data = packed(b"head", [b"pay", b"load!"], 2**40, 2**33, 2**63)

    assert data[:40] == struct.pack("<4sIQQQQ", b"DGRC", 4, 8, 2**40, 2**33, 2**63)
    assert data[40:48] == struct.pack("<Q", xxh3_64_intdigest(data[48:], xxh3_64_intdigest(data[:40])))
    assert data[48:] == b"head" + bytes(4) + b"payload!"
    assert packed(b"eight888", [b"p"])[48:] == b"eight888" + b"p" + bytes(7)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    header=st.binary(max_size=50),
    parts=BUFFERS,
    numbers=st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
    before=st.integers(0, 5),
)
def test_any_record_is_found_as_it_was_packed(
    header: bytes, parts: list[bytes], numbers: tuple[int, int, int], before: int
) -> None:
    offset = before * record.ALIGNMENT_BYTES
    memory = memoryview(bytes(offset) + packed(header, parts, *numbers) + b"more")

    found = record.unpack(memory, offset)

    assert found is not None
    assert found[:3] == numbers
    body, header_end, end = found[3:]
    assert memory[body:header_end] == header
    assert memory[record.next_offset(header_end) : end] == b"".join(parts)
    assert record.next_offset(end) == len(memory) - 4
    assert record.size_claimed(memory, offset) == len(memory) - 4 - offset


@pytest.mark.parametrize("size", [0, 1, 8000, 8192, 8193, 100_000])
def test_the_checksum_is_the_same_however_the_payload_is_cut(size: int) -> None:
    payload = np.arange(size, dtype=np.uint8)

    whole = packed(b"head", [payload.data])
    cut = packed(b"head", [payload[:3].tobytes(), b"", payload[3:].data])

    assert whole == cut


@pytest.mark.parametrize("size", [0, 5, 8, 20_000])
@pytest.mark.parametrize("header", [b"", b"header", b"header88"])
def test_a_change_of_any_byte_is_found(header: bytes, size: int) -> None:
    data = bytearray(packed(header, [bytes(size)]))
    places = [*range(min(len(data), 100)), *range(100, len(data), 997), *range(len(data) - 9, len(data))]

    for place in places:
        data[place] ^= 0x10
        assert record.unpack(memoryview(data), 0) is None, place
        data[place] ^= 0x10
    assert record.unpack(memoryview(data), 0) is not None


def test_a_record_that_is_cut_anywhere_is_none() -> None:
    memory = memoryview(packed(b"head", [b"payload"]))

    assert [size for size in range(len(memory) + 1) if record.unpack(memory[:size], 0)] == [len(memory)]


def test_where_there_is_no_prefix_the_size_of_one_is_claimed() -> None:
    memory = memoryview(packed(b"head", [b"payload"]))

    assert record.size_claimed(memory, 8) == record.PREFIX_BYTES
    assert record.size_claimed(memory[:47], 0) == record.PREFIX_BYTES


@pytest.mark.parametrize("fields", [(2**32 - 1, 0), (0, 2**64 - 1), (2**32 - 1, 2**64 - 1)])
def test_impossible_lengths_are_none(fields: tuple[int, int]) -> None:
    data = struct.pack("<IIQQQQQ", record.MAGIC, *fields, 1, 0, 0, 0) + bytes(100)

    assert record.unpack(memoryview(data), 0) is None
    assert record.size_claimed(memoryview(data), 0) >= sum(fields)


def test_a_segments_header_comes_back() -> None:
    data = segment.pack_header(2**64 - 1, 2**63)

    assert len(data) == segment.HEADER_BYTES
    assert data[:8] == b"DGJOURNL"
    assert segment.unpack_header(memoryview(data + b"more")) == (segment.FORMAT, 2**64 - 1, 2**63)


def test_a_change_of_any_byte_of_a_segments_header_is_found() -> None:
    data = bytearray(segment.pack_header(1, 2))

    for place in range(len(data)):
        data[place] ^= 1
        assert segment.unpack_header(memoryview(data)) is None, place
        data[place] ^= 1
    assert segment.unpack_header(memoryview(data)[:-1]) is None
