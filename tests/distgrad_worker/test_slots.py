"""Memory for gradients: how many slots there are, and whose containers a gradient is shown in."""

from __future__ import annotations

import numpy as np
import pytest

from distgrad.codec import slot_bytes
from distgrad.layout import Layout
from distgrad_worker.slots import MIN_SLOTS, Slots, Taken

LARGE = Layout.of({"w": np.zeros(9_000_000, np.float32), "steps": np.zeros(2, np.int64)})


@pytest.mark.parametrize(("gradients", "slots"), [(0, 2), (1, 2), (2, 3), (9, MIN_SLOTS)])
def test_large_slots_are_as_many_as_may_be_on_the_way_and_one_to_fill(gradients: int, slots: int) -> None:
    own = Slots()
    for number in range(1, slots + 1):
        slot = own.take(LARGE, 0, gradients * slot_bytes(LARGE), shares=False)
        assert slot is not None
        slot.keep(number)

    assert own.take(LARGE, 0, gradients * slot_bytes(LARGE), shares=False) is None
    assert own.take(LARGE, 1, gradients * slot_bytes(LARGE), shares=False) is not None, "the first is settled"


def test_slots_that_are_being_filled_do_not_count() -> None:
    own = Slots()

    taken = [own.take(LARGE, 0, 0, shares=False) for _ in range(MIN_SLOTS)]

    assert None not in taken
    assert own.take(LARGE, 0, 0, shares=False) is None


ONE = LARGE.gradient_bytes


def two() -> tuple[Slots, Taken, Taken]:
    """Give the slots of a worker, and two of them that are taken."""
    own = Slots()
    first, second = own.take(LARGE, 0, ONE, shares=True), own.take(LARGE, 0, ONE, shares=True)
    assert first is not None
    assert second is not None
    return own, first, second


def test_where_there_is_no_room_for_more_the_one_that_is_known_is_waited_for() -> None:
    own, first, second = two()
    first.keep(1)

    assert own.crowd(second, 3 * ONE)

    for grant in (3 * ONE, 0, ONE):
        assert own.take(LARGE, 0, grant, shares=True) is None, "the first is free again when it is settled"
    again = own.take(LARGE, 1, ONE, shares=True)
    assert again is not None
    assert again.memory is first.memory
    again.keep(2)
    assert own.take(LARGE, 1, 2 * ONE, shares=True) is not None, "grants are no turns any more"


def test_where_there_is_no_room_what_callers_hold_besides_is_not_shared_and_not_without_end() -> None:
    own, first, second = two()
    assert own.crowd(second, ONE)

    taken = [own.take(LARGE, 0, ONE, shares=True) for _ in range(MIN_SLOTS)]

    assert [None if one is None else one.memory.pages for one in taken] == [None] * MIN_SLOTS
    assert taken[-1] is None
    assert taken[-2] is not None
    assert first.memory.pages is not None


def test_a_slot_for_which_there_is_no_room_stays_the_workers_own_if_it_is_the_only_one() -> None:
    own = Slots()
    only = own.take(LARGE, 0, ONE, shares=True)
    assert only is not None

    assert not own.crowd(only, ONE)

    assert only.memory.pages is None
    only.keep(1)
    again = own.take(LARGE, 1, ONE, shares=True)
    assert again is not None
    assert again.memory is only.memory


def test_a_slot_of_a_number_that_was_not_given_is_free() -> None:
    """Ctrl-C may come between `keep` and the number's being given."""
    own, first, second = two()
    first.keep(8)
    first.give_back(last=7)
    second.keep(7)
    second.give_back(last=7)

    again = own.take(LARGE, 6, 0, shares=True)

    assert again is not None
    assert again.memory is first.memory
    assert second.memory.number == 7


def test_a_gradient_is_shown_in_containers_of_the_callers_own() -> None:
    slot = Slots().take(LARGE, 0, 0, shares=False)
    assert slot is not None

    shown = slot.memory.nest(None)
    shown["w"][:3] = 1.0
    shown["w"] = None

    again = slot.memory.nest(None)
    assert again["w"][:4].tolist()[:3] == [1.0] * 3
    assert again["steps"] is None


def test_a_slot_that_nobody_has_any_more_is_free_again() -> None:
    """Ctrl-C may come when it was taken, and before whoever asked has it."""
    own = Slots()
    taken = [own.take(LARGE, 0, 0, shares=False) for _ in range(MIN_SLOTS)]
    assert own.take(LARGE, 0, 0, shares=False) is None

    del taken[1]

    assert own.take(LARGE, 0, 0, shares=False) is not None
