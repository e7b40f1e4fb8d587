"""What one process notes for the journal of its `DistributedGradients`, and how far the disk has got with it.

Values and rules only: `distgrad.local_journal` has the lock and the thread. The records are those of a broker with one
worker, `LOCAL`, so that the same recovery, `distgrad replay`, and a broker later on, go on from them.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from distgrad.codec import encode
from distgrad.durable.books import Books, MemberBook, Recovered
from distgrad.durable.records import Record, Records
from distgrad.durable.replay import APPLIED, CLEARED, REFUSED
from distgrad.durable.stored_gradient import EARLY, early_parts
from distgrad.errors import GradientRefused
from distgrad.layout import Layout
from distgrad.policies import Policy, Weighing
from distgrad.rules import Rule
from distgrad.version import __version__
from distgrad.wire import GRADIENT, PROTOCOL_VERSION, RAW, Gradient, State, pack

LOCAL = "local"
"""The worker id of all gradients that are added within one process."""


class LocalBooks:
    """Takes note of everything that happens, in the order in which it counts.

    Parameters
    ----------
    recovered : Recovered
        What the data folder had.
    version : int
        Of the recovered parameters.
    incarnation : str
        A new name for this process.
    settings : dict
        What this process was started with.

    Attributes
    ----------
    version : int
        Of the parameters, by what was noted.
    generation : int
        How often they were replaced.
    settled : int
        Highest number up to which all gradients are decided on, and the disk knows.
    cursor : bytes, str or None
        Of the last gradient that is on the disk.
    behind : int
        How many gradients are not on the disk yet.
    """

    def __init__(self, recovered: Recovered, version: int, incarnation: str, settings: dict[str, Any]) -> None:
        books = recovered.books
        self.version = version
        self.generation = books.generation
        self._incarnation = incarnation
        self._settings = settings
        self._lineage = books.lineage
        if books.incarnation:
            self._lineage = books.lineage.after(State(books.incarnation, books.generation, version))
        self._outcomes, self._refused = books.outcomes.copy(), books.refused.copy()
        self._policy: tuple[str, dict[str, Any]] | None = None
        self._weighing: dict[str, Any] = {}
        self._member = books.members.get(LOCAL) or MemberBook(LOCAL)
        self._member.refusals = []
        # Gradients that are not decided on: sequence of the record, and the cursor.
        self._undecided = {
            gradient.number: (gradient.sequence, gradient.cursor) for gradient in recovered.pending.values()
        }
        self._records = Records(recovered.sequence, keeps_gradients=True)
        self._taken: list[Record] = []
        # Sequence of a record, and what is true once it is on the disk.
        self._accepting: deque[tuple[int, int, bytes | str | None]] = deque()
        self._deciding: deque[tuple[int, int]] = deque()
        self._kept = self._member.accepted
        self.settled = self._member.decided
        self.cursor = self._member.cursor

    @property
    def behind(self) -> int:
        """Gradients that are not on the disk yet."""
        return self._member.accepted - self._kept

    @property
    def accepted_number(self) -> int:
        """Number of the last gradient."""
        return self._member.accepted

    @property
    def sequence(self) -> int:
        """Sequence of the last record."""
        return self._records.sequence

    @property
    def durable(self) -> int:
        """Sequence up to which all records are on the disk."""
        return self._records.durable

    @property
    def noted_bytes(self) -> int:
        """Bytes noted so far."""
        return self._records.bytes

    def began(self, executor: str) -> None:
        """Note that this process begins.

        Parameters
        ----------
        executor : str
            What will compute its updates.
        """
        self._records.add(
            "began",
            incarnation=self._incarnation,
            executor=executor,
            distgrad=__version__,
            settings=self._settings,
            running=True,
        )
        self._member.incarnation, self._member.counter = self._incarnation, 1
        self._records.add(
            "session",
            worker=LOCAL,
            user=None,
            generated=False,
            incarnation=self._incarnation,
            counter=1,
            nonces=self._member.nonces,
        )

    def configured(self, mode: str, rule: Rule | None, policy: Policy, weighing: Weighing) -> None:
        """Note by what updates are made from now on.

        Parameters
        ----------
        mode, rule, policy, weighing : str, Rule or None, Policy, Weighing
            In force.
        """
        self._policy, self._weighing = (policy.name, policy.settings()), weighing.settings()
        self._records.add(
            "configured",
            mode=mode,
            rule=None if rule is None else [rule.name, rule.settings()],
            policy=self._policy,
            weighing=self._weighing,
        )

    def accepted(self, number: int, layout: Layout | None, content: Any, cursor: bytes | str | None) -> None:
        """Note a gradient; its arrays must not change any more.

        Parameters
        ----------
        number : int
            One more than the last one's.
        layout : Layout or None
            What the content is packed for; None if it is a nest.
        content : object
            The gradient.
        cursor : bytes, str or None
            Where its giver stands.
        """
        header: dict[str, Any] = {
            "v": PROTOCOL_VERSION,
            "kind": GRADIENT,
            "worker": LOCAL,
            "session": self._incarnation,
            "attempt": 1,
            "number": number,
            "fingerprint": 0 if layout is None else layout.fingerprint,
            "encoding": EARLY if layout is None else RAW,
        }
        if cursor is not None:
            header["cursor"] = cursor
        gradient = Gradient()
        gradient.frame = pack(header)
        gradient.is_inline = False
        gradient.slot = None
        gradient.parts = early_parts(content) if layout is None else encode(layout, content)
        gradient.size = sum(map(len, gradient.parts))
        self._records.gradient(gradient)
        self._member.accepted = number
        if cursor is not None:
            self._member.cursor = cursor
        self._undecided[number] = gradient.sequence, cursor
        self._accepting.append((gradient.sequence, number, self._member.cursor))

    def applied(self, numbers: Sequence[int], weights: Sequence[float] | None) -> None:
        """Note one update.

        Parameters
        ----------
        numbers : sequence of int
            Of its gradients.
        weights : sequence of float or None
            What they were multiplied by; None if the one gradient was applied as it is.
        """
        self._records.decided([APPLIED, [[LOCAL, number] for number in numbers], weights], self.version)
        self.version += 1
        self._member.examples += len(numbers)
        for number in numbers:
            self._decide(number, "applied")

    def refused(self, refusal: GradientRefused) -> None:
        """Note that a gradient was refused.

        Parameters
        ----------
        refusal : GradientRefused
            With its number.
        """
        number = refusal.number
        assert number is not None  # the updater tells it
        reason = [refusal.reason, refusal.leaf, refusal.message]
        self._records.decided([REFUSED, LOCAL, number, *reason], self.version)
        self._refused[refusal.reason] += 1
        self._decide(number, "refused")

    def cleared(self, numbers: Iterable[int]) -> None:
        """Note that gradients were dropped.

        Parameters
        ----------
        numbers : iterable of int
            Those that are decided on already are passed over.
        """
        for number in numbers:
            if number in self._undecided:
                self._records.decided([CLEARED, LOCAL, number], self.version)
                self._decide(number, "cleared")

    def replaced(self, layout: Layout, arenas: Sequence[Any]) -> None:
        """Note new parameters.

        Parameters
        ----------
        layout : Layout
            Theirs.
        arenas : sequence of ndarray
            A copy of their own, one array per arena.
        """
        self.generation += 1
        parts = encode(layout, arenas, trained_only=False)
        keys = {"generation": self.generation, "version": self.version}
        self._records.add("set", parts, layout=layout.to_frame(), **keys)

    def taken_away(self) -> None:
        """Note that there are no parameters any more."""
        self.generation += 1
        self._records.add("absent", generation=self.generation)

    def take(self) -> list[Record]:
        """Take all records since the last call.

        Returns
        -------
        list of Record
            In order.
        """
        self._close()
        taken, self._taken = self._taken, []
        return taken

    def written(self, sequence: int) -> None:
        """Take note that everything up to a record is on the disk.

        Parameters
        ----------
        sequence : int
            The record's.
        """
        self._records.written(sequence)
        while self._accepting and self._accepting[0][0] <= sequence:
            _, self._kept, self.cursor = self._accepting.popleft()
        while self._deciding and self._deciding[0][0] <= sequence:
            _, self.settled = self._deciding.popleft()

    def for_checkpoint(self) -> tuple[int, int, Books]:
        """Give what a checkpoint of this moment holds beside parameters and optimizer state.

        Returns
        -------
        sequence : int
            Of the last record that it covers.
        first_needed : int
            The oldest record that a recovery from it needs.
        books : Books
            Values of their own.
        """
        self._close()
        first_needed = min([self.sequence + 1, *(sequence for sequence, _ in self._undecided.values())])
        member = dataclasses.replace(
            self._member, ahead=dict(self._member.ahead), counts=self._member.counts.copy(), refusals=[]
        )
        books = Books(
            incarnation=self._incarnation,
            generation=self.generation,
            lineage=self._lineage,
            members={LOCAL: member},
            outcomes=self._outcomes.copy(),
            refused=self._refused.copy(),
            policy=self._policy,
            weighing=self._weighing,
            settings=self._settings,
        )
        return self.sequence, first_needed, books

    def _close(self) -> None:
        """End the record in which decisions are gathered."""
        self._taken += self._records.take()

    def _decide(self, number: int, outcome: str) -> None:
        _, cursor = self._undecided.pop(number)
        self._member.note(number, outcome, cursor)
        self._outcomes[outcome] += 1
        sequence = self._records.sequence
        if self._deciding and self._deciding[-1][0] == sequence:
            self._deciding.pop()
        self._deciding.append((sequence, self._member.decided))
