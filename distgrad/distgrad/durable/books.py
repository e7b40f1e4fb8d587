"""What is known beside the parameters: who took part, how far each has got, which brokers there were before.

Values only. A checkpoint holds them as one msgpack map; the journal's records change them (`distgrad.durable.replay`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from distgrad.errors import CheckpointError
from distgrad.wire import Gradient, State

# Restarts whose states are still told apart from a stranger's. A worker that missed so many has nothing to resend.
MAX_FORMER = 64

LIVE, SILENT, LEFT = "live", "silent", "left"


@dataclasses.dataclass
class MemberBook:
    """One worker id.

    Attributes
    ----------
    worker : str
        The id.
    user : str or None
        Whose key said hello; None without keys.
    generated : bool
        Whether the id was made up by its process.
    state : str
        ``live``, ``silent`` or ``left``.
    incarnation, counter : str, int
        The last session that was issued.
    nonce : bytes
        Of the process that has it.
    nonces : list of bytes
        Of processes under this id that must not come back.
    accepted : int
        Last number taken in.
    decided : int
        Last number up to which all are decided on.
    ahead : dict of int to list
        Outcome and cursor of numbers that were decided on before one ahead of them.
    cursor, decided_cursor : bytes, str or None
        The last accepted one, and the one of the last number decided.
    refusals : list
        ``[number, reason, leaf, message]`` of what may not have been told yet.
    counts : Counter of str
        How many were ``applied``, ``superseded``, ``refused`` and ``cleared``.
    examples : int
        Training examples behind those that were applied.
    loss : float or None
        The last one told.
    """

    worker: str
    user: str | None = None
    generated: bool = False
    state: str = LIVE
    incarnation: str = ""
    counter: int = 0
    nonce: bytes = b""
    nonces: list[bytes] = dataclasses.field(default_factory=list)
    accepted: int = 0
    decided: int = 0
    ahead: dict[int, Sequence[Any]] = dataclasses.field(default_factory=dict)
    cursor: bytes | str | None = None
    decided_cursor: bytes | str | None = None
    refusals: list[Any] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: int = 0
    loss: float | None = None

    def note(self, number: int, outcome: str, cursor: bytes | str | None) -> None:
        """Take note of a decision, in whatever order they come.

        Parameters
        ----------
        number : int
            Which gradient.
        outcome : str
            What became of it.
        cursor : bytes, str or None
            Its cursor.
        """
        self.counts[outcome] += 1
        if number == self.decided + 1 <= self.accepted and not self.ahead:
            self.decided = number
            if cursor is not None:
                self.decided_cursor = cursor
            return
        self.ahead[number] = outcome, cursor
        while self.decided < self.accepted and (following := self.ahead.pop(self.decided + 1, None)) is not None:
            self.decided += 1
            if following[1] is not None:
                self.decided_cursor = following[1]


class Lineage:
    """The brokers that held these parameters before, and how much of each one's work has survived.

    Parameters
    ----------
    former : iterable of State
        For each, oldest first: its incarnation, and the last generation and version that were recovered of it.
    """

    def __init__(self, former: Iterable[State] = ()) -> None:
        self.former = list(former)[-MAX_FORMER:]
        self._by_incarnation = {state.incarnation: index for index, state in enumerate(self.former)}

    def survives(self, state: State) -> bool:
        """Tell whether a state that a former broker showed was recovered: then it is part of today's history.

        Parameters
        ----------
        state : State
            As somebody names it.

        Returns
        -------
        bool
            False also for a broker that is not known.
        """
        index = self._by_incarnation.get(state.incarnation)
        if index is None:
            return False
        last = self.former[index]
        return (state.generation, state.version) <= (last.generation, last.version)

    def rank(self, incarnation: str) -> int:
        """Tell how old an incarnation is.

        Parameters
        ----------
        incarnation : str
            Its name.

        Returns
        -------
        int
            -1 for an unknown one, 0 for the oldest known, more for later ones.
        """
        return self._by_incarnation.get(incarnation, -1)

    def after(self, state: State) -> Lineage:
        """Give the lineage of a broker that goes on from a state of the last one.

        Parameters
        ----------
        state : State
            What was recovered.

        Returns
        -------
        Lineage
            A new one.
        """
        return Lineage([*self.former, state])


@dataclasses.dataclass
class Books:
    """All that a broker remembers beside parameters, optimizer state and the gradients in its queue.

    Attributes
    ----------
    incarnation : str
        Of the broker that wrote them; empty if there was none.
    generation : int
        How often the parameters were replaced.
    is_running : bool
        Whether the updater runs.
    is_destroyed : bool
        Whether `destroy` was called.
    durability : str
        When its gradients were settled: ``journal``, ``checkpoint`` or ``none``.
    lineage : Lineage
        The brokers before that one.
    repeatable : list of str
        Incarnations of which versions that a crash took back come again: nothing else happened since.
    members : dict of str to MemberBook
        By worker id.
    outcomes, refused : Counter of str
        What became of all gradients, and why some were refused.
    policy : tuple of (str, dict) or None
        Name and settings.
    policy_memory : dict
        What the policy must not forget.
    policy_step : dict
        What it must not forget of the step that is open.
    weighing : dict
        Settings.
    settings : dict
        What the broker was started with, to tell a changed setting from a configured one.
    """

    incarnation: str = ""
    generation: int = 0
    is_running: bool = True
    is_destroyed: bool = False
    durability: str = "journal"
    lineage: Lineage = dataclasses.field(default_factory=Lineage)
    repeatable: list[str] = dataclasses.field(default_factory=list)
    members: dict[str, MemberBook] = dataclasses.field(default_factory=dict)
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    policy: tuple[str, dict[str, Any]] | None = None
    policy_memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy_step: dict[str, Any] = dataclasses.field(default_factory=dict)
    weighing: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_map(self) -> dict[str, Any]:
        """Give the books as a map for msgpack.

        Returns
        -------
        dict
            For `from_map`.
        """
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return own | {
            "lineage": [list(state) for state in self.lineage.former],
            # Not dataclasses.asdict, which takes a Counter for a list of pairs.
            "members": [member.__dict__ | {"counts": dict(member.counts)} for member in self.members.values()],
            "outcomes": dict(self.outcomes),
            "refused": dict(self.refused),
        }

    @classmethod
    def from_map(cls, values: Mapping[str, Any]) -> Books:
        """Read what `to_map` gave. Unknown keys, of a later version, are left out.

        Parameters
        ----------
        values : mapping
            Decoded, and vouched for by a checksum.

        Returns
        -------
        Books
            The books.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        own = {key: value for key, value in values.items() if key in known}
        policy = own.get("policy")
        own["policy"] = None if policy is None else (policy[0], policy[1])
        own["lineage"] = Lineage(State(*state) for state in own.get("lineage", ()))
        own["members"] = {member["worker"]: _member(member) for member in own.get("members", ())}
        own["outcomes"] = Counter(own.get("outcomes", {}))
        own["refused"] = Counter(own.get("refused", {}))
        return cls(**own)


