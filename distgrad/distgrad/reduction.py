"""Weighted sums of gradients: the one update of a step of several workers.

The sum is made element by element in the order given, so neither the number of threads nor where the parts are cut
changes a bit of it. It goes through memory once: block after block, all gradients are added while the block is in
the cache, and where the rule has no state the block is applied before the next one is summed. A compiled kernel adds
the last gradient by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .arrays import lasting_empty
from .blocked import Kernel
from .executor import CHUNK_BYTES, SPLIT_BYTES, Executor
from .layout import Layout
from .rules import state_dtype
from .storage import Storage
from .update import Cover, Plan

Array: TypeAlias = NDArray[Any]

BLOCK = 128 * 1024
"""Elements that are summed at a time. Measured in one run, sum and update of two gradients of 25 million float32 on two
cores: 18 ms; 25 with sum and update apart; 41 in blocks of 16 Ki, whose calls cost more than the cache saves."""
SMALL_BLOCK = 1024
"""Elements that a compiled kernel sums at a time: in the first-level cache."""


class Reduction:
    """Sums gradients of one layout.

    Parameters
    ----------
    layout : Layout
        Of the parameters.
    executor : Executor
        Its threads share large sums.
    """

    def __init__(self, layout: Layout, executor: Executor) -> None:
        self._executor = executor
        self._splits = executor.threads > 1 and layout.gradient_bytes >= SPLIT_BYTES
        self._specs = layout.arenas[: layout.n_trainable_arenas]
        # Made when it is first needed: as much memory as a gradient.
        self._sums: list[Array] = []

    def combine(self, covers: Sequence[Cover], weights: Sequence[float]) -> list[Array]:
        """Sum gradients.

        Parameters
        ----------
        covers : sequence of Cover
            At least one gradient, each laid over the trainable arenas.
        weights : sequence of float
            One for each; they are rounded to the type that sums are made in, float32 but for float64.

        Returns
        -------
        list of ndarray, 1-D
            For each trainable arena ``((w0 g0) + w1 g1) + …``, each product and sum rounded once; 16 bits are summed in
            float32. A weight of 1 leaves its gradient as it is. What is too large becomes infinite. The arrays are
            written to again by the next call.
        """
        if not self._sums:
            self._sums = [lasting_empty(spec.size, spec.dtype) for spec in self._specs]
        for arena, total in enumerate(self._sums):
            step = CHUNK_BYTES // total.dtype.itemsize if self._splits else max(total.size, 1)
            rounded = _rounded(weights, total.dtype)
            calls = (
                (total[low:high], pieces, rounded)
                for low, high, pieces in _pieces([cover[arena] for cover in covers], total.size, step)
            )
            self._executor.run(_sum, calls, split=self._splits)
        return self._sums

    def step(
        self, plans: Sequence[Plan], covers: Sequence[Cover], weights: Sequence[float], storage: Storage, spare: Storage
    ) -> bool:
        """Sum gradients, and apply the sum by a rule that has no state.

        Parameters
        ----------
        plans : sequence of Plan
            One per trainable arena.
        covers, weights : sequence of Cover, sequence of float
            As for `combine`, which would give the same bits.
        storage : Storage
            The current version; its own arenas, not adopted ones.
        spare : Storage
            Where the next version is written.

        Returns
        -------
        bool
            Whether the sum was good. If not, nothing was written but the spare.
        """
        for arena, plan in enumerate(plans):
            new, old = spare.arenas[arena], storage.arenas[arena]
            rounded = _rounded(weights, plan.dtype)
            calls = (
                (plan.kernel, new[low:high], old[low:high], pieces, rounded, plan.numbers, plan.word)
                for low, high, pieces in _pieces([cover[arena] for cover in covers], plan.size, plan.piece)
            )
            if self._executor.run(_sum_and_step, calls, split=plan.split) > plan.limit:
                return False
        return True


def _rounded(weights: Sequence[float], dtype: np.dtype[Any]) -> list[Any]:
    """Round weights to the type that sums are made in."""
    wide = state_dtype(dtype)
    return [wide.type(weight) for weight in weights]


def _pieces(parts: Sequence[list[tuple[int, Array]]], size: int, step: int) -> Iterator[tuple[int, int, list[Array]]]:
    """Cut one arena where any gradient's part ends and after each `step` elements."""
    places = [0] * len(parts)
    low = 0
    while low < size:
        high = min(low + step, size)
        for gradient, place in zip(parts, places, strict=True):
            start, part = gradient[place]
            high = min(high, start + part.size)
        pieces = []
        for number, gradient in enumerate(parts):
            start, part = gradient[places[number]]
            pieces.append(part[low - start : high - start])
            places[number] += high == start + part.size
        yield low, high, pieces
        low = high


