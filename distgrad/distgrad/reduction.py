"""Weighted sums of gradients: the one update of a step of several workers.

The sum is made element by element in the order given, so neither the number of threads nor where the parts are cut
changes a bit of it. It goes through memory once: block after block, all gradients are added while the block is in
the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .arrays import lasting_empty
from .executor import CHUNK_BYTES, SPLIT_BYTES, Executor
from .layout import Layout
from .rules import state_dtype
from .update import Cover

Array: TypeAlias = NDArray[Any]

BLOCK = 16 * 1024
"""Elements that are summed at a time: 64 KiB of float32 for the sum, and as much for a product."""


class Reduction:
    """Sums gradients of one layout into arrays that it keeps.

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
        specs = layout.arenas[: layout.n_trainable_arenas]
        self._sums = [lasting_empty(spec.size, spec.dtype) for spec in specs]

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
        for arena, total in enumerate(self._sums):
            parts = [cover[arena] for cover in covers]
            wide = state_dtype(total.dtype)
            rounded = [wide.type(weight) for weight in weights]
            step = CHUNK_BYTES // total.dtype.itemsize if self._splits else max(total.size, 1)
            calls = ((total[low:high], pieces, rounded) for low, high, pieces in _pieces(parts, total.size, step))
            self._executor.run(_sum, calls, split=self._splits)
        return self._sums


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
    wide = state_dtype(total.dtype)
    product = np.empty(min(BLOCK, total.size), wide)
    narrow = None if wide == total.dtype else np.empty_like(product)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for low in range(0, total.size, BLOCK):
            target = total[low : low + BLOCK]
            block = target if narrow is None else narrow[: target.size]
            scaled = product[: target.size]
            for number, (piece, weight) in enumerate(zip(pieces, weights, strict=True)):
                g = piece[low : low + BLOCK]
                if number == 0:
                    np.multiply(g, weight, out=block, dtype=wide)
                elif weight == 1:
                    np.add(block, g, out=block, dtype=wide)
                else:
                    np.multiply(g, weight, out=scaled, dtype=wide)
                    np.add(block, scaled, out=block)
            if narrow is not None:
                target[:] = block
    return 0