def _member(values: Mapping[str, Any]) -> MemberBook:
    known = {field.name for field in dataclasses.fields(MemberBook)}
    own = {key: value for key, value in values.items() if key in known}
    own["counts"] = Counter(own.get("counts", {}))
    return MemberBook(**own)


# What was accepted and not decided on, in the order of acceptance, by worker id and number.
Pending = dict[tuple[str, int], Gradient]


class Recovered(NamedTuple):
    """What was found.

    Attributes
    ----------
    books : Books
        As of the last record; new ones if there was nothing.
    pending : dict
        Gradients that were accepted and not decided on, in order.
    sequence : int
        Of the last record.
    records : int
        How many records were carried out.
    checkpoint : tuple of (int, int) or None
        Sequence and version of the checkpoint that was begun with.
    damaged : list of (str, CheckpointError)
        Checkpoints that could not be used, and why.
    executors : set of str
        What computed the updates of the journal.
    has_parameters : bool
        Whether the holder has parameters now.
    first_needed : int or None
        The oldest record that the checkpoint needs which was begun with.
    bytes : int
        Of the records that were carried out.
    skipped : list of (str, int)
        Path and offset of damage in the journal that does not matter: the checkpoint covers what was there.
    is_forked : bool
        Whether the versions that the last broker made do not come again (see `Replay`).
    """

    books: Books
    pending: Pending
    sequence: int = 0
    records: int = 0
    checkpoint: tuple[int, int] | None = None
    damaged: Sequence[tuple[str, CheckpointError]] = ()
    executors: frozenset[str] = frozenset()
    has_parameters: bool = False
    first_needed: int | None = None
    bytes: int = 0
    skipped: Sequence[tuple[str, int]] = ()
    is_forked: bool = False

    @property
    def vouched(self) -> int:
        """The last record that the checkpoint covers; 0 without one."""
        return 0 if self.checkpoint is None else self.checkpoint[0]
