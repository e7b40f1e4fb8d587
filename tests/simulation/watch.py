"""Looking over a broker's shoulder: what it accepts, decides and writes down, compared with a reference at once.

What the core decides is seen where it happens; what it hands to the file thread is read record by record. From the two
follows what each crash must lead back to: the state after the last record that survived, or a checkpoint's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np

from distgrad.durable.books import Recovered
from distgrad.durable.disk_events import WriteCheckpoint
from distgrad.durable.records import Record
from distgrad.errors import GradientRefused
from distgrad.layout import Layout
from distgrad.wire import Gradient
from distgrad_broker import settling
from distgrad_broker.members import Member
from distgrad_broker.state import CoreState
from distgrad_broker.versions import Versions
from simulation.clockwork import Violation
from simulation.reference import Array, Push, Reference

_ARRAY_OF_TWO = 0x92
_OUTCOMES = ("applied", "superseded", "refused", "cleared")

# One thing that happened, as `Reference` can carry it out.
Operation = tuple[Any, ...]


class Snapshot(NamedTuple):
    """What a checkpoint must hold, where there is no journal of gradients."""

    ticket: int
    sequence: int
    version: int
    reference: Reference


class Watch:
    """Watches one broker, from its start to its end.

    Parameters
    ----------
    reference : Reference
        What was recovered; it goes along with the broker from here on.
    sequence : int
        Of the last record recovered.
    pushes : dict
        All that was ever pushed, by worker and cursor.
    keeps_gradients : bool
        Whether the journal has gradients and decisions.
    is_exact : bool
        Whether results must be the same to the last bit.
    note : callable or None
        Told what is seen.
    """

    def __init__(
        self,
        reference: Reference,
        sequence: int,
        pushes: dict[tuple[str, bytes | str], Push],
        *,
        keeps_gradients: bool,
        is_exact: bool,
        note: Callable[[str], None] | None,
    ) -> None:
        self.reference = reference
        self.sequence = sequence
        self.durable = sequence
        # The last record without which what a command has done could be lost: what a policy remembers may come later.
        self.binding = sequence
        self.durable_ticket = 0
        self.durable_checkpoint = (0, 0)
        self.bits: dict[tuple[int, int], list[bytes]] = {}
        self.snapshots = [Snapshot(0, sequence, reference.version, reference.copy())]
        self.cleared: list[Push] = []
        self._base = self.snapshots[0].reference
        self._pushes = pushes
        self._note = note
        self.keeps_gradients = keeps_gradients
        self._is_exact = is_exact
        # Seen, and not in a record yet.
        self._seen: deque[Operation] = deque()
        self._operations: list[tuple[int, Operation]] = []
        self._applying: set[Push] = set()
        self._pinned: Reference | None = None

    # What the core does

    def push_of(self, gradient: Gradient) -> Push:
        assert gradient.cursor is not None
        return self._pushes[gradient.worker, gradient.cursor]

    def accepted(self, gradient: Gradient) -> Push:
        push = self.push_of(gradient)
        if push.number != gradient.number:
            raise Violation(f"{push} was accepted as number {gradient.number}")
        self.reference.accept(push)
        if self._note is not None:
            self._note(f"accepts {push}, computed on {gradient.base}")
        if gradient.number not in self.reference.workers[push.worker].ahead:
            self._see(("accept", push, gradient.frame if self.keeps_gradients else b""))
        return push

    def updated(self, versions: WatchedVersions, gradients: Sequence[Gradient], weights: Sequence[float]) -> None:
        if self._applying:
            raise Violation(f"applied, but not settled: {self._applying}")
        pushes = [self.push_of(gradient) for gradient in gradients]
        self._applying.update(pushes)
        self.reference.update(pushes, weights)
        if self._note is not None:
            self._note(f"makes version {self.reference.version} of {pushes}")
        self._see(("update", pushes, weights))
        self.compare(versions)

    def decided(self, gradient: Gradient, outcome: str, refusal: GradientRefused | None) -> None:
        push = self.push_of(gradient)
        if outcome == "applied":
            self._applying.remove(push)
            return
        reason = None if refusal is None else refusal.reason
        self.reference.outcome(push, outcome, reason)
        if self._note is not None:
            self._note(f"decides: {push} is {outcome}, {reason}")
        self._see(("outcome", push, outcome, reason))
        if outcome == "cleared":
            self.cleared.append(push)

    def compare(self, versions: Versions) -> None:
        """Compare the broker's parameters with the reference's."""
        holder, reference = versions.holder, self.reference
        if holder.version != reference.version:
            raise Violation(f"version {holder.version} after {reference.version} updates")
        arenas = [] if holder.storage is None else holder.storage.arenas
        bits = [arena.tobytes() for arena in arenas]
        if self._is_exact:
            is_same = bits == [arena.tobytes() for arena in reference.arenas]
        else:
            is_same = same(arenas, reference.arenas, is_exact=False)
        if not is_same:
            raise Violation(f"parameters {arenas}, not {reference.arenas}")
        for arrays in holder.state.values():
            bits += [array.tobytes() for array in arrays]
        self.bits[reference.generation, reference.version] = bits

    def _see(self, operation: Operation) -> None:
        if self.keeps_gradients:
            self._seen.append(operation)

    # What it writes down

    def recorded(self, records: Sequence[Record], versions: Versions) -> None:
        """Read the records that the file thread is given, and compare them with what was seen."""
        for record in records:
            self.sequence += 1
            header = record.header
            if header[0] != _ARRAY_OF_TWO:
                operation = self._next("accept")
                if operation[2] is not header:
                    raise Violation(f"the record of {operation[1]} has another header")
                self._operations.append((self.sequence, operation))
                continue
            kind, keys = msgpack.unpackb(header, strict_map_key=False)
            if kind != "remembered":
                self.binding = self.sequence
            if kind == "decided":
                self._read_decisions(keys["decisions"])
                continue
            operation = ("record", kind, keys, record.parts)
            self.reference.execute(kind, keys, record.parts)
            if self._pinned is not None:
                self._pinned.execute(kind, keys, record.parts)
            self._operations.append((self.sequence, operation))
            if kind == "set":
                self.compare(versions)

    def all_recorded(self) -> None:
        """Check that everything seen was written down."""
        if self._seen:
            raise Violation(f"not in the journal's records: {list(self._seen)}")

    def _read_decisions(self, decisions: Sequence[Any]) -> None:
        for decision in decisions:
            if decision[0] == 0:
                operation = self._next("update")
                names = [[push.worker, push.number] for push in operation[1]]
                weights = [1.0] if decision[2] is None else decision[2]
                if decision[1] != names or weights != operation[2]:
                    raise Violation(f"{decision} was written down, but {operation[1]} were applied, by {operation[2]}")
            else:
                operation = self._next("outcome")
                _, push, outcome, _ = operation
                if decision[:3] != [_OUTCOMES.index(outcome), push.worker, push.number]:
                    raise Violation(f"{decision} was written down, but {push} is {outcome}")
            self._operations.append((self.sequence, operation))

    def _next(self, name: str) -> Operation:
        if not self._seen or self._seen[0][0] != name:
            raise Violation(f"the journal tells of an {name}, but there was {self._seen[0] if self._seen else 'none'}")
        return self._seen.popleft()

    def pinned(self) -> None:
        """Note what a checkpoint would hold that begins now; more may be decided before the loop hears of it."""
        if not self.keeps_gradients:
            self._pinned = self.reference.without_queue()

    def checkpoint_begun(self, effect: WriteCheckpoint) -> None:
        if not self.keeps_gradients:
            checkpoint = effect.checkpoint
            reference = self.reference.without_queue() if checkpoint.layout is None else self._pinned
            assert reference is not None  # what has parameters was pinned
            self._pinned = None
            self.snapshots.append(Snapshot(effect.ticket, checkpoint.sequence, checkpoint.version, reference))

    # What a crash leads back to

    def expected(self, recovered: Recovered) -> Reference:
        """Give the reference at the moment that was recovered."""
        last = recovered.sequence
        if not self.durable <= last <= self.sequence:
            raise Violation(f"record {last} is the last one recovered, but {self.durable} was on the disk")
        if (recovered.checkpoint or (0, 0)) < self.durable_checkpoint:
            raise Violation(f"checkpoint {recovered.checkpoint} was recovered, not {self.durable_checkpoint}")
        if self.keeps_gradients:
            reference, after = self._base.copy(), -1
        else:
            reference, after = self._snapshot_of(recovered)
        for sequence, operation in self._operations:
            if sequence > last:
                break
            if sequence > after:
                _carry_out(reference, operation)
        return reference

    def _snapshot_of(self, recovered: Recovered) -> tuple[Reference, int]:
        found = [
            snapshot for snapshot in self.snapshots[1:] if (snapshot.sequence, snapshot.version) == recovered.checkpoint
        ]
        # There may be several of the same name: what was decided in between tells them apart.
        own = {name: (book.decided, set(book.ahead)) for name, book in recovered.books.members.items()}
        for snapshot in reversed(found):
            workers = snapshot.reference.workers.items()
            if all((worker.decided, set(worker.ahead)) == own.get(name, (0, set())) for name, worker in workers):
                if snapshot.ticket < self.durable_ticket:
                    break
                return snapshot.reference.copy(), snapshot.sequence
        if self.durable_ticket:
            raise Violation(f"checkpoint {recovered.checkpoint} was recovered, which is older than what is on the disk")
        return self._base.copy(), -1


def _carry_out(reference: Reference, operation: Operation) -> None:
    name = operation[0]
    if name == "accept":
        reference.accept(operation[1])
    elif name == "update":
        reference.update(operation[1], operation[2])
    elif name == "outcome":
        reference.outcome(operation[1], operation[2], operation[3])
    else:
        reference.execute(operation[1], operation[2], operation[3])


def same(ours: Sequence[Array], theirs: Sequence[Array], *, is_exact: bool) -> bool:
    """Compare arenas."""
    if len(ours) != len(theirs):
        return False
    for own, other in zip(ours, theirs, strict=True):
        if is_exact:
            if own.tobytes() != other.tobytes():
                return False
        elif own.shape != other.shape or not _are_close(own, other):
            return False
    return True


def _are_close(own: Array, other: Array) -> bool:
    """Do what `numpy.allclose` does, which takes far longer for a few numbers."""
    relative = 1e-9 if own.dtype == np.float64 else 1e-3
    pairs = zip(own.tolist(), other.tolist(), strict=True)
    return all(abs(ours - theirs) <= 1e-3 + relative * abs(theirs) for ours, theirs in pairs)


class WatchedVersions(Versions):
    """The real ones, which tell of every update."""

    watch: Watch

    def apply(self, gradient: Gradient) -> None:
        super().apply(gradient)
        self.watch.updated(self, [gradient], [1.0])

    def apply_sum(self, gradients: Sequence[Gradient], weights: Sequence[float]) -> None:
        super().apply_sum(gradients, weights)
        self.watch.updated(self, gradients, weights)

    def pin(self, now: float) -> tuple[str, Layout, list[Any], int]:
        self.watch.pinned()
        return super().pin(now)


def watched_settle(
    state: CoreState, gradient: Gradient, member: Member, outcome: str, refusal: GradientRefused | None = None
) -> None:
    """Stand in for `settling.settle` where the core calls it."""
    assert isinstance(state.versions, WatchedVersions)
    base = gradient.base
    if base is not None and base.generation == state.generation and base.incarnation in state.repeatable:
        version = state.versions.version - (outcome == "applied")
        if base.version > version:
            raise Violation(f"{gradient.worker}#{gradient.number} is {outcome} at version {version}, before its base")
    state.versions.watch.decided(gradient, outcome, refusal)
    _settle(state, gradient, member, outcome, refusal)


_settle = settling.settle
