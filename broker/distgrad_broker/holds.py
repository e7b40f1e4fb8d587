"""Readers' claims on versions, and what they are given: plain values that `versions` keeps account of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distgrad.codec import encode
from distgrad.layout import Layout
from distgrad.storage import Storage


class Range(NamedTuple):
    """Some parts of one version.

    Attributes
    ----------
    token : str or None
        To read on with; None if all parts are here.
    parts : sequence of bytes or memoryview
        Valid until the next update, or if they are lent until they are dropped.
    n_parts : int
        How many parts the version has.
    is_lent : bool
        Whether the parts may be sent without a copy.
    """

    token: str | None
    parts: Sequence[bytes | memoryview]
    n_parts: int
    is_lent: bool


class Hold:
    """Somebody's claim on one version: a reader's between two ranges, or the file thread's.

    Parameters
    ----------
    token : str
        Its name on the wire.
    generation : int
        Of the parameters.
    layout : Layout
        Theirs.
    storage : Storage
        Their numbers, which nobody changes while this exists.
    version : int
        Of the parameters.
    now : float
        Seconds on the shell's clock.
    """

    __slots__ = ("generation", "last_used", "parts", "parts_read", "storage", "token", "version")

    def __init__(self, token: str, generation: int, layout: Layout, storage: Storage, version: int, now: float) -> None:
        self.token = token
        self.generation = generation
        self.storage = storage
        self.version = version
        self.parts = encode(layout, storage.arenas, trained_only=False)
        self.parts_read = 0
        self.last_used = now
