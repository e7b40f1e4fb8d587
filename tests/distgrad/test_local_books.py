"""What one process notes is what a recovery reads: replaying the records gives the same books."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from distgrad.durable.books import Books, Recovered
from distgrad.durable.replay import Replay
from distgrad.errors import GradientRefused
from distgrad.holder import ParameterHolder
from distgrad.local_books import LOCAL, LocalBooks
from distgrad.policies import Asynchronous, Weighing


class World:
    """A holder, the books of what happens to it, and a replay of the records."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.holder = ParameterHolder(executor="numpy")
        self.replay = Replay(ParameterHolder(executor="numpy"), Books())
        self.books = LocalBooks(Recovered(Books(), {}), 0, "i1", {"mode": "descent"})
        self.books.began("numpy")
        self.books.configured("descent", None, Asynchronous(), Weighing())
        self.queue: list[tuple[int, Any]] = []
        self.n_added = 0
        self.sequence = 0

    def step(self) -> None:
        self.random.choice([self.add, self.add, self.add, self.apply, self.apply, self.refuse, self.clear, self.set])()

    def add(self) -> None:
        self.n_added += 1
        cursor = self.random.choice([None, f"c{self.n_added}", bytes([self.n_added % 256])])
        values = np.full(3, float(self.n_added))
        layout = self.holder.layout if self.random.random() < 0.8 else None
        content = values if layout is None else layout.pack_gradient(values)
        self.books.accepted(self.n_added, layout, content, cursor)
        self.queue.append((self.n_added, values))

    def apply(self) -> None:
        if self.holder.layout is None or not self.queue:
            return
        count = self.random.randint(1, min(3, len(self.queue)))
        step, self.queue = self.queue[:count], self.queue[count:]
        arrays = [self.holder.layout.pack_gradient(values) for _, values in step]
        weights = None if count == 1 else [1 / count] * count
        if weights is None:
            self.holder.apply(arrays[0])
        else:
            self.holder.apply_sum(arrays, weights)
        self.books.applied([number for number, _ in step], weights)

    def refuse(self) -> None:
        if self.queue:
            number, _ = self.queue.pop(0)
            self.books.refused(GradientRefused("not_finite", "no", leaf="w", number=number))

    def clear(self) -> None:
        if self.random.random() < 0.3:
            dropped, self.queue = self.queue[1:], self.queue[:1]  # the first one is just being applied
            self.books.cleared(number for number, _ in dropped)

    def set(self) -> None:
        if self.random.random() < 0.5:
            self.holder.set_nest(np.zeros(3))
            assert self.holder.layout is not None
            self.books.replaced(self.holder.layout, [np.zeros(3)])
        elif self.random.random() < 0.3:
            self.holder.clear()
            self.books.taken_away()

    def read_back(self) -> None:
        for record in self.books.take():
            self.sequence += 1
            payload = memoryview(b"".join(record.parts))
            self.replay.execute(record.header, payload, self.sequence)


@pytest.mark.parametrize("seed", range(20))
def test_replaying_the_records_gives_the_same_books_and_parameters(seed: int) -> None:
    world = World(seed)
    for _ in range(150):
        world.step()
        if world.random.random() < 0.2:
            world.read_back()
    world.read_back()
    sequence, first_needed, own = world.books.for_checkpoint()
    read = world.replay.books

    assert sequence == world.sequence == world.books.sequence
    assert read.generation == own.generation
    assert read.outcomes == own.outcomes
    assert read.refused == own.refused
    assert (read.policy, read.weighing, read.settings) == (("async", {}), own.weighing, own.settings)
    mine, theirs = own.members[LOCAL], read.members[LOCAL]
    for name in ("accepted", "decided", "ahead", "cursor", "decided_cursor", "counts", "examples", "incarnation"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert [number for _, number in world.replay.pending] == [number for number, _ in world.queue]
    oldest = min((gradient.sequence for gradient in world.replay.pending.values()), default=sequence + 1)
    assert first_needed == oldest
    assert world.holder.version == world.replay.holder.version == world.books.version
    if world.holder.layout is not None:
        assert world.holder.nest().tobytes() == world.replay.holder.nest().tobytes()


def test_settled_cursor_and_what_is_behind_follow_the_disk() -> None:
    books = LocalBooks(Recovered(Books(), {}), 0, "i1", {})
    books.began("numpy")  # records 1 and 2
    books.accepted(1, None, np.ones(1), "a")  # 3
    books.accepted(2, None, np.ones(1), None)  # 4
    books.applied([1], None)
    books.applied([2], None)  # 5, both
    books.accepted(3, None, np.ones(1), "c")  # 6
    books.cleared([3, 3])  # 7
    books.take()
    seen = []
    for sequence in range(2, 8):
        books.written(sequence)
        seen.append((books.behind, books.settled, books.cursor))

    assert seen == [(3, 0, None), (2, 0, "a"), (1, 0, "a"), (1, 2, "a"), (0, 2, "c"), (0, 3, "c")]
    assert books.durable == books.sequence == 7
    assert books.for_checkpoint()[2].outcomes == Counter(applied=2, cleared=1)
