"""Update rules as compiled loops: one pass over memory each, with numba.

Importing this module imports numba (the ``fast`` extra), which takes most of a second: only
`distgrad.executor` does, when parameters are first set. The formulas are in `distgrad.rules`.

What keeps the loops vectorised (look for ``zmm`` or ``ymm`` in ``inspect_asm`` after a change):

- Constants come in an array of the parameters' own type. An int constant beside a float32, or a Python
  float, would turn the arithmetic into float64.
- ``error_model="numpy"``: a division by zero is infinite, not a branch.
- In place and beside are two functions. LLVM guards a loop over two pointers by a check that they do
  not overlap, and would take the scalar loop if they are equal.
- Finiteness is tested on the bits: without its sign, a float compares as an integer, and the
  largest integer tells of NaN and infinity too. (`max` of floats loses NaN.)

Never ``parallel=True``: a child forked afterwards hangs, and concurrent calls abort the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

from .blocked import SLOTS, Kernel, bits_dtype

logger = logging.getLogger(__name__)

_inline = numba.njit(inline="always")


@_inline
def _decayed(p, g, sign, decay):  # type: ignore[no-untyped-def]
    # Not simply + decay * p: a parameter that is infinite would make the state NaN for ever, by 0 * inf.
    return sign * g + decay * p if decay != 0 else sign * g


@_inline
def _step(out, p, g, n, word):  # type: ignore[no-untyped-def]
    n0, mask = n[0], word[0]
    bits, worst = g.view(word.dtype), word.dtype.type(0)
    for i in range(g.size):
        worst = max(worst, word.dtype.type(bits[i] & mask))
        out[i] = p[i] - n0 * g[i]
    return worst


@_inline
def _decay(out, p, g, n, word):  # type: ignore[no-untyped-def]
    n0, n1, n2, mask = n[0], n[1], n[2], word[0]
    bits, worst = g.view(word.dtype), word.dtype.type(0)
    for i in range(g.size):
        worst = max(worst, word.dtype.type(bits[i] & mask))
        out[i] = p[i] - n1 * (n0 * g[i] + n2 * p[i])
    return worst


@_inline
def _momentum(out, p, g, b, n):  # type: ignore[no-untyped-def]
    n0, n1, n2, n3, n4 = n[0], n[1], n[2], n[3], n[4]
    for i in range(g.size):
        average = n3 * b[i] + n4 * _decayed(p[i], g[i], n0, n2)
        b[i] = average
        out[i] = p[i] - n1 * average


@_inline
def _nesterov(out, p, g, b, n):  # type: ignore[no-untyped-def]
    n0, n1, n2, n3, n4 = n[0], n[1], n[2], n[3], n[4]
    for i in range(g.size):
        d = _decayed(p[i], g[i], n0, n2)
        average = n3 * b[i] + n4 * d
        b[i] = average
        out[i] = p[i] - n1 * (d + n3 * average)


@_inline
def _adam(out, p, g, m, v, n):  # type: ignore[no-untyped-def]
    n0, n1, n2, n3, n4, n5, n6, n7, n8 = n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]
    for i in range(g.size):
        d = _decayed(p[i], g[i], n2, n3)
        first = m[i] + n5 * (d - m[i])
        second = n6 * v[i] + n7 * (d * d)
        m[i] = first
        v[i] = second
        out[i] = n4 * p[i] - n0 * first / (n1 * np.sqrt(second) + n8)


def _check(g, word):  # type: ignore[no-untyped-def]
    mask = word[0]
    bits, worst = g.view(word.dtype), word.dtype.type(0)
    for i in range(g.size):
        worst = max(worst, word.dtype.type(bits[i] & mask))
    return worst


# numba caches by name and file, so each entry is a function of this module and not a closure.


def _step_beside(out, p, g, n, word):  # type: ignore[no-untyped-def]
    return _step(out, p, g, n, word)


def _step_in_place(p, g, n, word):  # type: ignore[no-untyped-def]
    return _step(p, p, g, n, word)


def _decay_beside(out, p, g, n, word):  # type: ignore[no-untyped-def]
    return _decay(out, p, g, n, word)


def _decay_in_place(p, g, n, word):  # type: ignore[no-untyped-def]
    return _decay(p, p, g, n, word)


@_inline
def _add(total, a, b, w):  # type: ignore[no-untyped-def]
    w0, w1 = w[0], w[1]
    for i in range(total.size):
        total[i] = w0 * a[i] + w1 * b[i]


@_inline
def _in_blocks(change, out, p, a, b, w, total, n, word):  # type: ignore[no-untyped-def]
    worst = word.dtype.type(0)
    for low in range(0, out.size, total.size):
        high = min(low + total.size, out.size)
        g = total[: high - low]
        _add(g, a[low:high], b[low:high], w)
        worst = max(worst, change(out[low:high], p[low:high], g, n, word))
    return worst


def _step_summed(out, p, a, b, w, total, n, word):  # type: ignore[no-untyped-def]
    return _in_blocks(_step, out, p, a, b, w, total, n, word)


def _decay_summed(out, p, a, b, w, total, n, word):  # type: ignore[no-untyped-def]
    return _in_blocks(_decay, out, p, a, b, w, total, n, word)


def _momentum_beside(out, p, g, b, n, word):  # type: ignore[no-untyped-def]
    _momentum(out, p, g, b, n)
    return 0


def _momentum_in_place(p, g, b, n, word):  # type: ignore[no-untyped-def]
    _momentum(p, p, g, b, n)
    return 0


def _nesterov_beside(out, p, g, b, n, word):  # type: ignore[no-untyped-def]
    _nesterov(out, p, g, b, n)
    return 0


def _nesterov_in_place(p, g, b, n, word):  # type: ignore[no-untyped-def]
    _nesterov(p, p, g, b, n)
    return 0


def _adam_beside(out, p, g, m, v, n, word):  # type: ignore[no-untyped-def]
    _adam(out, p, g, m, v, n)
    return 0


def _adam_in_place(p, g, m, v, n, word):  # type: ignore[no-untyped-def]
    _adam(p, p, g, m, v, n)
    return 0


_ENTRIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "step": (_step_beside, _step_in_place),
    "decay": (_decay_beside, _decay_in_place),
    "momentum": (_momentum_beside, _momentum_in_place),
    "nesterov": (_nesterov_beside, _nesterov_in_place),
    "adam": (_adam_beside, _adam_in_place),
}
_SUMMED: dict[str, Callable[..., Any]] = {"step": _step_summed, "decay": _decay_summed}


class Compiler:
    """Compiles kernels on demand, and keeps them.

    Parameters
    ----------
    cache : bool, default True
        Keep compiled code on disk for the next process. Where no folder can be written to, it is
        compiled in each process instead.
    """

    def __init__(self, cache: bool = True) -> None:
        self._cache = cache
        self._made: dict[tuple[str, np.dtype[Any]], Kernel] = {}
        self._checks: dict[np.dtype[Any], Callable[..., int]] = {}

    @property
    def has_cache(self) -> bool:
        """Whether compiled code is kept on disk; known once something was compiled."""
        return self._cache

    def kernel(self, name: str, dtype: np.dtype[Any]) -> Kernel:
        """Compile a kernel, or fetch it from the cache.

        Parameters
        ----------
        name : str
            A kernel of `distgrad.rules`.
        dtype : dtype
            float32 or float64, native.

        Returns
        -------
        Kernel
            Compiled functions that hold no GIL while they run. They take 1-D contiguous arrays; the
            gradient may be read-only and unaligned.
        """
        made = self._made.get((name, dtype))
        if made is None:
            own = types.Array(numba.from_dtype(dtype), 1, "C")
            read = types.Array(own.dtype, 1, "C", readonly=True, aligned=False)
            word = types.Array(numba.from_dtype(bits_dtype(dtype)), 1, "C")
            beside, in_place = _ENTRIES[name]
            rest = (read, *[own] * SLOTS[name], own, word)
            if dtype not in self._checks:
                self._checks[dtype] = self._compile(_check, (read, word))
            summed = None
            if name in _SUMMED:
                summed = self._compile(_SUMMED[name], (own, read, read, read, own, own, own, word))
            made = Kernel(
                check=self._checks[dtype],
                beside=self._compile(beside, (own, read, *rest)),
                in_place=self._compile(in_place, (own, *rest)),
                summed=summed,
                compiled=True,
            )
            self._made[name, dtype] = made
        return made

    def _compile(self, function: Callable[..., Any], signature: tuple[Any, ...]) -> Callable[..., int]:
        if self._cache:
            try:
                return _compiled(function, signature, cache=True)
            except (RuntimeError, OSError) as error:  # "no locator available", a full or read-only disk, `_compiled`
                logger.info("kernels are compiled without a cache error=%r", str(error))
                self._cache = False
        return _compiled(function, signature, cache=False)


def _compiled(function: Callable[..., Any], signature: tuple[Any, ...], *, cache: bool) -> Callable[..., int]:
    dispatcher = numba.njit(function, nogil=True, error_model="numpy", cache=cache)
    dispatcher.compile(signature)
    if signature not in dispatcher.overloads:
        # Processes that fill a new cache at the same moment may overwrite each other's files.
        raise RuntimeError(f"the cache has code for other types: remove kernels.* in {dispatcher.stats.cache_path}")
    dispatcher.disable_compile()  # an array of another type is an error of ours, not a reason to compile
    compiled: Callable[..., int] = dispatcher
    return compiled
