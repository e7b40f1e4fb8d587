"""Telling in the log, once, what a call waits for that takes long: one that waits looks just like one that hangs."""

from __future__ import annotations

import logging

from distgrad import log
from distgrad.link_history import cause_of
from distgrad.sockets import Link

_LOGGER = logging.getLogger(__name__)

# A broker that is there answers within milliseconds; one that starts at the same time, within a second or two.
TELL_S = 3.0


class Patience:
    """What one call that waits has told.

    Parameters
    ----------
    endpoint : str
        The broker's.
    timeout : float
        After how long without an answer the call gives up, seconds.
    """

    __slots__ = ("_endpoint", "_timeout", "_told")

    def __init__(self, endpoint: str, timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._told: set[str] = set()

    def note_silence(self, silent_s: float, link: Link | None) -> None:
        """Tell that the broker does not answer, if that has lasted.

        Parameters
        ----------
        silent_s : float
            For how long, seconds.
        link : Link or None
            What happened to the connection last.
        """
        if silent_s >= TELL_S:
            self._tell(
                "no answer from the broker yet",
                address=self._endpoint,
                cause=cause_of(link),
                gives_up_after_s=self._timeout,
            )

    def note_rest(self, waited_s: float, *, is_running: bool) -> None:
        """Tell that the broker answers and applies nothing, if that is so and has lasted.

        Parameters
        ----------
        waited_s : float
            For how long, seconds.
        is_running : bool
            Whether its updater runs.
        """
        if waited_s >= TELL_S and not is_running:
            self._tell("gradients wait: the broker's updater is stopped, `distgrad admin start` starts it")

    def _tell(self, phrase: str, **fields: object) -> None:
        if phrase not in self._told:
            self._told.add(phrase)
            log.event(_LOGGER, logging.WARNING, phrase, **fields)
