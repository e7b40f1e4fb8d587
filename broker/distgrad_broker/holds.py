"""Readers' claims on versions, and what they are given: plain values that `versions` keeps account of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distgrad.codec import encode
from distgrad.layout import Layout
from distgrad.storage import Storage

# A reader that asks for nothing for this long is the first to lose its hold.
QUIET_S = 2.0
# Parts of one reply, of a version that does not fit into one. Short replies make the beginning come soon, stay in the
# reader's cache until they are copied, and are little to keep where they are copied here, one or a few for each reader.
SERVED_PARTS = 3
# A hold keeps a view of every part: who asks again and again without reading on must not fill the memory with them.
MAX_READERS = 256


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


def least_worth_keeping(readers: Sequence[Hold]) -> Storage:
    """Choose the version to take back: one whose readers all went quiet, else the one of which least has been read.

    Parameters
    ----------
    readers : sequence of Hold
        At least one.

    Returns
    -------
    Storage
        The version of some of them.
    """
    newest = max(hold.last_used for hold in readers)

    def worth(storage: Storage) -> tuple[bool, int]:
        those = [hold for hold in readers if hold.storage is storage]
        is_active = any(newest - hold.last_used <= QUIET_S for hold in those)
        return is_active, max(hold.parts_read for hold in those)

    return min((hold.storage for hold in readers), key=worth)
