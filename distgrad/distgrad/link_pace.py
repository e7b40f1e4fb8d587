"""How fast a client's link brings large replies, and so how long to wait before asking again.

A repeat that overtakes a slow transfer doubles the load of the slow link. So repeats wait as long as the bytes take at
this pace, which follows what was measured on this link: half of it, within bounds.
"""

from __future__ import annotations

FASTEST_BYTES_PER_S = 10e6
_SLOWEST_BYTES_PER_S = 64 * 1024.0
# What is smaller tells more of the round trip than of the pace.
_LARGE_BYTES = 1024 * 1024


class LinkPace:
    """The pace of one link.

    Attributes
    ----------
    bytes_per_s : float
        What to reckon with.
    received_bytes : int
        All that replies have brought so far.
    """

    __slots__ = ("bytes_per_s", "received_bytes")

    def __init__(self) -> None:
        self.bytes_per_s = FASTEST_BYTES_PER_S
        self.received_bytes = 0

    def miss(self, expected_bytes: int) -> None:
        """Note that a reply has not come in time.

        Parameters
        ----------
        expected_bytes : int
            How long it would have been.
        """
        if expected_bytes >= _LARGE_BYTES:
            self.bytes_per_s = max(self.bytes_per_s / 2, _SLOWEST_BYTES_PER_S)

    def note(self, received: int, before: int, elapsed_s: float) -> None:
        """Note a reply.

        Parameters
        ----------
        received : int
            Its bytes.
        before : int
            `received_bytes` when it was asked for: replies to earlier requests share the link with it.
        elapsed_s : float, seconds
            Since then.
        """
        self.received_bytes += received
        if received >= _LARGE_BYTES:
            measured = (self.received_bytes - before) / max(elapsed_s, 1e-6)
            self.bytes_per_s = min(max(measured / 2, _SLOWEST_BYTES_PER_S), FASTEST_BYTES_PER_S)
