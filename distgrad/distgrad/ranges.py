"""Parts of parameters: asked for in ranges, a few ahead, and copied each to its place in an arena."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrad import wire
from distgrad.client import ControlClient
from distgrad.errors import MalformedMessage
from distgrad.requests_sent import Pending

# Ranges under way at a time. On loopback three keep the link busy; where the round trip is long, more would help.
RANGES_AHEAD = 3


class Ranges:
    """The rest of a version, asked for in ranges that are as long as the last reply was.

    A reply may have another length than that. What comes twice is left out; where one was too short, those that were
    asked for behind it are of no use, and it goes on from there.

    Parameters
    ----------
    client : ControlClient
        Whom to ask, in one conversation.
    token : str or None
        Of the version.
    n_received, n_parts : int
        How many parts have come, and how many there are.
    timeout : float or None
        For each request, seconds.
    """

    def __init__(
        self, client: ControlClient, token: str | None, n_received: int, n_parts: int, timeout: float | None
    ) -> None:
        self._client = client
        self._token = token
        self._timeout = timeout
        self._n_parts = n_parts
        self._n_received = self._n_asked = n_received
        self._length = n_received or wire.RANGE_PARTS
        self._under_way: deque[tuple[int, Pending]] = deque()

    @property
    def is_complete(self) -> bool:
        """Whether all parts have come, and no reply is on its way."""
        return self._n_received >= self._n_parts and not self._under_way

    def ask(self) -> None:
        """Ask for what comes next, as far ahead as is worth it."""
        while self._n_asked < self._n_parts and len(self._under_way) < RANGES_AHEAD:
            reply_bytes = min(self._n_parts - self._n_asked, self._length) * wire.PART_BYTES
            pending = self._client.send(
                "range", token=self._token, first=self._n_asked, reply_bytes=reply_bytes, timeout=self._timeout
            )
            self._under_way.append((self._n_asked, pending))
            self._n_asked += self._length

    def receive(self) -> list[memoryview]:
        """Wait for the next reply.

        Returns
        -------
        list of memoryview
            The parts in it that had not come before; perhaps none.

        Raises
        ------
        MalformedMessage
            If it has no parts at all.
        """
        first, pending = self._under_way.popleft()
        parts = self._client.receive(pending).frames
        if not parts:
            raise MalformedMessage(f"a range from part {first} of {self._n_parts} came without parts")
        if first > self._n_received:
            return []
        self._length = len(parts)
        parts = parts[self._n_received - first :]
        self._n_received += len(parts)
        next_first = self._under_way[0][0] if self._under_way else self._n_asked
        self._n_asked = self._n_received if self._n_received < next_first else max(self._n_asked, self._n_received)
        return parts


class Places:
    """Where the next part goes. A part may have any size, as long as it does not span arenas (``docs/wire.md``).

    Parameters
    ----------
    arenas : sequence of ndarray, 1-D
        Written to.
    """

    def __init__(self, arenas: Sequence[np.ndarray[Any, Any]]) -> None:
        self._left = [arena.view(np.uint8) for arena in reversed(arenas)]
        self._drop_full()

    def fill(self, parts: Sequence[memoryview]) -> None:
        """Copy parts to their places.

        Parameters
        ----------
        parts : sequence of memoryview
            The next ones.

        Raises
        ------
        MalformedMessage
            If one does not fit where it belongs.
        """
        for part in parts:
            source = np.frombuffer(part, np.uint8)
            if not self._left or source.size > self._left[-1].size:
                raise MalformedMessage("a reply has more bytes than its layout, or a part that spans arenas")
            # NumPy's copy lets other threads of the program run meanwhile, a memoryview's does not.
            self._left[-1][: source.size] = source
            self._left[-1] = self._left[-1][source.size :]
            self._drop_full()

    def check_full(self) -> None:
        """Raise if a part is missing.

        Raises
        ------
        MalformedMessage
            If one is.
        """
        if self._left:
            missing = sum(rest.size for rest in self._left)
            raise MalformedMessage(f"replies have {missing} bytes less than their layout")

    def _drop_full(self) -> None:
        while self._left and self._left[-1].size == 0:
            self._left.pop()
