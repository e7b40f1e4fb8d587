"""Asking a broker how it does, again and again, and keeping what it said."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from distgrad.admin import Admin
from distgrad.errors import DistgradError
from distgrad.seeing.history import History, Sight

if TYPE_CHECKING:
    from distgrad.keys import ClientKeys

# Long enough for a broker that is in the middle of a large update, short enough to tell that it is gone.
ANSWER_WITHIN_S = 5.0


class Watcher:
    """A broker that is looked at; threads may share it.

    Parameters
    ----------
    address : str
        The broker's control address.
    keys : path or ClientKeys, optional
        Of role admin or read, for a broker that has keys.
    timeout : float, seconds
        How long an answer may take.
    clock : callable
        Gives seconds since the epoch.
    """

    def __init__(
        self,
        address: str,
        keys: str | os.PathLike[str] | ClientKeys | None = None,
        timeout: float = ANSWER_WITHIN_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        # Two connections: a stop that waits for the queue to drain must not keep anybody from looking on.
        self._eyes = Admin(address, keys, timeout)
        self._hands = Admin(address, keys, timeout)
        self._clock = clock
        self._lock = threading.Lock()
        self.history = History()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._eyes.close()
        self._hands.close()

    @property
    def address(self) -> str:
        """The broker's control endpoint."""
        return self._eyes.address

    @property
    def admin(self) -> Admin:
        """What changes something at the broker; it does not get in the way of `look`."""
        return self._hands

    def look(self) -> Sight:
        """Ask once.

        Returns
        -------
        Sight
            With `Sight.error` set if there was no answer, or a refusal.

        Raises
        ------
        DistgradError
            If that is so from the first look on.
        """
        with self._lock:
            try:
                status, workers = self._eyes.status(), self._eyes.workers()
            except DistgradError as error:
                if not self.history.sight.status:
                    raise  # what is wrong from the beginning is the address, or the key
                return self.history.miss(self._clock(), str(error))
            return self.history.add(self._clock(), status, workers)
