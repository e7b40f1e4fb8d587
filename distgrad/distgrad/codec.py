"""Between arenas and payload parts: how a gradient's numbers become frames and numbers again.

The only encoding so far is ``raw``: the arenas' own bytes, cut into parts, without a copy on either side. Smaller
encodings belong here, between `Worker.push` and the wire; nothing else looks inside a payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrad.arrays import SMALL_BYTES
from distgrad.errors import GradientRefused
from distgrad.layout import Layout
from distgrad.wire import PART_BYTES, RAW

_PAGE_BYTES = 4096
# Parameters of less than this are copied into their message and out of it, which costs less than to keep account.
LENT_BYTES = 256 * 1024


def encode(
    layout: Layout,
    arenas: Sequence[np.ndarray[Any, Any]],
    *,
    trained_only: bool = True,
    part_bytes: int = PART_BYTES,
) -> list[bytes | memoryview]:
    """Cut arenas into parts, without a copy of what is large.

    Parameters
    ----------
    layout : Layout
        What the arenas hold.
    arenas : sequence of ndarray, 1-D
        The trained arenas, or all of them, in the layout's order.
    trained_only : bool
        Whether only the trained arenas are given, as for a gradient.
    part_bytes : int
        The most that a part may have.

    Returns
    -------
    list of bytes or memoryview
        The parts. Views keep the arenas alive and follow later changes to them; a small arena is copied.
    """
    n_arenas = layout.n_trainable_arenas if trained_only else len(layout.arenas)
    # By default as `Layout.parts` cuts, but in bytes: slicing a memoryview is cheap.
    return cut(arenas[:n_arenas], part_bytes)


def cut(pieces: Sequence[np.ndarray[Any, Any]], part_bytes: int) -> list[bytes | memoryview]:
    """Cut pieces of arenas into parts, without a copy of what is large.

    Parameters
    ----------
    pieces : sequence of ndarray, 1-D
        What follows each other; each is of one arena.
    part_bytes : int
        The most that a part may have, a multiple of 8.

    Returns
    -------
    list of bytes or memoryview
        As by `encode`.
    """
    # What is small is copied: a view costs as much, and the garbage collector would have to trace each of the thousands
    # that may wait in a window.
    parts: list[bytes | memoryview] = []
    for piece in pieces:
        if piece.nbytes <= SMALL_BYTES:
            if piece.size:
                parts.append(piece.tobytes())
        else:
            data = piece.view(np.uint8).data  # a buffer of bfloat16 cannot be cast
            parts += [data[start : start + part_bytes] for start in range(0, data.nbytes, part_bytes)]
    return parts


def as_arenas(layout: Layout, parts: Sequence[Any]) -> list[np.ndarray[Any, Any]] | None:
    """See large parameters where ZeroMQ has received them; small ones share its buffer with other messages.

    Parameters
    ----------
    layout : Layout
        Of the parameters.
    parts : sequence of buffers
        All of them; they belong to the caller, and nobody else writes to them.

    Returns
    -------
    list of ndarray, 1-D
        All arenas. None if they are small, or one is in several parts, or not aligned.
    """
    if layout.parameter_bytes < LENT_BYTES:
        return None
    arenas = []
    left = iter(parts)
    for spec in layout.arenas:
        if spec.size == 0:
            arenas.append(np.empty(0, spec.dtype))
            continue
        part = next(left, b"")
        if len(part) != spec.size * spec.dtype.itemsize:
            return None
        arena = np.frombuffer(part, spec.dtype)
        if not arena.flags.carray:
            return None
        arenas.append(arena)
    return arenas if next(left, None) is None else None


def decode(layout: Layout, encoding: str, parts: Sequence[Any], size: int) -> list[np.ndarray[Any, Any]]:
    """Read a gradient's parts as arrays, checking their sizes before any array is made.

    Parameters
    ----------
    layout : Layout
        The layout of the parameters, whose fingerprint the caller has compared.
    encoding : str
        From the gradient's header.
    parts : sequence of buffers
        The payload frames.
    size : int
        Their bytes in all.

    Returns
    -------
    list of ndarray, 1-D
        Aligned arrays that cover the trained arenas in order. Views of the frames; a frame that is not aligned
        (small ones often are not: ZeroMQ hands out pieces of its receive buffer) is copied.

    Raises
    ------
    GradientRefused
        ``encoding``, ``truncated``, ``too_large`` or ``malformed``.
    """
    if encoding != RAW:
        raise GradientRefused("encoding", f"encoding must be {RAW!r}, got {encoding!r:.40}")
    expected = layout.gradient_bytes
    if size != expected:
        reason = "truncated" if size < expected else "too_large"
        raise GradientRefused(reason, f"a gradient of this layout has {expected} bytes, got {size}")
    arrays = []
    if layout.n_trainable_arenas == 1:
        dtype = layout.arenas[0].dtype
        for part in parts:
            arrays.append(_array(part, dtype))
        return arrays
    arena, left = 0, layout.arenas[0].size * layout.arenas[0].dtype.itemsize if layout.arenas else 0
    for part in parts:
        while left == 0 and arena + 1 < layout.n_trainable_arenas:
            arena += 1
            left = layout.arenas[arena].size * layout.arenas[arena].dtype.itemsize
        if len(part) > left:
            raise GradientRefused("malformed", "a part spans arenas; cut the payload where an arena ends")
        left -= len(part)
        arrays.append(_array(part, layout.arenas[arena].dtype))
    return arrays


def _array(part: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    try:
        array = np.frombuffer(part, dtype)
    except ValueError as error:
        raise GradientRefused("malformed", f"a part of {len(part)} bytes cuts an element of {dtype}") from error
    # Bytes are aligned by Python; only pieces of a receive buffer may not be.
    return array if type(part) is bytes or array.flags.aligned else array.copy()


def fill(layout: Layout, parts: Sequence[Any], arenas: Sequence[np.ndarray[Any, Any]], first: int = 0) -> int:
    """Copy parts of a whole set of parameters into their places.

    Parameters
    ----------
    layout : Layout
        What the arenas hold.
    parts : sequence of buffers
        Consecutive parts as distgrad cuts them.
    arenas : sequence of ndarray, 1-D
        All arenas of the layout; written to.
    first : int
        Index of the first of `parts` among all parts of the layout.

    Returns
    -------
    int
        Index of the part after the last one copied.

    Raises
    ------
    GradientRefused
        ``truncated`` or ``too_large``, if a part's length is not that of its place.
    """
    places = layout.parts(None, PART_BYTES)
    if first + len(parts) > len(places):
        raise GradientRefused("too_large", f"this layout has {len(places)} parts, got {first + len(parts)}")
    for part, (arena, start, stop) in zip(parts, places[first:], strict=False):
        target = arenas[arena][start:stop].view(np.uint8).data
        if len(part) != len(target):
            reason = "truncated" if len(part) < len(target) else "too_large"
            raise GradientRefused(reason, f"a part must be {len(target)} bytes here, got {len(part)}")
        target[:] = part if isinstance(part, bytes) else memoryview(part).cast("B")
    return first + len(parts)


def slot_bytes(layout: Layout) -> int:
    """Tell how much memory a gradient takes where its arenas are shared instead of sent.

    Parameters
    ----------
    layout : Layout
        Of the parameters.

    Returns
    -------
    int
        Bytes: each trained arena begins on a page.
    """
    return sum(_whole_pages(arena.size * arena.dtype.itemsize) for arena in layout.arenas[: layout.n_trainable_arenas])


def slot_arenas(layout: Layout, memory: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """See shared memory as the arenas of a gradient.

    Parameters
    ----------
    layout : Layout
        Of the parameters.
    memory : ndarray of uint8, shape (slot_bytes(layout),)
        The memory.

    Returns
    -------
    list of ndarray, 1-D
        Views, one for each trained arena.
    """
    arenas, start = [], 0
    for arena in layout.arenas[: layout.n_trainable_arenas]:
        size = arena.size * arena.dtype.itemsize
        arenas.append(memory[start : start + size].view(arena.dtype))
        start += _whole_pages(size)
    return arenas


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
