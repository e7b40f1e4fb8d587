"""Carrying out the journal's records: what was decided is done again, and nothing is decided anew (PROTOCOL 21).

A record's header is a gradient's own from the wire, a map, or ``[kind, map]``:

| kind | tells |
|---|---|
| ``gradient`` | a gradient was accepted; the header is its own from the wire, the payload its parts |
| ``decided`` | what became of gradients, in the order of application |
| ``remembered`` | what the policy must remember from now on |
| ``began`` | a broker began: incarnation, what it recovered, what it was started with |
| ``session`` | a process got the session of a worker id |
| ``silent``, ``back``, ``left`` | leases ended, or were renewed after that; a worker said goodbye |
| ``set``, ``absent`` | parameters were replaced (layout in the header, all arenas behind it) or taken away |
| ``configured`` | mode, rule, policy and weighing in force |
| ``running``, ``destroyed`` | the updater was started or stopped; `destroy` was called |
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from distgrad.arrays import lasting_empty
from distgrad.codec import fill
from distgrad.durable.books import LEFT, LIVE, SILENT, Books, MemberBook, Pending
from distgrad.durable.stored_gradient import stored_arrays
from distgrad.errors import CheckpointError, GradientRefused
from distgrad.gradient_messages import stored_gradient
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.rules import RULES, Rule
from distgrad.wire import PART_BYTES, Gradient, State

# What a decision is, in a record: a step of one gradient or more that was applied, or what else became of one.
APPLIED, SUPERSEDED, REFUSED, CLEARED = 0, 1, 2, 3
OUTCOMES = ("applied", "superseded", "refused", "cleared")

# How msgpack begins an array of two elements.
ARRAY_OF_TWO = 0x92


class ReplayFailed(CheckpointError):
    """A record cannot be carried out on what came before it."""


class Replay:
    """The state that records are carried out on.

    Parameters
    ----------
    holder : ParameterHolder
        With the parameters, the rule and the state of the checkpoint, or empty; changed in place.
    books : Books
        Of the checkpoint, or new ones.
    until : int, optional
        The version to stop at.

    Attributes
    ----------
    is_done : bool
        Whether that version was reached, and the next update would go beyond it.
    pending : dict
        Gradients that were accepted and not decided on, in the order of acceptance.
    executors : set of str
        What the updates were computed by: other ones than today's may round otherwise.
    is_forked : bool
        Whether the last broker replaced the parameters, or was configured, after updates that are lost, as without a
        journal of gradients they may be. Here that comes before those updates: its versions do not come again.
    """

    def __init__(self, holder: ParameterHolder, books: Books, until: int | None = None) -> None:
        self.holder = holder
        self.books = books
        self.is_done = False
        self._until = until
        self.pending: Pending = {}
        self.executors: set[str] = set()
        self.is_forked = False
        self._kinds = {
            "decided": self._decided,
            "began": self._began,
            "session": self._session,
            "silent": self._silent,
            "back": self._back,
            "left": self._left,
            "remembered": self._remembered,
            "set": self._set,
            "absent": self._absent,
            "configured": self._configured,
            "running": self._running,
            "destroyed": self._destroyed,
        }

    def remember(self, header: Any, payload: memoryview, sequence: int = 0) -> None:
        """Take in a gradient from before the checkpoint, if it was not decided on there.

        Parameters
        ----------
        header : bytes-like
            Of a record of any kind.
        payload : memoryview
            Behind it.
        sequence : int
            Of the record.
        """
        if is_gradient(header):
            gradient = stored_gradient(msgpack.unpackb(header), payload)
            member = self.books.members.get(gradient.worker)
            number = gradient.number
            if member is not None and member.decided < number <= member.accepted and number not in member.ahead:
                self._await(gradient, member, sequence)

    def execute(self, header: Any, payload: memoryview, sequence: int = 0) -> None:
        """Carry out one record, the next one.

        Parameters
        ----------
        header : bytes-like
            What it tells.
        payload : memoryview
            Behind it.
        sequence : int
            Of the record; a gradient that stays pending is told it.

        Raises
        ------
        ReplayFailed
            If it does not fit what came before it.
        """
        if is_gradient(header):
            gradient = stored_gradient(msgpack.unpackb(header), payload)
            member = self._member(gradient.worker)
            if gradient.number <= member.accepted:
                raise ReplayFailed(f"gradient {gradient.number} of {gradient.worker!r} was accepted before")
            member.accepted = gradient.number
            if gradient.cursor is not None:
                member.cursor = gradient.cursor
            self._await(gradient, member, sequence)
            return
        kind, message = msgpack.unpackb(header, strict_map_key=False)
        if kind not in self._kinds:
            raise ReplayFailed(f"a record is of kind {kind!r:.40}, which this version of distgrad does not know")
        self._kinds[kind](message, payload)

    def _await(self, gradient: Gradient, member: MemberBook, sequence: int) -> None:
        gradient.user = member.user
        gradient.sequence = sequence
        key = gradient.worker, gradient.number
        self.pending.pop(key, None)  # of an id that was forgotten and used again
        self.pending[key] = gradient

    def _member(self, worker: str) -> MemberBook:
        member = self.books.members.get(worker)
        if member is None:
            raise ReplayFailed(f"worker {worker!r} is not known")
        return member

    def _decided(self, message: Mapping[str, Any], payload: memoryview) -> None:
        books = self.books
        if message["version"] != self.holder.version:
            raise ReplayFailed(f"a decision was made on version {message['version']}, not {self.holder.version}")
        for decision in message["decisions"]:
            if decision[0] == APPLIED:
                if self.holder.version == self._until:
                    self.is_done = True
                    return
                self._apply(decision[1], decision[2])
                continue
            outcome, worker, number, *refusal = decision
            gradient = self.pending.pop((worker, number), None)
            if gradient is None:
                raise ReplayFailed(
                    f"gradient {number} of {worker!r} was {OUTCOMES[outcome]}, but is not in the journal"
                )
            self._note(gradient, OUTCOMES[outcome])
            if outcome == CLEARED:
                books.repeatable = []
            if outcome == REFUSED:
                reason, leaf, text = refusal
                books.refused[reason] += 1
                self._member(worker).refusals = [*self._member(worker).refusals, [number, reason, leaf, text]][-64:]
        books.policy_step = message.get("step", books.policy_step)

    def _apply(self, step: Sequence[Sequence[Any]], weights: Sequence[float] | None) -> None:
        holder = self.holder
        layout = holder.layout
        if layout is None:
            raise ReplayFailed("a gradient was applied while there were no parameters")
        gradients, arrays = [], []
        for worker, number in step:
            gradient = self.pending.pop((worker, number), None)
            if gradient is None:
                raise ReplayFailed(f"gradient {number} of {worker!r} was applied, but is not in the journal")
            recut(layout, gradient)
            gradients.append(gradient)
            arrays.append(stored_arrays(layout, gradient))
        try:
            if weights is None:
                holder.apply(arrays[0])
            else:
                holder.apply_sum(arrays, weights)
        except GradientRefused as refusal:
            raise ReplayFailed(f"a gradient that was applied is refused now: {refusal.message}") from refusal
        for gradient in gradients:
            member = self._note(gradient, "applied")
            member.examples += gradient.examples
            if gradient.loss is not None:
                member.loss = gradient.loss

    def _note(self, gradient: Gradient, outcome: str) -> MemberBook:
        member = self._member(gradient.worker)
        member.note(gradient.number, outcome, gradient.cursor)
        self.books.outcomes[outcome] += 1
        return member

    def _began(self, message: Mapping[str, Any], payload: memoryview) -> None:
        books = self.books
        if books.incarnation:
            books.lineage = books.lineage.after(State(books.incarnation, books.generation, self.holder.version))
            if not self.is_forked:
                books.repeatable = [*books.repeatable, books.incarnation]
        self.is_forked = False
        books.incarnation = message["incarnation"]
        books.settings = message["settings"]
        books.is_running = message["running"]
        books.is_destroyed = False
        books.durability = message.get("durability", "journal")
        self.executors.add(message["executor"])

    def _session(self, message: Mapping[str, Any], payload: memoryview) -> None:
        worker = message["worker"]
        member = self.books.members.get(worker)
        if member is None:
            member = self.books.members[worker] = MemberBook(worker, message["user"], message["generated"])
        member.state, member.user = LIVE, message["user"]
        member.incarnation, member.counter = message["incarnation"], message["counter"]
        member.nonces = list(message["nonces"])
        nonce = message.get("nonce", b"")
        if nonce != member.nonce or not nonce:
            member.nonce = nonce
            # Those were of another process's gradients; what was decided ahead of others is not taken back yet.
            member.refusals = [refusal for refusal in member.refusals if refusal[0] > member.decided]

    def _silent(self, message: Mapping[str, Any], payload: memoryview) -> None:
        self._member(message["worker"]).state = SILENT

    def _back(self, message: Mapping[str, Any], payload: memoryview) -> None:
        self._member(message["worker"]).state = LIVE

    def _left(self, message: Mapping[str, Any], payload: memoryview) -> None:
        member = self._member(message["worker"])
        member.state = LEFT
        member.nonces = [*member.nonces, member.nonce]
        member.nonce = b""
        if member.generated:
            del self.books.members[member.worker]

    def _remembered(self, message: Mapping[str, Any], payload: memoryview) -> None:
        self.books.policy_memory = message["memory"]

    def _cut_pending(self) -> None:
        """Cut what waits as long as its layout is there: it may be applied to other parameters of the same layout."""
        layout = self.holder.layout
        if layout is not None:
            for gradient in self.pending.values():
                if gradient.fingerprint == layout.fingerprint:
                    recut(layout, gradient)

    def _set(self, message: Mapping[str, Any], payload: memoryview) -> None:
        self._cut_pending()
        layout = Layout.from_frame(message["layout"])
        arenas = [lasting_empty(arena.size, arena.dtype) for arena in layout.arenas]
        fill(layout, _cut(layout, payload), arenas)
        self.holder.set_arenas(layout, arenas)
        self._diverge(message)
        self.books.policy_step = {}
        self.books.generation = message["generation"]

    def _diverge(self, message: Mapping[str, Any]) -> None:
        """Note that what follows is not what an earlier crash took back, nor what this broker's own may have taken."""
        self.books.repeatable = []
        self.is_forked = self.is_forked or message.get("version", self.holder.version) != self.holder.version

    def _absent(self, message: Mapping[str, Any], payload: memoryview) -> None:
        self._cut_pending()
        self.holder.clear()
        self.books.repeatable, self.books.policy_step = [], {}
        self.books.generation = message["generation"]

    def _configured(self, message: Mapping[str, Any], payload: memoryview) -> None:
        holder, books = self.holder, self.books
        rule = rule_named(message["rule"], holder.rule)
        name, settings = message["policy"]
        # A broker notes at its beginning too what is in force, which then mostly is what was in force before.
        if (message["mode"], rule, message["weighing"]) != (holder.mode, holder.rule, books.weighing):
            self._diverge(message)
        holder.set_mode(message["mode"])
        if rule != holder.rule:
            holder.replace_rule(rule)
        if (name, settings) != books.policy:
            if books.policy is None or books.policy[0] != name:
                books.policy_memory = {}  # if the name is the same the policy takes what still means the same
            books.policy, books.policy_step = (name, settings), {}
            self._diverge(message)
        books.weighing = message["weighing"]

    def _running(self, message: Mapping[str, Any], payload: memoryview) -> None:
        self.books.is_running = message["running"]

    def _destroyed(self, message: Mapping[str, Any], payload: memoryview) -> None:
        if self.holder.version == self._until:
            self.is_done = True  # who goes back to the last version wants it back
            return
        self.holder.clear()
        self.books.generation = message["generation"]
        self.books.is_running = False
        self.books.is_destroyed = True


