"""The parameters on a server's side, and the one kernel that every contender applies gradients with.

It is distgrad's own, on as many threads as pay: as fast as NumPy in place or torch for ``p - g``, and faster than
torch's fused Adam. So nobody loses time by a slower kernel than ours, and what remains is transport.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.peers.work import DTYPE, Array, Cell
from distgrad.arrays import lasting_empty
from distgrad.blocked import sign_mask
from distgrad.executor import CHUNK_BYTES, Executor

_PIECE = CHUNK_BYTES // DTYPE.itemsize


class Update:
    """Parameters, the optimizer's state and the kernel; start at zero.

    Parameters
    ----------
    cell : Cell
        Gives size and rule.
    threads : int, optional
        That share a large update; by default as many as there are cores for this process.
    """

    def __init__(self, cell: Cell, threads: int | None = None) -> None:
        self._rule = cell.rule
        self._executor = Executor(threads)
        self._kernel = self._executor.kernel(self._rule.kernel, DTYPE)
        self._splits = self._executor.splits(self._kernel, cell.n_bytes)
        self._state = [zeros(cell.size) for _ in self._rule.slots]
        self._step = 0
        self._constants = (np.zeros(0, DTYPE), sign_mask(DTYPE))
        self.parameters = zeros(cell.size)

    def apply(self, *parts: Array) -> None:
        """Change the parameters in place.

        Parameters
        ----------
        *parts : ndarray of float32
            The gradient, cut where one likes; may be read-only and unaligned.
        """
        self.begin()
        if len(parts) == 1 and not self._splits:
            self._kernel.in_place(self.parameters, parts[0], *self._state, *self._constants)
        else:
            self._executor.run(self._kernel.in_place, self._calls([self.parameters], parts), split=self._splits)

    def apply_beside(self, out: Array, old: Array, *parts: Array) -> None:
        """Write the next version beside another one.

        Parameters
        ----------
        out, old : ndarray of float32, shape (size,)
            The next version, and the one that it is made from.
        *parts : ndarray of float32
            The gradient, cut where one likes.
        """
        self.begin()
        if len(parts) == 1 and not self._splits:
            self._kernel.beside(out, old, parts[0], *self._state, *self._constants)
        else:
            self._executor.run(self._kernel.beside, self._calls([out, old], parts), split=self._splits)

    def begin(self) -> None:
        """Prepare for a gradient that comes in parts."""
        self._step += 1
        if self._step == 1 or self._rule.varies:
            self._constants = (np.array(self._rule.numbers(1.0, self._step), DTYPE), self._constants[1])

    def apply_part(self, low: int, part: Array) -> None:
        """Change some of the parameters in place; after `begin`, on this thread.

        Parameters
        ----------
        low : int
            First element.
        part : ndarray of float32
            Their gradient.
        """
        own = slice(low, low + part.size)
        states = [state[own] for state in self._state]
        self._kernel.in_place(self.parameters[own], part, *states, *self._constants)

    def _calls(self, arrays: Sequence[Array], parts: Sequence[Array]) -> Iterator[tuple[Array, ...]]:
        low = 0
        for part in parts:
            for first in range(0, part.size, _PIECE):
                piece = part[first : first + _PIECE]
                own = slice(low, low + piece.size)
                states = [state[own] for state in self._state]
                yield (*[array[own] for array in arrays], piece, *states, *self._constants)
                low += piece.size


def zeros(size: int) -> Array:
    """Make an array whose pages exist already.

    Parameters
    ----------
    size : int
        Elements.

    Returns
    -------
    ndarray of float32, shape (size,)
        Zero.
    """
    array = lasting_empty(size, DTYPE)
    array[:] = 0
    return array
