"""What is to be written to the journal, in order, and how far the disk has got (PROTOCOL 2, 21).

The core notes here what it accepts and decides; the shell takes it all after each turn and hands it to the file
thread. A record has a *sequence* number. Decisions are gathered into one record, which is closed when the next record
of another kind is noted, or the shell takes it.

With ``durability checkpoint`` gradients and decisions are not written; what else happens (sessions, new parameters) is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from distgrad.wire import Gradient, pack


class Record(NamedTuple):
    """One record, not written yet.

    Attributes
    ----------
    header : bytes
        msgpack: a gradient's own header, or ``[kind, map]``.
    parts : sequence of buffers
        Raw payload; nobody changes it any more.
    is_shared : bool
        Whether the payload lies in another process's memory: it is copied before its checksum is taken, so that a
        process that does change it spoils its own gradient and not the journal.
    """

    header: bytes
    parts: Sequence[Any] = ()
    is_shared: bool = False

    @property
    def size(self) -> int:
        """Bytes of both."""
        return len(self.header) + sum(map(len, self.parts))


class Records:
    """Records on their way to the disk.

    Parameters
    ----------
    sequence : int
        Of the last record that is on the disk already.
    keeps_gradients : bool
        Whether gradients and decisions are written.
    """

    def __init__(self, sequence: int, *, keeps_gradients: bool) -> None:
        self.keeps_gradients = keeps_gradients
        self.durable = sequence
        # Bytes noted so far: how much a recovery would have to read.
        self.bytes = 0
        self._sequence = sequence
        self._records: list[Record] = []
        self._decisions: list[Any] = []
        self._version = 0
        # Of the policy, as it was noted last; None if it must be noted anew.
        self._memory: dict[str, Any] | None = {}
        # The same of what it remembers of the open step, which goes with the decisions that made it so.
        self.step_memory: Callable[[], dict[str, Any]] = dict
        self._step: dict[str, Any] | None = None
        # Who waits for the disk, in order: sequence, and what is then called; by a number of its own.
        self._waiting: dict[int, tuple[int, Callable[[], None]]] = {}
        self._waits = 0

    @property
    def sequence(self) -> int:
        """Sequence number of the last record; of decisions that are still gathered, the one that they will have."""
        return self._sequence + bool(self._decisions)

    def gradient(self, gradient: Gradient) -> None:
        """Note that a gradient was accepted.

        Parameters
        ----------
        gradient : Gradient
            With its header's frame; it is told its record's sequence, 0 if it has none.
        """
        if not self.keeps_gradients:
            gradient.sequence = 0
            return
        if self._decisions:
            self._close_decisions()
        self._sequence += 1
        gradient.sequence = self._sequence
        header = gradient.frame
        parts = () if gradient.is_inline else gradient.parts
        self._records.append(Record(header, parts, is_shared=gradient.slot is not None))
        self.bytes += len(header) + gradient.size

    def decided(self, decision: Any, version: int) -> None:
        """Note a decision.

        Parameters
        ----------
        decision : list
            As in `distgrad.durable.replay`.
        version : int
            Of the parameters before it.
        """
        if not self.keeps_gradients:
            return
        if not self._decisions:
            self._version = version
        self._decisions.append(decision)

    def remember(self, memory: dict[str, Any]) -> None:
        """Note what the policy must not forget, if it is not what was noted last.

        Parameters
        ----------
        memory : dict
            As `Policy.memory` gives it.
        """
        if memory != self._memory:
            self._memory = memory
            self.add("remembered", memory=memory)

    def configured(self, **keys: Any) -> None:
        """Note what is in force; what the policy must not forget is then noted anew.

        Parameters
        ----------
        **keys : object
            What it tells.
        """
        self.add("configured", **keys)
        self._memory = None

    def add(self, kind: str, payload: Sequence[Any] = (), **keys: Any) -> int:
        """Note that something else happened.

        Parameters
        ----------
        kind : str
            As in `distgrad.durable.replay`.
        payload : sequence of buffers
            Raw bytes behind the header; nobody changes them any more.
        **keys : object
            What it tells.

        Returns
        -------
        int
            Its sequence.
        """
        if self._decisions:
            self._close_decisions()
        self._sequence += 1
        header = pack([kind, keys])
        self._records.append(Record(header, payload))
        self.bytes += len(header) + sum(len(part) for part in payload)
        return self._sequence

    def take(self) -> list[Record]:
        """Take all records noted since the last call.

        Returns
        -------
        list of Record
            In order.
        """
        if self._decisions:
            self._close_decisions()
        records, self._records = self._records, []
        return records

    def when_durable(self, call: Callable[[], None]) -> int:
        """Have something done when all that was noted so far is on the disk; at once if it is.

        Parameters
        ----------
        call : callable
            What to do.

        Returns
        -------
        int
            For `forget`.
        """
        self._waits += 1
        if self.durable >= self.sequence:
            call()
        else:
            self._waiting[self._waits] = (self.sequence, call)
        return self._waits

    def forget(self, wait: int) -> None:
        """Do not wait any more.

        Parameters
        ----------
        wait : int
            As `when_durable` gave it.
        """
        self._waiting.pop(wait, None)

    def written(self, sequence: int) -> None:
        """Take note that everything up to a record is on the disk.

        Parameters
        ----------
        sequence : int
            The record's.
        """
        self.durable = max(self.durable, sequence)
        while self._waiting:
            wait = next(iter(self._waiting))
            if self._waiting[wait][0] > self.durable:
                return
            self._waiting.pop(wait)[1]()

    def _close_decisions(self) -> None:
        decisions, self._decisions = self._decisions, []
        message: dict[str, Any] = {"version": self._version, "decisions": decisions}
        step = self.step_memory()
        if step != self._step:
            message["step"] = self._step = step
        header = pack(["decided", message])
        self._sequence += 1
        self.bytes += len(header)
        self._records.append(Record(header))