def is_gradient(header: Any) -> bool:
    """Tell whether a record's header is a gradient's own, from the wire.

    Parameters
    ----------
    header : bytes-like
        As stored.

    Returns
    -------
    bool
        A gradient's is a map, all others are arrays of two.
    """
    return bool(header[0] != ARRAY_OF_TWO)


def rule_named(named: Sequence[Any] | None, own: Rule | None) -> Rule | None:
    """Make a rule from its name and settings.

    Parameters
    ----------
    named : sequence or None
        Name and settings; None for no rule.
    own : Rule or None
        A rule of the user's own, for a name that distgrad does not know.

    Returns
    -------
    Rule or None
        The rule.

    Raises
    ------
    ReplayFailed
        If there is no such rule.
    """
    if named is None:
        return None
    name, settings = named
    if name in RULES:
        return RULES[name](**settings)
    if own is not None and own.name == name:
        return own.replace(**settings)
    raise ReplayFailed(f"the parameters were updated by a rule called {name!r}, which is not known here; pass it")


def recut(layout: Layout, gradient: Gradient) -> None:
    """Cut a payload that was stored in one piece where the layout's arenas end, if it has their size.

    Parameters
    ----------
    layout : Layout
        Of the parameters.
    gradient : Gradient
        From the journal; its `parts` are changed.
    """
    if layout.n_trainable_arenas > 1 and len(gradient.parts) == 1 and gradient.size == layout.gradient_bytes:
        (payload,) = gradient.parts
        cuts = [0]
        for arena in layout.arenas[: layout.n_trainable_arenas]:
            cuts.append(cuts[-1] + arena.size * arena.dtype.itemsize)
        gradient.parts = [payload[start:stop] for start, stop in itertools.pairwise(cuts) if stop > start]


def _cut(layout: Layout, payload: memoryview) -> list[memoryview]:
    """Cut all arenas, one behind the other, as parts of a `set` are cut."""
    parts: list[memoryview] = []
    start = 0
    for arena in layout.arenas:
        end = start + arena.size * arena.dtype.itemsize
        parts += [payload[first : min(first + PART_BYTES, end)] for first in range(start, end, PART_BYTES)]
        start = end
    return parts
