"""The version whose memory ZeroMQ reads from: parts of large replies are lent to it instead of copied.

A copy of 100 MB costs the loop more than sending it. But what is lent cannot be written to before the reader's
machine has taken it, and a frozen reader takes nothing: so one version is lent at a time, and while that one is not
given back, parts of others are copied. Memory then stays bounded whatever readers do (PROTOCOL 14).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from distgrad.storage import Storage


class Loans:
    """Keeps account of the views that ZeroMQ has not dropped yet."""

    def __init__(self) -> None:
        self._storage: Storage | None = None
        self._views: list[weakref.ref[memoryview]] = []

    def lend(self, storage: Storage, parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview] | None:
        """Lend parts of a version, if no other version is lent.

        Parameters
        ----------
        storage : Storage
            The version.
        parts : sequence of bytes or memoryview
            Views of its memory; bytes are copies and no loan.

        Returns
        -------
        list of bytes or memoryview
            The same parts, to be dropped by everybody but ZeroMQ once they are sent; None if they must be copied.
        """
        if self._storage is not storage and self.is_out():
            return None
        self._storage = storage
        lent = [part if isinstance(part, bytes) else memoryview(part) for part in parts]
        self._views += [weakref.ref(part) for part in lent if isinstance(part, memoryview)]
        return lent

    def covers(self, storage: Storage) -> bool:
        """Tell whether ZeroMQ may still read from a version.

        Parameters
        ----------
        storage : Storage
            The version.

        Returns
        -------
        bool
            True if it must not be written to.
        """
        return self._storage is storage and self.is_out()

    def is_out(self) -> bool:
        """Tell whether anything is lent.

        Returns
        -------
        bool
            True until ZeroMQ has sent all of it.
        """
        self._views = [view for view in self._views if view() is not None]
        if not self._views:
            self._storage = None
        return bool(self._views)
