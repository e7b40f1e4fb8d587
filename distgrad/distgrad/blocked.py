"""Update rules with NumPy alone, block by block, so that what is between two steps stays in the cache.

The formulas are in `distgrad.rules`, in the same order of operations as `distgrad.kernels`. This
is what runs where numba is not installed, and always for float16 and bfloat16, which are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .rules import state_dtype

Array: TypeAlias = NDArray[Any]

SLOTS = {"step": 0, "decay": 0, "momentum": 1, "nesterov": 1, "adam": 2}
"""State arrays that each kernel takes."""

BLOCK = 1 << 15
"""Elements to a block: the seven streams of Adam on float32 take 900 KiB, within a second-level cache."""


class Kernel(NamedTuple):
    """The functions that run one rule on one dtype.

    All take 1-D contiguous arrays of equal length. `check(g, word)` returns the largest bits of any
    ``|g|``; `beside(out, p, g, *state, numbers, word)` and `in_place(p, g, *state, numbers, word)`
    write the update. Those of stateless rules return the largest bits too, those with state 0.
    `summed(out, p, a, b, weights, total, numbers, word)` does what `beside` does for ``w0 a + w1 b``, which goes
    through `total` piece by piece; None where that would be no faster.
    `compiled` ones hold no GIL, so that threads can share the work. (Measured: NumPy's many short
    calls on two threads take twice the time of one, handing the GIL to and fro.)
    """

    check: Callable[..., int]
    beside: Callable[..., int]
    in_place: Callable[..., int]
    summed: Callable[..., int] | None
    compiled: bool


def bits_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Give the integer type as wide as a float type.

    Parameters
    ----------
    dtype : dtype
        One of `arrays.TRAINABLE`.

    Returns
    -------
    dtype
        int16, int32 or int64.
    """
    return np.dtype(f"i{dtype.itemsize}")


def sign_mask(dtype: np.dtype[Any]) -> Array:
    """Make the word that kernels test bits with.

    Parameters
    ----------
    dtype : dtype
        One of `arrays.TRAINABLE`.

    Returns
    -------
    ndarray, shape (1,)
        Every bit but the sign.
    """
    integer = bits_dtype(dtype)
    return np.array([np.iinfo(integer).max], integer)


def kernel(name: str, dtype: np.dtype[Any]) -> Kernel:
    """Look up a kernel.

    Parameters
    ----------
    name : str
        A kernel of `distgrad.rules`.
    dtype : dtype
        One of `arrays.TRAINABLE`.

    Returns
    -------
    Kernel
        Functions that take arrays of any float type.
    """
    beside, in_place = _ENTRIES[name]
    return Kernel(check, beside, in_place, None, compiled=False)


def check(g: Array, word: Array) -> int:
    """Find the largest absolute value, as bits.

    Parameters
    ----------
    g : ndarray, shape (n,)
        A gradient.
    word : ndarray, shape (1,)
        From `sign_mask`.

    Returns
    -------
    int
        0 if there is no element. More than the bits of the largest float: there is a NaN or an
        infinity.
    """
    bits, scratch, worst = g.view(word.dtype), np.empty(min(g.size, BLOCK), word.dtype), 0
    for start in range(0, g.size, BLOCK):
        block = bits[start : start + BLOCK]
        worst = max(worst, int(np.bitwise_and(block, word, out=scratch[: block.size]).max()))
    return worst


def _step(p: Array, g: Array, state: list[Array], n: Array, d: Array, t: Array) -> None:
    """Leave in `d` what is subtracted from p."""
    np.multiply(n[0], g, out=d)


def _decay(p: Array, g: Array, state: list[Array], n: Array, d: Array, t: Array) -> None:
    _decayed(p, g, n[0], n[2], d, t)
    np.multiply(n[1], d, out=d)


def _momentum(p: Array, g: Array, state: list[Array], n: Array, d: Array, t: Array) -> None:
    (b,) = state
    _decayed(p, g, n[0], n[2], d, t)
    np.multiply(n[4], d, out=d)
    np.multiply(n[3], b, out=b)
    np.add(b, d, out=b)
    np.multiply(n[1], b, out=d)


def _nesterov(p: Array, g: Array, state: list[Array], n: Array, d: Array, t: Array) -> None:
    (b,) = state
    _decayed(p, g, n[0], n[2], d, t)
    np.multiply(n[4], d, out=t)
    np.multiply(n[3], b, out=b)
    np.add(b, t, out=b)
    np.multiply(n[3], b, out=t)
    np.add(d, t, out=d)
    np.multiply(n[1], d, out=d)


def _adam(p: Array, g: Array, state: list[Array], n: Array, d: Array, t: Array) -> None:
    m, v = state
    _decayed(p, g, n[2], n[3], d, t)
    np.subtract(d, m, out=t)
    np.multiply(n[5], t, out=t)
    np.add(m, t, out=m)
    np.multiply(d, d, out=t)
    np.multiply(n[7], t, out=t)
    np.multiply(n[6], v, out=v)
    np.add(v, t, out=v)
    np.sqrt(v, out=t)
    np.multiply(n[1], t, out=t)
    np.add(t, n[8], out=t)
    np.multiply(n[0], m, out=d)
    np.divide(d, t, out=d)


def _decayed(p: Array, g: Array, sign: Any, decay: Any, d: Array, t: Array) -> None:
    """Leave in `d` the gradient to minimise, weight decay included."""
    np.multiply(sign, g, out=d)
    if decay:
        np.multiply(decay, p, out=t)
        np.add(d, t, out=d)


_Change: TypeAlias = Callable[[Array, Array, list[Array], Array, Array, Array], None]


def _entries(change: _Change, *, stateless: bool, kept: int | None = None) -> tuple[Callable[..., int], ...]:
    """Wrap what computes a block's step into a pass over all blocks."""

    def beside(out: Array, p: Array, g: Array, *rest: Array) -> int:
        *states, numbers, word = rest
        wide, size, worst = state_dtype(p.dtype), min(g.size, BLOCK), 0
        step, spare, bits = np.empty(size, wide), np.empty(size, wide), np.empty(size, word.dtype)
        with np.errstate(all="ignore"):  # what a bad gradient computes is dropped: see the bits
            for start in range(0, g.size, BLOCK):
                block = slice(start, start + BLOCK)
                gradient, values = g[block], p[block]
                if stateless:
                    tested = np.bitwise_and(gradient.view(word.dtype), word, out=bits[: gradient.size])
                    worst = max(worst, int(tested.max()))
                if p.dtype != wide:
                    gradient, values = gradient.astype(wide), values.astype(wide)
                d, t = step[: gradient.size], spare[: gradient.size]
                change(values, gradient, [state[block] for state in states], numbers, d, t)
                if kept is not None and numbers[kept] != 1:
                    values = np.multiply(numbers[kept], values, out=t)
                np.subtract(values, d, out=out[block], casting="same_kind")
        return worst

    def in_place(p: Array, g: Array, *rest: Array) -> int:
        return beside(p, p, g, *rest)

    return beside, in_place


_ENTRIES = {
    "step": _entries(_step, stateless=True),
    "decay": _entries(_decay, stateless=True),
    "momentum": _entries(_momentum, stateless=False),
    "nesterov": _entries(_nesterov, stateless=False),
    "adam": _entries(_adam, stateless=False, kept=4),
}
