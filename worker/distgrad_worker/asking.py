"""What a session asks its broker for: the requests of its lease (PROTOCOL 6-11)."""

from __future__ import annotations

from typing import Any

from distgrad.wire import PROTOCOL_VERSION
from distgrad_worker.session import RESUMING, Session

HEARTBEAT_WAIT_S = 0.05


def hello(session: Session) -> dict[str, Any]:
    """Build a `hello`.

    Parameters
    ----------
    session : Session
        Whose.

    Returns
    -------
    dict
        The request's keys.
    """
    window = session.window
    lowest = window.lowest or (window.last + 1 if session.name else 0)
    return _request(session, "hello", nonce=session.nonce, lowest=lowest, generated=session.is_generated)


def heartbeat(session: Session) -> dict[str, Any]:
    """Build a `heartbeat`.

    Parameters
    ----------
    session : Session
        Whose.

    Returns
    -------
    dict
        The request's keys.
    """
    window = session.window
    return _request(
        session,
        "heartbeat",
        attempt=session.attempt,
        sent=window.sent,
        settled=window.settled,
        grant_seq=session.grant_seq,
        held=max(session.grant, window.in_flight_bytes),
        # What is numbered but not covered by a grant any more goes before a push that waits.
        want=window.unsent_charge or session.want,
        until=session.hurry,
        fingerprint=None if session.layout is None else session.layout.fingerprint,
        # A new attempt wants to know at once from where to send.
        wait_s=0.0 if session.phase == RESUMING or not session.is_busy else HEARTBEAT_WAIT_S,
    )


def leave(session: Session) -> dict[str, Any]:
    """Build a `leave`.

    Parameters
    ----------
    session : Session
        Whose.

    Returns
    -------
    dict
        The request's keys.
    """
    return _request(session, "leave", incarnation=session.state.incarnation if session.state else "")


def _request(session: Session, op: str, **keys: Any) -> dict[str, Any]:
    return {"v": PROTOCOL_VERSION, "op": op, "worker": session.worker_id, "session": session.name, **keys}
