"""The work that every contender does, the gradients, and what the parameters must be in the end.

======  ==========================================================================================
W1      a worker writes a gradient, it is applied (``p - g``), and the worker gets the parameters
W2      the same with Adam
W3      all workers write a gradient, all are applied, and all get the parameters: one step
W4      W1 by one worker, each exchange timed by itself; writing the gradient is not part of it
======  ==========================================================================================

A gradient is written anew, all of it, before each exchange, as a backward pass does; so nobody can gain by keeping what
was sent before, and whoever lends an array must know when it is free again. Its values are small integers, of which
float32 adds 16 million exactly: a gradient that was lost, applied twice, torn or put in a wrong place shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distgrad.rules import SGD, Adam, Rule

Array: TypeAlias = NDArray[Any]

DTYPE = np.dtype(np.float32)
WORKS = ("W1", "W2", "W3", "W4")
MAX_WORKERS = 8
LR = 2.0**-10
"""Of Adam. A gradient that never changes moves a parameter by just this, each time."""

_PATTERN = 3 * 1024  # elements; short enough for a first-level cache, so that writing a gradient is only writing
_HEAD = 2 * MAX_WORKERS
_TAIL = MAX_WORKERS


@dataclasses.dataclass(frozen=True)
class Cell:
    """One place of the table.

    Parameters
    ----------
    work : str
        Of `WORKS`.
    size : int
        Elements of the parameters, at least 1,000.
    workers : int
        From 1 to `MAX_WORKERS`.
    """

    work: str
    size: int
    workers: int

    @property
    def n_bytes(self) -> int:
        """Of the parameters."""
        return self.size * DTYPE.itemsize

    @property
    def rule(self) -> Rule:
        """Update rule; the learning rate of SGD is in the gradient."""
        return Adam(lr=LR) if self.work == "W2" else SGD(lr=1.0)

    @property
    def steps_together(self) -> bool:
        """Whether all workers make a step together."""
        return self.work == "W3"

    def done(self, count: int) -> int:
        """Tell how many gradients (of W3: steps) are done when each worker has done `count`."""
        return count if self.steps_together else count * self.workers

    def problem(self, parameters: Array, counts: Sequence[int]) -> str | None:
        """Compare parameters with what they must be.

        Parameters
        ----------
        parameters : ndarray of float32, shape (size,)
            What came back last.
        counts : sequence of int
            Gradients that each worker has sent.

        Returns
        -------
        str or None
            What is wrong, if anything is.
        """
        if parameters.shape != (self.size,) or parameters.dtype != DTYPE:
            return f"the parameters came back as {parameters.dtype} of shape {parameters.shape}"
        head, body, tail = parameters[:_HEAD], parameters[_HEAD:-_TAIL], parameters[-_TAIL:]
        if self.work == "W2":
            return self._problem_of_adam(head, body, tail, sum(counts))
        wanted_head, wanted_tail = np.zeros(_HEAD, DTYPE), np.zeros(_TAIL, DTYPE)
        pattern = np.zeros(_PATTERN, DTYPE)
        for rank, count in enumerate(counts):
            wanted_head[rank] = count
            wanted_head[MAX_WORKERS + rank] = wanted_tail[rank] = -sum(map(_mark, range(count - count % 5, count)))
            pattern -= count * _pattern(rank)
        if not np.array_equal(head, wanted_head):
            return f"the first elements are {head.tolist()} and not {wanted_head.tolist()}"
        if not np.array_equal(tail, wanted_tail):
            return f"the last elements are {tail.tolist()} and not {wanted_tail.tolist()}"
        wrong = sum(int(np.count_nonzero(part != pattern[: part.shape[-1]])) for part in _pieces(body))
        return f"{wrong} of {self.size} elements are wrong" if wrong else None

    def _problem_of_adam(self, head: Array, body: Array, tail: Array, total: int) -> str | None:
        if head.any() or tail.any():
            return "elements without a gradient were changed"
        wanted = -LR * total * _pattern(0)
        # Rounding drifts; one update more or less than `total` would be a whole LR.
        allowed = LR * (0.4 + 2e-5 * total)
        worst = max(float(np.abs(part - wanted[: part.shape[-1]]).max(initial=0)) for part in _pieces(body))
        return f"after {total} updates an element is {worst / LR:.2f} steps away" if worst > allowed else None


class Gradients:
    """The gradients of one worker, one after the other.

    Parameters
    ----------
    cell : Cell
        Where they belong.
    rank : int
        Of the worker, from 0.
    """

    def __init__(self, cell: Cell, rank: int) -> None:
        self.sent = 0
        self.rank = rank
        self._same = cell.work == "W2"  # Adam's result would depend on the order
        self._pattern = _pattern(0 if self._same else rank)

    def write(self, array: Array) -> None:
        """Write the next one, all of it.

        Parameters
        ----------
        array : ndarray of float32, shape (size,)
            Where to.
        """
        array[:_HEAD] = 0
        for part in _pieces(array[_HEAD:-_TAIL]):
            part[...] = self._pattern[: part.shape[-1]]
        array[-_TAIL:] = 0
        if not self._same:
            array[self.rank] = -1
            array[MAX_WORKERS + self.rank] = array[self.rank - _TAIL] = _mark(self.sent)
        self.sent += 1

    def lag(self, parameters: Array) -> int:
        """Tell how many of this worker's gradients are missing in parameters that came back; 0 under Adam."""
        return 0 if self._same else self.sent - int(parameters[self.rank])


def _mark(number: int) -> int:
    """Make a gradient differ from the four before it; five add up to nothing."""
    return number % 5 - 2


def _pattern(rank: int) -> Array:
    return ((np.arange(_PATTERN) + rank) % 3 - 1).astype(DTYPE)


def _pieces(body: Array) -> list[Array]:
    """Cut an array into rows as long as a pattern, and the rest."""
    whole = body.size - body.size % _PATTERN
    return [body[:whole].reshape(-1, _PATTERN), body[whole:]]
