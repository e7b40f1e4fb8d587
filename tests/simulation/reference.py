"""What a broker should hold: carried out by other code than the broker's, one thing after the other.

Arrays are never written to, so that copies are cheap: a copy stands for a moment that a crash may lead back to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distgrad.layout import Layout
from simulation.clockwork import Violation

Array = np.ndarray[Any, np.dtype[Any]]

SMALL = Layout.of({"w": np.zeros(6), "steps": np.zeros(2, np.int64)})
# Two arenas, so that its gradients travel in parts of their own.
OTHER = Layout.of([np.zeros(4), np.zeros(3, np.float32)])
LAYOUTS = {layout.fingerprint: layout for layout in (SMALL, OTHER)}
_FRAMES = {bytes(layout.to_frame()): layout for layout in LAYOUTS.values()}


class Push:
    """A gradient that a process pushed: one batch of its worker's data."""

    __slots__ = ("batch", "cursor", "fingerprint", "number", "uid", "vectors", "worker")

    def __init__(
        self, worker: str, uid: int, batch: int, cursor: bytes | str, layout: Layout, vectors: list[Array]
    ) -> None:
        self.worker = worker
        self.uid = uid
        self.batch = batch
        self.cursor = cursor
        self.fingerprint = layout.fingerprint
        self.vectors = vectors
        self.number = 0

    def __repr__(self) -> str:
        return f"{self.worker}#{self.number} (batch {self.batch} of process {self.uid})"


class RefWorker:
    """What is known of one worker id."""

    __slots__ = (
        "accepted",
        "ahead",
        "cursor",
        "decided",
        "decided_cursor",
        "generated",
        "outcomes",
        "session",
        "state",
    )

    def __init__(self, *, generated: bool) -> None:
        self.generated = generated
        self.state = "live"
        self.session: tuple[str, int] = ("", 0)
        self.accepted = 0
        self.decided = 0
        self.cursor: bytes | str | None = None
        self.decided_cursor: bytes | str | None = None
        # By number: of decisions ahead of others, the cursor; of all, what was decided.
        self.ahead: dict[int, bytes | str] = {}
        self.outcomes: dict[int, tuple[str, str | None, bytes | str]] = {}

    def copy(self) -> RefWorker:
        twin = RefWorker(generated=self.generated)
        twin.state, twin.session = self.state, self.session
        twin.accepted, twin.decided = self.accepted, self.decided
        twin.cursor, twin.decided_cursor = self.cursor, self.decided_cursor
        twin.ahead, twin.outcomes = dict(self.ahead), dict(self.outcomes)
        return twin

    def decide(self, push: Push, outcome: str, reason: str | None) -> None:
        if push.number in self.outcomes:
            raise Violation(f"{push} was {self.outcomes[push.number][0]} before, and is {outcome} now")
        self.outcomes[push.number] = (outcome, reason, push.cursor)
        self.ahead[push.number] = push.cursor
        self.use_up()

    def use_up(self) -> None:
        """Count what is decided and has its turn: all before it are, and it was accepted, once more perhaps."""
        while self.decided < self.accepted and (cursor := self.ahead.pop(self.decided + 1, None)) is not None:
            self.decided += 1
            self.decided_cursor = cursor


