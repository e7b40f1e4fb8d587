"""What happened to a client's connections, and so why a broker does not answer."""

from __future__ import annotations

from distgrad.sockets import Link, LinkMonitor

# What the last change of the connection says about silence; the sentence goes into the error, then a hint.
_SILENT = ("the broker is silent", "is it stopped, overloaded, or is something else listening there?")
_CAUSES: dict[Link | None, tuple[str, str]] = {
    None: ("no connection came about", "is the host right, and does a firewall drop packets to the port?"),
    Link.ABSENT: ("nobody listens there", "is the broker running, and is this its control address?"),
    Link.LOST: ("the connection was lost", "is the broker still running?"),
    Link.REFUSED: ("the broker does not accept the key", "was it made for this broker, or revoked?"),
    Link.NO_KEYS: ("one side has keys and the other has none", "keys are given as keys= or --keys FILE"),
    Link.UNFINISHED: (
        "the handshake was not finished",
        "is it a broker's control address, and do both sides have keys, this broker's, or neither?",
    ),
}
_DEFINITE = frozenset({Link.REFUSED, Link.NO_KEYS})


def cause_of(link: Link | None) -> str:
    """Say why a broker does not answer.

    Parameters
    ----------
    link : Link or None
        What happened to the connection last.

    Returns
    -------
    str
        A sentence without its end.
    """
    return _CAUSES.get(link, _SILENT)[0]


class LinkHistory:
    """Follows the sockets that a client uses one after the other.

    Attributes
    ----------
    was_cut : bool
        Whether the present socket lost a connection that it had: what was under way on it is gone.
    number : int
        Another one whenever there may be another connection.
    """

    def __init__(self) -> None:
        self.was_cut = False
        self.number = 0
        self._monitor: LinkMonitor | None = None
        self._was_up = False
        self._last: Link | None = None

    def follow(self, monitor: LinkMonitor | None) -> None:
        """Watch another socket from now on.

        Parameters
        ----------
        monitor : LinkMonitor or None
            The new socket's; None while there is none.
        """
        self._monitor = monitor
        self.number += 1
        self._was_up = self.was_cut = False

    def note(self) -> None:
        """Take in what has happened since the last call."""
        if self._monitor is None:
            return
        for link in self._monitor.drain():
            self.number += 1
            if link is Link.UP:
                self._was_up = True
            elif link is Link.LOST and self._was_up:
                self.was_cut = True
            elif link in (Link.LOST, Link.UNFINISHED):
                # Ended before it was up. If a definite cause was told, on this try or a former one, it stays.
                link = self._last if self._last in _DEFINITE else Link.UNFINISHED
            self._last = link

    def explain(self, *, has_keys: bool) -> tuple[str, str]:
        """Tell why there is no answer.

        Parameters
        ----------
        has_keys : bool
            Whether the client has keys.

        Returns
        -------
        cause : str
            What is known.
        hint : str
            What to look at next.
        """
        cause, hint = _CAUSES.get(self._last, _SILENT)
        if self._last is Link.NO_KEYS:
            cause += ": only this client has them" if has_keys else ": this client has none"
        return cause, hint
