"""What gets lost between a worker and its broker: when to send again, when to give up, what a restart has cost.

The session asks; nothing here sends, and time is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distgrad.errors import BrokerRestarted, DeliveryFailed, HistoryLost

# No progress for this long, plus the time that the bytes in flight take at a slow link's pace, doubled with each
# attempt, begins a new attempt. A connection that visibly broke does not wait for this.
STALL_S = 2.0
SLOW_BYTES_PER_S = 1e6
# The same gradient sent this often, while control answers, means that something between here and the broker drops it.
MAX_TRIES = 5
# A connection that is reset may be so five times within milliseconds. From the third time in vain on there is a pause
# before the gradient is sent again, and a longer one after each.
FIRST_PAUSE_S, PAUSE_GROWTH = 0.5, 4


class Progress:
    """How far the broker has got with what was sent, and how often the next one was sent in vain.

    Attributes
    ----------
    accepted : int
        The last number that the broker is known to have.
    since : float
        When it last got on, or last had nothing to get on with, in seconds on the shell's clock.
    resend_at : float
        Nothing is sent before.
    """

    def __init__(self) -> None:
        self.accepted = 0
        self.since = 0.0
        self.resend_at = -math.inf
        self._tries = 0
        self._tried_after = -1

    @property
    def is_in_doubt(self) -> bool:
        """Whether to send one gradient alone, and the next once it is there: all of them were sent twice in vain.

        A connection that breaks after so many bytes may take all of them with it, each time that all are sent at once:
        a reset drops what either kernel has not passed on.
        """
        return self._tries > 1

    def hear(self, accepted: int, now: float, *, is_news: bool) -> None:
        """Take in how far the broker has got.

        Parameters
        ----------
        accepted : int
            The last number that it has.
        now : float
            Seconds on the shell's clock.
        is_news : bool
            Whether something arrived otherwise: it settled something, or told that it cannot take it yet.
        """
        if is_news or accepted > self.accepted:
            self.since = now
            self._tries = 0  # what arrives is not lost, even if crash after crash has it sent again
            self.resend_at = -math.inf
        self.accepted = max(self.accepted, accepted)

    def is_stalled(self, in_flight_bytes: int, now: float) -> bool:
        """Tell whether to stop waiting for something that is on the way, and to send it again.

        Parameters
        ----------
        in_flight_bytes : int
            All that is on the way: a slow link needs its time.
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        bool
            True if there was no progress for too long.
        """
        patience_s = (STALL_S + in_flight_bytes / SLOW_BYTES_PER_S) * 2 ** max(0, self._tries - 1)
        return bool(now - self.since > patience_s)

    def count_try(self, accepted: int, gradients: str, now: float) -> DeliveryFailed | None:
        """Count that the gradient after the last accepted one was sent in vain.

        Parameters
        ----------
        accepted : int
            The last number that the broker has.
        gradients : str
            Where it was sent, for the message.
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        DeliveryFailed or None
            What ends the session, if it was the last try.
        """
        self._tries = self._tries + 1 if accepted == self._tried_after else 1
        self._tried_after = accepted
        if self._tries < MAX_TRIES:
            pauses = self._tries - 3
            self.resend_at = now + FIRST_PAUSE_S * PAUSE_GROWTH**pauses if pauses >= 0 else -math.inf
            return None
        return DeliveryFailed(
            f"gradient {accepted + 1} was sent {self._tries} times and never arrived, while the control channel "
            f"answers: is {gradients} reachable from here?",
            hint="pass gradients= if the broker's gradients port is forwarded",
        )


def settles_on_disk(header: Mapping[str, Any]) -> bool:
    """Tell whether a broker settles only what is on its disk.

    Parameters
    ----------
    header : mapping
        Of its reply to a `hello`.

    Returns
    -------
    bool
        False also for one that knows of no such thing.
    """
    return bool(header.get("durability", "none") != "none")


def cost_of_restart(
    worker_id: str, settled: int, accepted: int, *, is_adopted: bool, is_durable: bool, kept: int | None = None
) -> HistoryLost | BrokerRestarted | None:
    """Tell what a restart of the broker has cost a worker (PROTOCOL 6).

    Parameters
    ----------
    worker_id : str
        Whose.
    settled : int
        How far its gradients were settled before.
    accepted : int
        The last number that the new incarnation has.
    is_adopted : bool
        Whether the new incarnation took the worker's own word for its numbers, for want of any memory.
    is_durable : bool
        Whether it settles only what is on its disk.
    kept : int, optional
        The last number whose effect is in the checkpoint that it began with; None if it has no data folder.

    Returns
    -------
    HistoryLost or BrokerRestarted or None
        What ends the session; what the user is told once; or None if the new incarnation has all that was settled.
    """
    if accepted < settled and not is_adopted:
        return HistoryLost(
            "history_lost",
            f"the broker has {accepted} gradients of {worker_id!r}, but had settled {settled}: "
            "its data folder is older than what it had acknowledged",
        )
    if is_durable or (not is_adopted and settled > 0):
        return None
    first = (kept or 0) + 1
    if first <= settled:
        what = f"the effect of gradients {first} to {settled} of this worker is gone"
    else:
        what = "it has all that was settled of this worker" if settled else "none was settled"
    source = "kept nothing on disk" if kept is None else "went back to its newest checkpoint"
    error = BrokerRestarted(
        "restarted",
        f"the broker was restarted and {source}: {what}",
        hint="initialize() offers parameters if there are none; this error is raised once and the worker can go on",
    )
    error.lost = (first, settled) if first <= settled else None
    return error
