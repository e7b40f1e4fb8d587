"""When a gradient counts: the question that the core asks, and its simplest answer.

A policy is a small object without sockets, clocks or threads. The core shows it every accepted gradient, in order,
and does what it says; it knows no policy by name.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from distgrad.wire import Gradient


class Verdict(Enum):
    """What becomes of a gradient."""

    APPLY = "apply"
    SUPERSEDE = "supersede"


class Policy(Protocol):
    """What the core asks of a policy."""

    @property
    def name(self) -> str:
        """Name in status and options."""
        ...

    @property
    def must_hold(self) -> int:
        """How many gradients must fit in the queue at once for the policy to get on."""
        ...

    def judge(self, gradient: Gradient, staleness: int | None) -> Verdict:
        """Decide on one gradient.

        Parameters
        ----------
        gradient : Gradient
            Accepted, next in order.
        staleness : int or None
            Updates since the state that it was computed on; None if that state is of another incarnation or
            generation, or was not told.

        Returns
        -------
        Verdict
            What to do with it.
        """
        ...


class Asynchronous:
    """Apply every gradient when it arrives.

    Parameters
    ----------
    max_staleness : int, optional
        A gradient computed on parameters more than this many updates old, or on parameters that were replaced since, is
        superseded. None applies all.
    """

    name = "async"
    must_hold = 1

    def __init__(self, max_staleness: int | None = None) -> None:
        self._max_staleness = max_staleness

    def judge(self, gradient: Gradient, staleness: int | None) -> Verdict:
        """Apply, unless the gradient is too old.

        Parameters
        ----------
        gradient : Gradient
            Accepted, next in order.
        staleness : int or None
            Updates since the state that it was computed on.

        Returns
        -------
        Verdict
            What to do with it.
        """
        if self._max_staleness is None or gradient.base is None:
            return Verdict.APPLY
        return Verdict.SUPERSEDE if staleness is None or staleness > self._max_staleness else Verdict.APPLY
