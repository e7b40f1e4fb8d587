"""What a checkpoint holds beside arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from distgrad.durable.books import Books, MemberBook
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.checkpoint_state import computed_by, pack_state, restore
from distgrad.errors import CheckpointError
from distgrad.holder import ParameterHolder
from distgrad.rules import SGD, Adam, Rule

NEST = {"n": np.array([3]), "w": np.arange(4, dtype=np.float32)}


def holder_of(rule: Rule | None = None, mode: str = "descent") -> ParameterHolder:
    return ParameterHolder(mode, rule, executor="numpy")


def checkpoint_of(holder: ParameterHolder, books: Books | None = None, first_needed: int = 1) -> Checkpoint:
    arenas = [] if holder.storage is None else [arena.copy() for arena in holder.storage.arenas]
    slots = {slot: [array.copy() for array in arrays] for slot, arrays in holder.state.items()}
    state = pack_state(holder, books or Books(), first_needed)
    return Checkpoint(9, holder.version, state, holder.layout, arenas, slots)


def step(holder: ParameterHolder, value: float) -> None:
    assert holder.layout is not None
    holder.apply([np.full(arena.size, value, arena.dtype) for arena in holder.layout.arenas if arena.trainable])


def test_a_restored_holder_goes_on_bit_for_bit_where_the_checkpoint_was_taken() -> None:
    """Adam's steps count in its bias correction: without them the next update would differ."""
    first = holder_of(Adam(lr=0.25), "ascent")
    first.set_nest(NEST)
    for value in (1.0, -2.0, 0.5):
        step(first, value)

    second = holder_of(SGD(lr=9.0))
    restore(second, checkpoint_of(first))
    step(first, 3.0)
    step(second, 3.0)

    assert (second.version, second.steps, second.mode, second.rule) == (4, 4, "ascent", Adam(lr=0.25))
    assert first.storage is not None
    assert second.storage is not None
    for own, other in zip(first.storage.arenas, second.storage.arenas, strict=True):
        assert own.tobytes() == other.tobytes()


def test_the_books_and_the_first_record_come_back() -> None:
    holder = holder_of()
    holder.set_nest(NEST)

    books, first = restore(
        holder_of(), checkpoint_of(holder, Books(incarnation="one", members={"w": MemberBook("w", accepted=4)}), 17)
    )

    assert (books.incarnation, books.members["w"].accepted, first) == ("one", 4, 17)


def test_a_checkpoint_without_parameters_keeps_version_mode_and_rule() -> None:
    holder = holder_of(SGD(lr=0.5), "ascent")
    holder.version = 12

    found = holder_of()
    restore(found, checkpoint_of(holder))

    assert (found.layout, found.version, found.mode, found.rule) == (None, 12, "ascent", SGD(lr=0.5))


@dataclass(frozen=True)
class Mine(SGD):
    """A rule of the user's own."""

    name: ClassVar[str] = "mine"


def test_a_rule_of_the_users_own_is_taken_with_its_recorded_numbers_and_missed_if_it_is_not_passed() -> None:
    checkpoint = checkpoint_of(holder_of(Mine(lr=0.5)))
    found = holder_of(Mine(lr=7.0))

    restore(found, checkpoint)

    assert found.rule == Mine(lr=0.5)
    with pytest.raises(CheckpointError, match="mine"):
        restore(holder_of(), checkpoint)


def test_it_tells_what_computed_the_updates() -> None:
    assert computed_by(checkpoint_of(holder_of())) == "numpy"
