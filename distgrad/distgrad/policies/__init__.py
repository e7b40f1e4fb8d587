"""Consistency policies: when a gradient counts, and when a worker may have the parameters.

A policy is a small object behind the interface of `Policy`; they combine by `Chain`, and `build` makes them from a name
and settings. ``docs/choosing.md`` tells which to take, ``docs/extending.md`` how to write one.
"""

from distgrad.policies.asynchronous import Asynchronous
from distgrad.policies.bounded import Bounded
from distgrad.policies.buffered import Buffered
from distgrad.policies.chain import Chain
from distgrad.policies.policy import (
    APPLY,
    HOLD,
    NO_PLACES,
    SUPERSEDE,
    Action,
    Base,
    Decision,
    Held,
    Offered,
    Places,
    Policy,
    Situation,
)
from distgrad.policies.registry import build, names
from distgrad.policies.staleness import SCALINGS, Staleness
from distgrad.policies.synchronous import Synchronous
from distgrad.policies.weighing import REDUCTIONS, Weighing

__all__ = [
    "APPLY",
    "HOLD",
    "NO_PLACES",
    "REDUCTIONS",
    "SCALINGS",
    "SUPERSEDE",
    "Action",
    "Asynchronous",
    "Base",
    "Bounded",
    "Buffered",
    "Chain",
    "Decision",
    "Held",
    "Offered",
    "Places",
    "Policy",
    "Situation",
    "Staleness",
    "Synchronous",
    "Weighing",
    "build",
    "names",
]
