"""Handing out parameters: `get` with its wait for news, and `range` for the rest of a large reply (PROTOCOL 14, 15)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distgrad.errors import MalformedMessage
from distgrad.wire import Gradient, State, field, parse_state
from distgrad_broker import leasing
from distgrad_broker.events import RequestReceived
from distgrad_broker.members import Member
from distgrad_broker.requests import RequestError
from distgrad_broker.state import CoreState
from distgrad_broker.waiting import Waiter

MAX_WAIT_S = 5.0
# A pull that waits for its turn to read a large version is tried this often,
TURN_CHECK_S = 0.005
# and after this long the reader that is least far loses its version.
TURN_WAIT_S = 1.0


class PullWait:
    """What a waiting pull asked for.

    Parameters
    ----------
    newer_than : State or None
        What its client has.
    have : int or None
        The layout that its client knows.
    worker : str or None
        The worker that asks, if one does: the policy may let it wait.
    pushed : int
        The last number that it has pushed, to be decided on before its pull.
    own : bool
        Whether the worker waits for that under every policy.
    is_near : bool
        Whether its client may be told where shared memory is.
    lessee : str or None
        The worker that will read there for a while.
    session : str or None
        The worker's, which is told how far its gradients are settled.
    """

    __slots__ = (
        "have",
        "is_near",
        "lessee",
        "newer_than",
        "own",
        "pushed",
        "queued_at",
        "session",
        "waits_since",
        "worker",
    )

    def __init__(
        self,
        newer_than: State | None,
        have: int | None,
        worker: str | None,
        pushed: int,
        *,
        own: bool,
        is_near: bool,
        lessee: str | None,
        session: str | None,
    ) -> None:
        self.newer_than = newer_than
        self.have = have
        self.worker = worker
        self.pushed = pushed
        self.own = own
        self.is_near = is_near
        self.lessee = lessee
        self.session = session
        # Since when it waits for its turn to read a large version, if it does, and since when its predecessor did.
        self.queued_at: float | None = None
        self.waits_since: float | None = None

    def behind(self, number: int) -> PullWait:
        """Wish for what a gradient is in, in the same form.

        Parameters
        ----------
        number : int
            Of that gradient.

        Returns
        -------
        PullWait
            Which has waited for nothing yet.
        """
        return PullWait(
            None,
            self.have,
            self.worker,
            number,
            own=True,
            is_near=self.is_near,
            lessee=self.lessee,
            session=self.session,
        )


def get(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Answer `get` now or let it wait for a newer version.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    request : RequestReceived
        As it came.
    waiter : Waiter
        To answer.
    now : float
        Seconds on the shell's clock.

    Raises
    ------
    RequestError
        ``no_parameters``.
    MalformedMessage
        If a key has an impossible value.
    """
    header = request.header
    newer_than = header.get("newer_than")
    have: int | None = header.get("have")
    if have is not None and type(have) is not int:
        raise MalformedMessage(f"'have' must be a fingerprint or nil, got {have!r:.40}")
    wait_s = min(field(header, "wait_s", float, 0.0, low=0), MAX_WAIT_S)
    worker: str | None = field(header, "worker", str, None)
    pushed: int = field(header, "pushed", int, 0, low=0)
    host: str | None = field(header, "host", str, None)
    is_near = host is not None and host == state.settings.host
    wants_lease = is_near and field(header, "lease", bool, False)
    lessee = worker if wants_lease and leasing.may_lease(state, worker, request.user) else None
    known = None if newer_than is None else parse_state(newer_than)
    own: bool = field(header, "own", bool, False)
    session: str | None = field(header, "session", str, None)
    wanted = PullWait(known, have, worker, pushed, own=own, is_near=is_near, lessee=lessee, session=session)
    if state.versions.layout is None:
        raise RequestError("no_parameters", "no parameters were set yet; use set, or initialize from a worker")
    waiter.data = wanted
    member = None if worker is None else state.members.get(worker)
    if member is not None and member.session == session and member.user == request.user and wait_s > 0:
        member.last_pull = (waiter, wait_s)
    _begin(state, waiter, wait_s, now)


def ask_again(state: CoreState, member: Member, gradient: Gradient, now: float) -> None:
    """Take a gradient that was accepted for its worker's last pull once more, which waits for that gradient.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    member : Member
        Whose.
    gradient : Gradient
        Which asks, and is not decided on.
    now : float
        Seconds on the shell's clock.
    """
    if member.last_pull is None:
        return  # whoever waits for the reply asks for itself after a while
    last, wait_s = member.last_pull
    if last.request_id is not None and gradient.asks is not None and gradient.asks <= last.request_id:
        return  # its client has asked by itself since, and would lose that reply for one that it does not wait for
    waiter = Waiter(last.envelope, gradient.asks, last.client, now)
    waiter.data = last.data.behind(gradient.number)
    waiter.session = member.session
    _wait(state, _replace(state, waiter), waiter, wait_s, now)


def _begin(state: CoreState, waiter: Waiter, wait_s: float, now: float) -> None:
    """Answer a pull, or let it wait."""
    key = _replace(state, waiter)
    if _is_due(state, waiter.data, now):
        _serve(state, key, waiter, now)
    elif wait_s <= 0:
        state.answer(waiter, _UNCHANGED)
    else:
        _wait(state, key, waiter, wait_s, now)


def _replace(state: CoreState, waiter: Waiter) -> Any:
    """Give a pull's key, and end the one that it is a repeat of: nobody listens for the former reply any more."""
    key = waiter.client or waiter.envelope
    former = state.pulls.pop(key, None)
    if former is not None:
        former.is_done = True
        waiter.data.waits_since = former.data.queued_at
    return key


