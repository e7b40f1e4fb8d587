"""Requests whose reply is not due yet, and until when each may wait."""

from __future__ import annotations

import heapq
from typing import Any

from distgrad_broker.events import Envelope
from distgrad_broker.requests import ClientKey


class Waiter:
    """A request whose reply is not due yet.

    Parameters
    ----------
    envelope : tuple of bytes
        The way back to its client.
    request_id : int or None
        The number that its client gave it.
    client : tuple, optional
        The key's user and the client's name, by which a repeat is recognised; None if it gave none.
    deadline : float
        When it must be answered, in seconds on the shell's clock.
    """

    __slots__ = (
        "client",
        "data",
        "deadline",
        "envelope",
        "give_up",
        "is_done",
        "on_deadline",
        "on_repeat",
        "request_id",
        "session",
    )

    def __init__(self, envelope: Envelope, request_id: int | None, client: ClientKey | None, deadline: float) -> None:
        self.envelope = envelope
        self.request_id = request_id
        self.client = client
        self.deadline = deadline
        self.is_done = False
        self.data: Any = None
        # Whose lane may have the reply as well.
        self.session: str | None = None
        self.on_deadline: Any = None
        # Called with the time when its client asks again, after it was told to.
        self.on_repeat: Any = None
        # Called if it is not to be answered any more.
        self.give_up: Any = None


class Deadlines:
    """Until when requests wait."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiter]] = []
        self._made = 0

    def wait(self, waiter: Waiter, on_deadline: Any) -> None:
        """Let a request wait.

        Parameters
        ----------
        waiter : Waiter
            Who waits, until its deadline at the latest.
        on_deadline : callable
            Called with the waiter and the time when the deadline has come.
        """
        waiter.on_deadline = on_deadline
        self._made += 1
        heapq.heappush(self._heap, (waiter.deadline, self._made, waiter))

    def next(self) -> float | None:
        """Tell when the next waiting request must be answered.

        Returns
        -------
        float or None
            Seconds on the shell's clock; None if nobody waits.
        """
        while self._heap and self._heap[0][2].is_done:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[Waiter]:
        """Take out the requests whose deadline has come.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        list of Waiter
            Not answered yet.
        """
        due = []
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].is_done):
            waiter = heapq.heappop(self._heap)[2]
            if not waiter.is_done:
                due.append(waiter)
        return due