class Reference:
    """Parameters, and what became of every gradient, at one moment."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.arenas: list[Array] = []
        self.moments: list[tuple[Array, Array]] = []
        self.steps = 0
        self.version = 0
        self.generation = 0
        self.mode = "descent"
        self.rule: tuple[str, dict[str, Any]] | None = None
        self.policy: Any = None
        self.is_running = True
        self.workers: dict[str, RefWorker] = {}
        self.pending: dict[tuple[str, int], Push] = {}
        self.outcomes: Counter[str] = Counter()

    def copy(self) -> Reference:
        twin = Reference()
        twin.__dict__.update(self.__dict__)
        twin.arenas, twin.moments = list(self.arenas), list(self.moments)
        twin.workers = {name: worker.copy() for name, worker in self.workers.items()}
        twin.pending, twin.outcomes = dict(self.pending), Counter(self.outcomes)
        return twin

    def without_queue(self) -> Reference:
        """Give a copy as a checkpoint keeps it where there is no journal: what was not decided never came."""
        twin = self.copy()
        twin.pending = {}
        for name in twin.workers:
            twin.forget(name)
        return twin

    def forget(self, worker: str) -> None:
        """Take back what was accepted of a worker and not decided."""
        own = self.workers[worker]
        own.accepted, own.cursor = own.decided, own.decided_cursor
        self.pending = {key: push for key, push in self.pending.items() if key[0] != worker}

    def take_back(self, worker: str) -> None:
        """Take back what was accepted of a worker, and what was decided ahead of it, but for what was applied."""
        own = self.workers[worker]
        self.forget(worker)
        for number in list(own.ahead):
            outcome = own.outcomes[number][0]
            if outcome != "applied":
                del own.ahead[number], own.outcomes[number]
                self.outcomes[outcome] -= 1

    # What happens

    def accept(self, push: Push) -> None:
        worker = self.workers[push.worker]
        if push.number != worker.accepted + 1:
            raise Violation(f"{push} was accepted after number {worker.accepted}")
        if push.batch != worker.accepted:
            raise Violation(f"{push} was accepted, but batch {worker.accepted} is next")
        worker.accepted = push.number
        if push.number not in worker.ahead:
            worker.cursor = push.cursor
            self.pending[push.worker, push.number] = push
        worker.use_up()

    def update(self, pushes: Sequence[Push], weights: Sequence[float]) -> None:
        layout = self.layout
        if layout is None:
            raise Violation("a gradient was applied while there were no parameters")
        for push in pushes:
            if push.fingerprint != layout.fingerprint:
                raise Violation(f"{push} was applied to parameters of another layout")
            if self.pending.pop((push.worker, push.number), None) is None:
                raise Violation(f"{push} was applied, but is not waiting")
            self.workers[push.worker].decide(push, "applied", None)
        self.outcomes["applied"] += len(pushes)
        is_ascent = self.mode != "descent"
        self.version += 1
        self.steps += 1
        for index in range(layout.n_trainable_arenas):
            total = pushes[0].vectors[index]
            if len(pushes) > 1 or weights[0] != 1.0:
                total = total * weights[0]
                for push, weight in zip(pushes[1:], weights[1:], strict=True):
                    total = total + weight * push.vectors[index]
            self.arenas[index] = self._stepped(index, -total if is_ascent else total)

    def outcome(self, push: Push, outcome: str, reason: str | None) -> None:
        if self.pending.pop((push.worker, push.number), None) is None:
            raise Violation(f"{push} is {outcome}, but is not waiting")
        self.outcomes[outcome] += 1
        self.workers[push.worker].decide(push, outcome, reason)

    def execute(self, kind: str, keys: Mapping[str, Any], payload: Sequence[Any]) -> None:
        """Carry out another record of the journal."""
        if kind == "session":
            worker = self.workers.setdefault(keys["worker"], RefWorker(generated=keys["generated"]))
            worker.state, worker.session = "live", (keys["incarnation"], keys["counter"])
        elif kind in ("silent", "back", "left"):
            self.workers[keys["worker"]].state = {"silent": "silent", "back": "live", "left": "left"}[kind]
            if kind == "left" and self.workers[keys["worker"]].generated:
                del self.workers[keys["worker"]]
        elif kind == "set":
            self._set(_FRAMES[keys["layout"]], b"".join(payload))
            self.generation = keys["generation"]
        elif kind == "absent":
            self.layout, self.arenas, self.moments, self.steps = None, [], [], 0
            self.generation = keys["generation"]
        elif kind == "configured":
            self._configure(keys)
        elif kind == "remembered":
            pass  # what a policy remembers is its own
        elif kind in ("began", "running"):
            self.is_running = keys["running"]
        else:
            raise Violation(f"a record of kind {kind!r}")

    def _set(self, layout: Layout, payload: bytes) -> None:
        self.layout, self.arenas = layout, []
        start = 0
        for arena in layout.arenas:
            self.arenas.append(np.frombuffer(payload, arena.dtype, arena.size, start))
            start += arena.size * arena.dtype.itemsize
        self._reset_moments()

    def _configure(self, keys: Mapping[str, Any]) -> None:
        former = None if self.rule is None else self.rule[0]
        self.mode, self.policy = keys["mode"], keys["policy"]
        self.rule = None if keys["rule"] is None else (keys["rule"][0], keys["rule"][1])
        if former != (None if self.rule is None else self.rule[0]):
            self._reset_moments()

    def _reset_moments(self) -> None:
        n_trained = 0 if self.layout is None else self.layout.n_trainable_arenas
        zeros = [np.zeros(len(arena)) for arena in self.arenas[:n_trained]]
        self.moments = [(zero, zero) for zero in zeros] if self.rule is not None and self.rule[0] == "adam" else []
        self.steps = 0

    def _stepped(self, index: int, gradient: Array) -> Array:
        arena = self.arenas[index]
        if self.rule is None:
            plain: Array = arena - gradient
            return plain
        name, numbers = self.rule
        if name == "sgd":
            scaled: Array = arena - numbers["lr"] * gradient
            return scaled
        # Kingma and Ba 2015, algorithm 1.
        beta1, beta2 = numbers["beta1"], numbers["beta2"]
        first, second = self.moments[index]
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient * gradient
        self.moments[index] = first, second
        step = numbers["lr"] * (first / (1 - beta1**self.steps))
        moved: Array = arena - step / (np.sqrt(second / (1 - beta2**self.steps)) + numbers["eps"])
        return moved.astype(arena.dtype)
