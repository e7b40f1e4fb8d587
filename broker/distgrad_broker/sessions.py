"""The names of sessions, and what a process is told whose session is over."""

from __future__ import annotations


def superseded(worker: str) -> str:
    """Say why a process may not go on as this worker.

    Parameters
    ----------
    worker : str
        Its id.

    Returns
    -------
    str
        For people.
    """
    return f"a newer process runs as worker {worker!r:.80}, or an admin evicted it; this one must end"


def parse_session(session: str | None) -> tuple[str, int] | None:
    """Take a session's name apart.

    Parameters
    ----------
    session : str or None
        ``incarnation:counter``.

    Returns
    -------
    tuple of (str, int) or None
        None if it is no session's name.
    """
    if session is None:
        return None
    incarnation, _, counter = session.partition(":")
    return (incarnation, int(counter)) if counter.isdecimal() and counter.isascii() and len(counter) < 19 else None
