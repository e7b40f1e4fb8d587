"""Descriptors that connections cannot take, so that whoever connects again and again keeps no file from being opened.

The system counts files and connections alike, and ZeroMQ accepts connections until there is no descriptor left, also
those of strangers whose handshake will fail two seconds later. So ``distgrad broker`` takes all descriptors that it may
have but for a few (`keep_spare`), and only where a file finds none left may it have those few too, for as long as the
opening takes (`with_spare`). A connection that comes at that very moment gets one of them, and keeps it for those two
seconds: so this is enough for some thirty files a second.

The limit belongs to the process, and so does what is remembered here. It is touched in a process that has called
`keep_spare`, and in no other.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

SPARE = 64
"""Descriptors that are kept back; a quarter of all, if those are few."""
# Tried in turn where the hard limit is "as many as you like", which is not meant: what Linux and macOS take.
_WITHOUT_LIMIT = (1 << 20, 10_240)

Result = TypeVar("Result")


class _Limit:
    """The soft limit of this process: low, but while somebody needs the spare ones."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.low = self.high = 0
        self.n_users = 0

    def __enter__(self) -> None:
        with self.lock:
            self.n_users += 1
            if self.n_users == 1:
                _set_soft(self.high)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.n_users -= 1
            if self.n_users == 0:
                _set_soft(self.low)


_limit = _Limit()


def keep_spare() -> None:
    """Let this process have as many descriptors as the hard limit allows, a few of them for files alone.

    Nothing happens where the system has no such limit, or does not let it be changed.
    """
    try:
        import resource
    except ModuleNotFoundError:  # not a POSIX system
        return
    try:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    except OSError:  # a filter of system calls
        return
    with _limit.lock:
        for high in (hard,) if hard != resource.RLIM_INFINITY else _WITHOUT_LIMIT:
            low = high - min(SPARE, high // 4)
            if _set_soft(high) and _set_soft(low):
                _limit.low, _limit.high = low, high
                return


def with_spare(call: Callable[[], Result]) -> Result:
    """Open something, with a descriptor that was kept back if there is no other.

    Parameters
    ----------
    call : callable
        Opens it; is called again if that failed for want of a descriptor.

    Returns
    -------
    object
        What the call gave.

    Raises
    ------
    OSError
        As the call does.
    """
    try:
        return call()
    except OSError as error:
        if error.errno != errno.EMFILE or not _limit.high:
            raise
    with _limit:
        return call()


def _set_soft(soft: int) -> bool:
    """Set the soft limit, if that can be done; somebody else may have lowered the hard one."""
    import resource  # which Windows lacks

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return True
    return False