def _sum(total: Array, pieces: Sequence[Array], weights: Sequence[Any]) -> int:
    """Sum one piece block by block; always 0, as nothing is judged here."""
    scratch = _scratch(total)
    for low in range(0, total.size, BLOCK):
        high = low + BLOCK
        _sum_block(total[low:high], [piece[low:high] for piece in pieces], weights, scratch)
    return 0


def _sum_and_step(
    kernel: Kernel,
    new: Array,
    old: Array,
    pieces: Sequence[Array],
    weights: Sequence[Any],
    numbers: Array,
    word: Array,
) -> int:
    """Sum one piece block by block, and apply each block; give the largest of what the kernel gave."""
    # Where the kernel adds two by itself, all but the last are summed before it.
    summed = kernel.summed if len(pieces) > 1 else None
    first, last = (pieces, None) if summed is None else (pieces[:-1], pieces[-1])
    small = np.empty(min(SMALL_BLOCK, new.size), new.dtype)
    if summed is not None and len(first) == 1:
        return summed(new, old, *pieces, np.array(weights, new.dtype), small, numbers, word)
    # No compiled kernel is for 16 bits, which could not hold every weight.
    both = None if summed is None else np.array([1, weights[-1]], new.dtype)
    scratch, worst = _scratch(new), 0
    total = np.empty(min(BLOCK, new.size), new.dtype)
    for low in range(0, new.size, BLOCK):
        high = min(low + BLOCK, new.size)
        block = total[: high - low]
        _sum_block(block, [piece[low:high] for piece in first], weights[: len(first)], scratch)
        if summed is None or last is None:
            bits = kernel.beside(new[low:high], old[low:high], block, numbers, word)
        else:
            bits = summed(new[low:high], old[low:high], block, last[low:high], both, small, numbers, word)
        worst = max(worst, bits)
    return worst


def _scratch(total: Array) -> tuple[Array, Array | None]:
    """Make room for a product, and for a sum where it is made in another type."""
    wide = state_dtype(total.dtype)
    product = np.empty(min(BLOCK, total.size), wide)
    return product, None if wide == total.dtype else np.empty_like(product)


def _sum_block(
    target: Array, pieces: Sequence[Array], weights: Sequence[Any], scratch: tuple[Array, Array | None]
) -> None:
    product, narrow = scratch
    wide = product.dtype
    block = target if narrow is None else narrow[: target.size]
    scaled = product[: target.size]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if len(pieces) > 1 and weights[0] == weights[1] == 1:
            np.add(pieces[0], pieces[1], out=block, dtype=wide)
            done = 2
        else:
            np.multiply(pieces[0], weights[0], out=block, dtype=wide)
            done = 1
        for piece, weight in zip(pieces[done:], weights[done:], strict=True):
            if weight == 1:
                np.add(block, piece, out=block, dtype=wide)
            else:
                np.multiply(piece, weight, out=scaled, dtype=wide)
                np.add(block, scaled, out=block)
        if narrow is not None:
            target[:] = block