def _wait(state: CoreState, key: Any, waiter: Waiter, wait_s: float, now: float) -> None:
    waiter.deadline = now + wait_s
    state.pulls[key] = waiter
    state.deadlines.wait(waiter, lambda late, _: _give_up(state, key, late))


def read_range(state: CoreState, request: RequestReceived, waiter: Waiter, now: float) -> None:
    """Answer `range`: the parts from one index on, of a version held under a token.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    request : RequestReceived
        As it came.
    waiter : Waiter
        To answer.
    now : float
        Seconds on the shell's clock.

    Raises
    ------
    RequestError
        ``revoked`` if the version is not held any more.
    MalformedMessage
        If a key has an impossible value.
    """
    token: str = field(request.header, "token", str)
    first: int = field(request.header, "first", int, low=0)
    found = state.versions.read(token, first, now)
    if found is None:
        raise RequestError("revoked", "the snapshot behind this token is gone; get again")
    state.answer(waiter, {"parts": found.n_parts, "first": first}, found.parts, lends=found.is_lent)
    if state.pulls:
        answer_all(state, now)


def answer_all(state: CoreState, now: float) -> None:
    """Answer the pulls that wait for what has just happened.

    Parameters
    ----------
    state : CoreState
        The core's memory.
    now : float
        Seconds on the shell's clock.
    """
    for key, waiter in list(state.pulls.items()):
        if state.versions.layout is None:
            del state.pulls[key]
            state.fail(waiter, RequestError("no_parameters", "the parameters were taken away"))
        elif _is_due(state, waiter.data, now):
            _serve(state, key, waiter, now)


def _is_due(state: CoreState, wanted: PullWait, now: float) -> bool:
    """Tell whether a pull is to be answered: there is something new, and the policy lets its worker have it."""
    if not _is_news(state, wanted):
        return False
    gates = state.policy.gates_pulls
    if wanted.worker is None or not (gates or wanted.own):
        return True
    member = state.members.get(wanted.worker)
    # A worker that has not said hello yet, to a broker just restarted, may have sent what is not here yet.
    if member is None or max(member.judged, member.decided) < wanted.pushed:
        return False
    return not gates or state.policy.may_pull(wanted.worker, state.situation(now))


def _is_news(state: CoreState, wanted: PullWait) -> bool:
    known = wanted.newer_than
    if known is None or known.incarnation != state.incarnation or known.generation != state.generation:
        return True
    return state.versions.version > known.version


def _serve(state: CoreState, key: Any, waiter: Waiter, now: float) -> None:
    layout, wanted = state.versions.layout, waiter.data
    assert layout is not None  # all callers have looked
    if wanted.is_near and (shared := state.versions.share()) is not None:
        places, small = shared
        state.pulls.pop(key, None)
        sends_layout = wanted.have != layout.fingerprint
        token = None if wanted.lessee is None else leasing.lease(state, wanted.lessee, now)
        if token is None:
            state.versions.expect_copy()
        answer = {**_UNCHANGED, "unchanged": False, "layout": sends_layout, "places": places, "token": token}
        answer |= _settled(state, wanted)
        state.answer(waiter, answer, [layout.to_frame(), *small] if sends_layout else small)
        return
    opened = state.versions.open(now)
    if opened is None:
        _queue(state, key, waiter, now)
        return
    state.pulls.pop(key, None)
    sends_layout = wanted.have != layout.fingerprint
    frames: Sequence[Any] = [layout.to_frame(), *opened.parts] if sends_layout else opened.parts
    fields = {
        "unchanged": False,
        "parts": opened.n_parts,
        "first": 0,
        "token": opened.token,
        "layout": sends_layout,
        **_settled(state, wanted),
    }
    state.answer(waiter, fields, frames, lends=opened.is_lent)


def _settled(state: CoreState, wanted: PullWait) -> dict[str, Any]:
    """Tell a worker that pulls what has become of its gradients: else a heartbeat would have to ask for it."""
    member = None if wanted.worker is None else state.members.get(wanted.worker)
    if member is None or member.session != wanted.session:
        return {}
    # Refusals are told by heartbeats, and nothing counts as settled to a worker before it knows of them.
    settled = member.refusals[0][0] - 1 if member.refusals else member.settled
    return {"settled": settled, "superseded": member.superseded}


def _queue(state: CoreState, key: Any, waiter: Waiter, now: float) -> None:
    """Let a pull wait for its turn: as many versions as fit in memory are being read."""
    state.pulls[key] = waiter
    if waiter.data.queued_at is not None:
        return
    waiter.data.queued_at = now if waiter.data.waits_since is None else waiter.data.waits_since
    # What frees a version is ZeroMQ's having sent it, and that is no event: so it is looked at again and again.
    waiter.deadline = now + TURN_CHECK_S

    def look_again(late: Waiter, then: float) -> None:
        if state.pulls.get(key) is not late:
            return
        if state.versions.layout is not None:
            _serve(state, key, late, then)
        if late.is_done:
            return
        waited_s = then - late.data.queued_at
        if waited_s > MAX_WAIT_S:
            del state.pulls[key]
            state.fail(late, RequestError("revoked", "too many versions are being read at once; get again"))
            return
        if waited_s > TURN_WAIT_S and then > state.relieved_at + TURN_WAIT_S:
            state.relieved_at = then
            state.versions.relieve()
        late.deadline = then + TURN_CHECK_S
        state.deadlines.wait(late, look_again)

    state.deadlines.wait(waiter, look_again)


def _give_up(state: CoreState, key: Any, waiter: Waiter) -> None:
    if state.pulls.get(key) is waiter:
        del state.pulls[key]
    state.answer(waiter, _UNCHANGED)


_UNCHANGED = {"unchanged": True, "parts": 0, "first": 0, "token": None, "layout": False}
