"""Whom a worker's request speaks for."""

from __future__ import annotations

from distgrad.durable.books import LEFT
from distgrad.wire import field
from distgrad_broker.events import RequestReceived
from distgrad_broker.members import Member
from distgrad_broker.requests import RequestError
from distgrad_broker.sessions import superseded
from distgrad_broker.state import CoreState


def member_of(state: CoreState, request: RequestReceived) -> Member:
    """Find the member that a request speaks for; its session must be the current one (PROTOCOL 4).

    Parameters
    ----------
    state : CoreState
        The core's memory.
    request : RequestReceived
        As it came.

    Returns
    -------
    Member
        The worker.

    Raises
    ------
    RequestError
        ``unknown_worker``, ``forbidden`` or ``fenced``.
    MalformedMessage
        If it names no worker and session.
    """
    worker: str = field(request.header, "worker", str)
    session: str = field(request.header, "session", str)
    member = state.members.get(worker)
    if member is None or member.state == LEFT or session.partition(":")[0] != state.incarnation:
        raise RequestError("unknown_worker", f"no session of worker {worker!r:.80} here; say hello")
    if member.user != request.user:
        raise RequestError("forbidden", f"worker id {worker!r:.80} belongs to another key")
    if session != member.session:
        raise RequestError("fenced", superseded(worker))
    return member


def user_of(state: CoreState, worker: str, session: str) -> str | None:
    """Tell whose a session is.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    worker, session : str
        The worker, and the session that it should have.

    Returns
    -------
    str or None
        The user of its key; None without keys.

    Raises
    ------
    KeyError
        If there is no such session.
    """
    member = state.members.get(worker)
    if member is None or member.session != session:
        raise KeyError(session)
    return member.user
