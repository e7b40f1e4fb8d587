"""What the broker has let out: from then on it must be so, whatever dies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simulation.clockwork import Violation
from simulation.reference import Push, Reference


class Told:
    """What workers and administrators were told, over all brokers of a world.

    Attributes
    ----------
    settled : dict of str to int
        By worker: the highest number of which it was told that it is settled.
    sessions : dict of str to list of int
        By worker: the processes that were told of a session of their own, in order.
    generated : set of str
        Ids that were made up.
    """

    def __init__(self) -> None:
        self.settled: dict[str, int] = {}
        self.sessions: dict[str, list[int]] = {}
        self.generated: set[str] = set()
        # By worker: the newest session that somebody was told of, by incarnation and counter.
        self._newest: dict[str, tuple[int, int]] = {}
        self._accepted: dict[str, int] = {}
        self._outcomes: dict[tuple[str, int], tuple[str, str | None, bytes | str]] = {}
        self._executed: dict[tuple[bytes, int], tuple[list[Push], int]] = {}
        self._sequence = 0

    def heartbeat(self, worker: str, reply: Mapping[str, Any], reference: Reference) -> None:
        """Note that a worker was told how far it is settled, and what was refused."""
        own, settled = reference.workers[worker], reply["settled"]
        self.pull(worker, reply, reference)
        for number, reason, *_ in reply["refused"]:
            outcome = own.outcomes.get(number)
            if number <= settled and (outcome is None or outcome[:2] != ("refused", reason)):
                raise Violation(f"{worker} is told that {number} was refused ({reason}), but it was {outcome}")

    def pull(self, worker: str, reply: Mapping[str, Any], reference: Reference) -> None:
        """Note that a worker was told how far it is settled."""
        own, settled, before = reference.workers[worker], reply["settled"], self.settled.get(worker, 0)
        if settled > own.decided:
            raise Violation(f"{worker} is told that {settled} is settled, but {own.decided} is decided")
        for number in range(before + 1, settled + 1):
            self._outcomes[worker, number] = own.outcomes[number]
        if settled > before:
            self.settled[worker] = settled

    def hello(self, worker: str, uid: int, reply: Mapping[str, Any], *, is_first: bool, is_awaited: bool) -> None:
        """Note that a process was told of its session; the first time it begins where the broker says.

        A hello that arrived again is answered when the disk has what was accepted by then, but nobody waits for that.
        """
        sessions = self.sessions.setdefault(worker, [])
        incarnation, _, counter = reply["session"].partition(":")
        issued, newest = (int(incarnation[1:]), int(counter)), self._newest.get(worker, (0, 0))
        self._newest[worker] = max(issued, newest)
        if uid in sessions:
            if sessions[-1] != uid and issued > newest:
                raise Violation(f"process {uid} was superseded by {sessions[-1]} as {worker}, and is let in again")
        elif issued > newest:
            sessions.append(uid)
        else:
            sessions.insert(0, uid)  # it was superseded while its reply waited for the disk
        accepted, cursor = reply["accepted"], reply["cursor"]
        if is_first:
            self._accepted[worker] = max(accepted, self._accepted.get(worker, 0))
            if batch_of(cursor) != accepted:
                raise Violation(f"{worker} is told to begin at {cursor!r}, after {accepted} gradients")
        if is_awaited and accepted < self.settled.get(worker, 0):
            raise Violation(f"{worker} is told that {accepted} were accepted, after {self.settled[worker]} settled")

    def executed(self, client: bytes, request_id: int, cleared: Sequence[Push], sequence: int) -> None:
        """Note that a command was carried out, up to a record; nobody was told yet."""
        if (client, request_id) in self._executed:
            raise Violation(f"request {request_id} of {client!r} was carried out twice")
        self._executed[client, request_id] = list(cleared), sequence

    def command(self, client: bytes, request_id: int, reply: Mapping[str, Any]) -> None:
        """Note that somebody was told of a command, which has to outlive a crash from here on."""
        cleared, sequence = self._executed.get((client, request_id), ((), 0))
        if reply.get("cleared", 0) != len(cleared):
            raise Violation(f"{reply['cleared']} are told to be cleared, but {len(cleared)} were")
        for push in cleared:
            self._outcomes[push.worker, push.number] = ("cleared", None, push.cursor)
        self._sequence = max(self._sequence, sequence)

    def check(self, reference: Reference, sequence: int) -> None:
        """Compare with what a broker has recovered."""
        if sequence < self._sequence:
            raise Violation(f"a command was confirmed with record {self._sequence}; recovered are {sequence}")
        for worker in self.sessions:
            own = reference.workers.get(worker)
            if own is None and worker in self.generated:
                continue  # it left, and a made-up id is forgotten then
            settled, accepted = self.settled.get(worker, 0), self._accepted.get(worker, 0)
            if own is None or own.decided < settled or own.accepted < accepted:
                found = "nothing" if own is None else f"{own.accepted} accepted and {own.decided} settled"
                raise Violation(f"{worker} was told of {accepted} accepted and {settled} settled; recovered: {found}")
        for (worker, number), outcome in self._outcomes.items():
            if worker not in reference.workers:
                continue
            now = reference.workers[worker].outcomes.get(number)
            if now != outcome:
                raise Violation(f"{worker} was told that {number} is {outcome}; recovered is {now}")


def batch_of(cursor: bytes | str | None) -> int:
    """Give the number of the batch to begin with."""
    if cursor is None:
        return 0
    return int(cursor.partition(b"." if isinstance(cursor, bytes) else ".")[0])  # type: ignore[arg-type]
