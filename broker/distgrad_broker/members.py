"""The workers that the broker knows: identity, session, place in the numbering, lease and counters.

States of a member: *live* (its lease runs), *silent* (the lease ran out; everything but membership and grant is kept),
*left* (it said goodbye). A session is named ``incarnation:counter``; a newer process under the same id gets a
higher counter, and whatever still arrives from the older one is dropped or answered ``fenced`` (PROTOCOL 4, 5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from distgrad.durable.books import LEFT, LIVE, SILENT, Lineage
from distgrad.errors import GradientRefused
from distgrad.wire import Gradient
from distgrad_broker.requests import RequestError
from distgrad_broker.sessions import parse_session, superseded

# A decision that waits for its turn: what the gradient is charged, its outcome, why it was refused, and its cursor.
Decided = tuple[int, str, GradientRefused | None, bytes | str | None]

# A hello that was delayed on its way must not bring a superseded process back; this many are remembered for each id.
PAST_NONCES = 8
# Refusals that a worker has not yet acknowledged; the counters tell of all.
MAX_PENDING_REFUSALS = 64


class Member:
    """One worker id, from its first hello on.

    Parameters
    ----------
    worker : str
        The id.
    user : str or None
        Whose key said hello; None without keys.
    generated : bool
        Whether the id was made up by its process.
    """

    def __init__(self, worker: str, user: str | None, generated: bool) -> None:
        self.worker = worker
        self.user = user
        self.generated = generated
        self.state = LIVE
        self.session = ""
        self.counter = 0
        self.nonce = b""
        self.past_nonces: deque[bytes] = deque(maxlen=PAST_NONCES)
        # The session of an earlier incarnation that the current process presented, as (incarnation, counter).
        self.origin: tuple[str, int] | None = None
        self.expires = 0.0
        self.last_seen = 0.0
        # Numbering: accepted is the last number taken in, decided the last one of which it is known what becomes of it,
        # settled the last one that is acknowledged (with a data folder, when the disk has it).
        self.accepted = 0
        self.decided = 0
        self.settled = 0
        # The newest attempt seen.
        self.attempt = 0
        self.missing = False
        # Whether it sent a gradient that is yet to come again: computed on a version that a crash took back.
        self.is_early = False
        # The last number that the policy has seen; what was decided of numbers behind one that is held.
        self.judged = 0
        self.ahead: dict[int, Decided] = {}
        # Whether the current session took numbers over from an earlier incarnation, whose history is lost.
        self.adopted = False
        # Before that: the last number whose effect is still there, from a checkpoint.
        self.adopted_behind = 0
        self.sent = 0
        # Highest number that the worker has said it knows to be settled.
        self.known = 0
        # Where its worker stands in its data, after the last number accepted and after the last one decided.
        self.cursor: bytes | str | None = None
        self.decided_cursor: bytes | str | None = None
        # Without a journal of gradients: the last number that an earlier broker's journal has, and the cursor there.
        self.kept = 0
        self.kept_cursor: bytes | str | None = None
        # Grants, in bytes (see `grants`).
        self.queued_bytes = 0
        self.promised = 0
        self.committed = 0
        self.grant_seq = 0
        self.want = 0
        # What the worker has not been told yet: [number, reason, leaf, message].
        self.refusals: deque[tuple[int, str, str | None, str]] = deque(maxlen=MAX_PENDING_REFUSALS)
        self.waiting: Any = None
        # The last pull of the current session, which a gradient may ask for again.
        self.last_pull: Any = None
        # Slots of shared memory of the current session that the broker is attached to.
        self.slots: Sequence[int] = ()
        # Counters for status.
        self.applied = 0
        self.superseded = 0
        self.refused = 0
        self.cleared = 0
        self.repeated = 0
        self.dropped = 0
        self.examples = 0
        self.loss: float | None = None
        self.staleness: int | None = None
        self.staleness_sum = 0
        self.staleness_max = 0
        self.received_bytes = 0

    @property
    def kept_place(self) -> tuple[int, bytes | str | None]:
        """Number and cursor behind which its gradients are lost if this broker dies and no journal has them."""
        return (self.kept, self.kept_cursor) if self.kept > self.decided else (self.decided, self.decided_cursor)

    def describe(self, now: float) -> dict[str, Any]:
        """Give what `workers` tells of this member.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        dict
            Names and numbers, ready for msgpack.
        """
        return {
            "id": self.worker,
            "state": self.state,
            "session": self.session,
            "accepted": self.accepted,
            "settled": self.settled,
            "applied": self.applied,
            "superseded": self.superseded,
            "refused": self.refused,
            "cleared": self.cleared,
            "repeated": self.repeated,
            "dropped": self.dropped,
            "queued_bytes": self.queued_bytes,
            "grant_bytes": self.promised,
            "received_bytes": self.received_bytes,
            "examples": self.examples,
            "loss": self.loss,
            "staleness": self.staleness,
            "staleness_mean": self.staleness_sum / self.applied if self.applied else 0.0,
            "staleness_max": self.staleness_max,
            "attempt": self.attempt,
            "last_seen_s": max(0.0, now - self.last_seen),
            "user": self.user,
        }


class Members:
    """The table of members, and the rules by which a hello gets its session.

    Parameters
    ----------
    incarnation : str
        Of this broker.
    limit : int
        How many ids are remembered at most.
    lease_s : float
        Seconds without a sign of life after which a member is silent.
    """

    def __init__(self, incarnation: str, limit: int, lease_s: float) -> None:
        self._incarnation = incarnation
        # The brokers before this one, by which sessions of theirs are told apart.
        self.lineage = Lineage()
        self._limit = limit
        self.lease_s = lease_s
        self._by_id: dict[str, Member] = {}
        self._live_ids: frozenset[str] | None = None
        self._counter = 0

    def __iter__(self) -> Iterator[Member]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, worker: str) -> Member | None:
        """Find a member by id.

        Parameters
        ----------
        worker : str
            The id.

        Returns
        -------
        Member or None
            None if it is not known.
        """
        return self._by_id.get(worker)

    def of(self, gradient: Gradient) -> Member:
        """Find the member that an accepted gradient belongs to.

        Parameters
        ----------
        gradient : Gradient
            Queued or held.

        Returns
        -------
        Member
            A member with something unsettled is never forgotten.
        """
        return self._by_id[gradient.worker]

    @property
    def live_ids(self) -> frozenset[str]:
        """Ids of the members whose lease runs."""
        if self._live_ids is None:
            self._live_ids = frozenset(member.worker for member in self.live())
        return self._live_ids

    def live(self) -> list[Member]:
        """List the members whose lease runs.

        Returns
        -------
        list of Member
            In the order in which they were first seen.
        """
        return [member for member in self._by_id.values() if member.state == LIVE]

    def greet(
        self, worker: str, nonce: bytes, previous: str | None, user: str | None, generated: bool
    ) -> tuple[Member, bool]:
        """Find or make the member that a hello is for, and its session.

        Parameters
        ----------
        worker : str
            The id.
        nonce : bytes
            Of the process.
        previous : str or None
            The last session that the process held.
        user : str or None
            Identity of the key on the connection.
        generated : bool
            Whether the id was made up, and can be forgotten once it has left.

        Returns
        -------
        member : Member
            With its session issued.
        is_new : bool
            Whether the id was not known.

        Raises
        ------
        RequestError
            ``forbidden`` (another key's id), ``fenced`` (a superseded process), ``too_many_workers``.
        """
        member = self._by_id.get(worker)
        if member is None:
            if len(self._by_id) >= self._limit:
                raise RequestError(
                    "too_many_workers",
                    f"at most {self._limit} worker ids are remembered; raise --max-workers or reuse ids",
                )
            member = self._by_id[worker] = Member(worker, user, generated)
            self._live_ids = None
            self._issue(member, nonce, previous)
            return member, True
        if member.user is None and user is not None:
            member.user = user  # from before there were keys: it belongs to the first that uses it
        if member.user != user:
            raise RequestError("forbidden", f"worker id {worker!r} belongs to another key")
        if nonce != member.nonce:
            if nonce in member.past_nonces or self._is_older(previous, member):
                raise RequestError("fenced", superseded(worker))
            self._issue(member, nonce, previous)
        elif not member.session:
            self._issue(member, nonce, previous)  # the process that an earlier incarnation knew
        return member, False

    def add(self, member: Member) -> None:
        """Put a member back that an earlier broker knew.

        Parameters
        ----------
        member : Member
            As it was then, without a session of this incarnation.
        """
        self._by_id[member.worker] = member
        self._live_ids = None

    def renew(self, member: Member, now: float, busy_s: float) -> bool:
        """Start a member's lease anew.

        Parameters
        ----------
        member : Member
            Who gave a sign of life.
        now : float
            Seconds on the shell's clock.
        busy_s : float
            Seconds that the loop has been busy so far; they do not count.

        Returns
        -------
        bool
            Whether it was silent, or had left, before.
        """
        was_silent = member.state != LIVE
        if was_silent:
            member.state, self._live_ids = LIVE, None
        member.last_seen = now
        member.expires = now - busy_s + self.lease_s
        return was_silent

    def expire(self, now: float, busy_s: float) -> list[Member]:
        """Mark as silent whoever has not been heard of for the length of a lease.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.
        busy_s : float
            Seconds that the loop has been busy so far; they do not count.

        Returns
        -------
        list of Member
            Those that became silent now.
        """
        lapsed = [m for m in self._by_id.values() if m.state == LIVE and now - busy_s >= m.expires]
        for member in lapsed:
            member.state, self._live_ids = SILENT, None
        return lapsed

    def leave(self, member: Member) -> None:
        """Let a member go; a made-up id is forgotten, a chosen one keeps its number and cursor.

        Parameters
        ----------
        member : Member
            Who leaves; nothing of its is queued.
        """
        member.state, self._live_ids = LEFT, None
        member.past_nonces.append(member.nonce)
        member.session, member.nonce = "", b""
        if member.generated:
            del self._by_id[member.worker]

    def evict(self, member: Member) -> None:
        """End a member's session and lease, as if a newer process had come and gone.

        Parameters
        ----------
        member : Member
            Who has not left.
        """
        self._issue(member, b"evicted:%d" % self._counter, None)
        member.state, self._live_ids = SILENT, None

    def _issue(self, member: Member, nonce: bytes, previous: str | None) -> None:
        is_same_process = nonce == member.nonce
        if member.nonce and not is_same_process:
            member.past_nonces.append(member.nonce)
        self._counter += 1
        member.counter = self._counter
        member.session = f"{self._incarnation}:{self._counter}"
        member.nonce = nonce
        origin = parse_session(previous)
        # A process may not have heard of its last session; then the one that is stored is the newer one.
        if not (is_same_process and member.origin is not None):
            member.origin = origin if origin is not None and origin[0] != self._incarnation else None
        member.attempt = 0
        member.missing = False
        member.adopted = False
        member.is_early = False
        if not is_same_process:
            member.refusals.clear()  # of another process's gradients
        member.waiting = member.last_pull = None

    def _is_older(self, previous: str | None, member: Member) -> bool:
        """Tell whether a process that presents this session was superseded by the member's current one."""
        session = parse_session(previous)
        if session is None:
            return False
        incarnation, counter = session
        if incarnation == self._incarnation:
            return counter < member.counter
        if member.origin is None:
            return True  # the current process came after the restart, this one is from before
        rank, own_rank = self.lineage.rank(incarnation), self.lineage.rank(member.origin[0])
        if incarnation != member.origin[0] and rank < 0:
            return False  # of a broker that left no trace, or whose work was set aside
        return (rank, counter) < (own_rank, member.origin[1])
