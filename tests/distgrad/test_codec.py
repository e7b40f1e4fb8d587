"""Payloads: arenas to parts and back, and everything that is no payload."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad.codec import as_arenas, decode, encode, fill
from distgrad.errors import GradientRefused
from distgrad.layout import Layout
from distgrad.wire import PART_BYTES

ONE = Layout.of(np.zeros(6, np.float32))
THREE = Layout.of([np.zeros(3, np.float16), np.zeros(2, np.float32), np.zeros(2, np.float64), np.zeros(4, np.int32)])
LARGE = Layout.of([np.zeros(300_000, np.float32), np.zeros(140_000, np.float64)])
INTEGERS = Layout.of(np.zeros(4, np.int32))


def ramp(layout: Layout) -> list[np.ndarray[Any, Any]]:
    return [np.arange(arena.size).astype(arena.dtype) for arena in layout.arenas]


def parts_of(layout: Layout) -> list[bytes]:
    return [bytes(part) for part in encode(layout, ramp(layout)[: layout.n_trainable_arenas])]


def read(layout: Layout, parts: list[bytes]) -> list[np.ndarray[Any, Any]]:
    return decode(layout, "raw", parts, sum(len(part) for part in parts))


@pytest.mark.parametrize("layout", [ONE, THREE, LARGE])
def test_a_gradient_comes_back_as_it_was(layout: Layout) -> None:
    arrays = read(layout, parts_of(layout))

    numbers = np.concatenate([array.astype(np.float64) for array in arrays])
    expected = np.concatenate([arena.astype(np.float64) for arena in ramp(layout)[: layout.n_trainable_arenas]])
    np.testing.assert_array_equal(numbers, expected)
    assert all(array.flags.aligned for array in arrays)


def test_parts_are_views_cut_at_a_mebibyte_and_never_span_arenas() -> None:
    arenas = ramp(LARGE)
    parts = encode(LARGE, arenas)

    assert [len(part) for part in parts] == [PART_BYTES, 1_200_000 - PART_BYTES, PART_BYTES, 1_120_000 - PART_BYTES]
    arenas[0][0] = 77
    assert np.frombuffer(parts[0], np.float32)[0] == 77


def test_a_frame_that_is_not_aligned_is_copied() -> None:
    frame = memoryview(b"x" + parts_of(ONE)[0])[1:]

    (array,) = decode(ONE, "raw", [frame], len(frame))

    assert array.flags.aligned
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32))


def test_an_empty_payload_is_right_for_a_layout_without_trained_leaves() -> None:
    assert parts_of(INTEGERS) == []
    assert read(INTEGERS, []) == []
    with pytest.raises(GradientRefused) as caught:
        read(INTEGERS, [bytes(16)])
    assert caught.value.reason == "too_large"


GOOD = parts_of(THREE)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "truncated"),
        (GOOD[:-1], "truncated"),
        ([*GOOD, b"x"], "too_large"),
        ([b"".join(GOOD)], "malformed"),
        ([GOOD[0] + GOOD[1][:2], GOOD[1][2:], GOOD[2]], "malformed"),
        ([GOOD[0][:3], GOOD[0][3:], *GOOD[1:]], "malformed"),
        ([GOOD[1], GOOD[0], GOOD[2]], "malformed"),
    ],
)
def test_a_payload_of_another_cut_or_size_is_refused(parts: list[bytes], reason: str) -> None:
    with pytest.raises(GradientRefused) as caught:
        read(THREE, parts)
    assert caught.value.reason == reason


def test_another_encoding_is_named() -> None:
    with pytest.raises(GradientRefused, match="must be 'raw', got 'zip") as caught:
        decode(ONE, "zip" + "p" * 1000, [], 0)
    assert caught.value.reason == "encoding"
    assert len(str(caught.value)) < 200


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([ONE, THREE, INTEGERS]), st.lists(st.binary(max_size=30), max_size=6))
def test_any_parts_are_decoded_whole_or_refused(layout: Layout, parts: list[bytes]) -> None:
    try:
        arrays = read(layout, parts)
    except GradientRefused:
        return
    assert sum(array.nbytes for array in arrays) == layout.gradient_bytes


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_cut_on_whole_elements_within_arenas_is_good(data: st.DataObject) -> None:
    parts: list[bytes] = []
    for whole, size in zip(GOOD, (2, 4, 8), strict=True):
        n = len(whole) // size
        cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
        edges = [0, *cuts, n]
        parts += [whole[start * size : stop * size] for start, stop in pairwise(edges)]

    arrays = read(THREE, parts)

    assert b"".join(array.tobytes() for array in arrays) == b"".join(GOOD)


def test_parameters_are_filled_in_any_number_of_steps() -> None:
    source, target = ramp(LARGE), [np.zeros_like(arena) for arena in ramp(LARGE)]
    parts = encode(LARGE, source, trained_only=False)

    place = 0
    for start in (0, 1, 3):
        place = fill(LARGE, parts[start : {0: 1, 1: 3, 3: 4}[start]], target, place)

    assert place == len(parts)
    assert all(np.array_equal(one, other) for one, other in zip(source, target, strict=True))


@pytest.mark.parametrize(
    ("change", "first", "reason"),
    [
        (lambda parts: [*parts, b""], 0, "too_large"),
        (lambda parts: parts, 1, "too_large"),
        (lambda parts: [parts[0][:-1], *parts[1:]], 0, "truncated"),
        (lambda parts: [bytes(parts[0]) + b"x", *parts[1:]], 0, "too_large"),
        (lambda parts: [b"", *parts[1:]], 0, "truncated"),
    ],
)
def test_a_part_that_does_not_fit_its_place_is_refused(change: object, first: int, reason: str) -> None:
    assert callable(change)
    parts = encode(THREE, ramp(THREE), trained_only=False)

    with pytest.raises(GradientRefused) as caught:
        fill(THREE, change(parts), ramp(THREE), first)
    assert caught.value.reason == reason


def test_large_parameters_in_one_part_each_are_seen_where_they_are() -> None:
    arenas = [np.arange(arena.size).astype(arena.dtype) for arena in LARGE.arenas]
    parts = [memoryview(bytearray(part)) for part in encode(LARGE, arenas, trained_only=False, part_bytes=4 << 20)]

    seen = as_arenas(LARGE, parts)

    assert seen is not None
    assert [array.tolist() for array in seen] == [array.tolist() for array in arenas]
    assert all(np.shares_memory(array, np.frombuffer(part, np.uint8)) for array, part in zip(seen, parts, strict=True))
    assert all(array.flags.writeable for array in seen)


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: parts[:1],
        lambda parts: [*parts, memoryview(bytearray(8))],
        lambda parts: [parts[1], parts[0]],
        lambda parts: [parts[0][:4], parts[0][4:], parts[1]],
        lambda parts: [bytes(parts[0]), parts[1]],
        lambda parts: [memoryview(bytearray(len(parts[0]) + 1))[1:], parts[1]],
    ],
)
def test_other_parts_have_to_be_copied(damage: Callable[[list[Any]], list[Any]]) -> None:
    arenas = ramp(LARGE)
    parts = [memoryview(bytearray(part)) for part in encode(LARGE, arenas, trained_only=False, part_bytes=4 << 20)]

    assert as_arenas(LARGE, damage(parts)) is None


def test_small_parameters_have_to_be_copied_for_their_memory_is_not_theirs_alone() -> None:
    parts = [memoryview(bytearray(part)) for part in encode(ONE, ramp(ONE), trained_only=False)]

    assert as_arenas(ONE, parts) is None


def test_an_arena_without_elements_has_no_part() -> None:
    layout = Layout.of([np.zeros(300_000, np.float32), np.zeros(0, np.float64)])
    parts = [
        memoryview(bytearray(part)) for part in encode(layout, ramp(layout), trained_only=False, part_bytes=4 << 20)
    ]

    seen = as_arenas(layout, parts)

    assert seen is not None
    assert [array.size for array in seen] == [300_000, 0]
