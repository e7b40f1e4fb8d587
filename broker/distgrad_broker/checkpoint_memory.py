"""What the core remembers of the checkpoints that are written; when one is due is for `checkpoints` to say."""

from __future__ import annotations

from collections.abc import Callable


class Checkpoints:
    """What is known of the checkpoints that are written.

    Attributes
    ----------
    last : int
        Ticket of the last one begun.
    token : str or None
        Holds the version that is being written; None if none is, or there are no parameters.
    is_under_way, is_wanted, is_final : bool
        Whether one is being written; whether somebody waits for the next one; whether the one at the end was begun.
    version, sequence, bytes : int
        What the last one begun covers.
    begun_at, ended_at, retry_at : float
        Seconds on the shell's clock.
    path, written_version, written_at : str, int, float
        The last one that was written whole; None, None and 0 if there is none.
    error, failures : str or None, int
        Why the last one could not be written, and how many in a row could not.
    waiting : list
        Who waits for one: ticket, and what is then called with the error or None.
    """

    def __init__(self) -> None:
        self.last = 0
        self.token: str | None = None
        self.is_under_way = self.is_wanted = self.is_final = False
        self.version = self.sequence = self.bytes = 0
        self.generation = 0
        self.begun_at = self.ended_at = self.retry_at = 0.0
        self.path: str | None = None
        self.written_version: int | None = None
        self.written_at = 0.0
        self.error: str | None = None
        self.failures = 0
        self.waiting: list[tuple[int, Callable[[str | None], None]]] = []
