"""Memory for gradients: how many slots there are, and whose containers a gradient is shown in."""

from __future__ import annotations

import numpy as np
import pytest

from distgrad.codec import slot_bytes
from distgrad.layout import Layout
from distgrad_worker.slots import MIN_SLOTS, Slots

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


def test_where_there_is_no_room_for_more_the_one_that_is_known_is_waited_for() -> None:
    own = Slots()
    first, second = own.take(LARGE, 0, 0, shares=False), own.take(LARGE, 0, 0, shares=False)
    assert first is not None
    assert second is not None
    first.keep(1)

    assert own.crowd(second), "the first will be free again"

    assert own.take(LARGE, 0, slot_bytes(LARGE), shares=False) is None
    again = own.take(LARGE, 1, slot_bytes(LARGE), shares=False)
    assert again is not None
    assert again.memory is first.memory
    again.keep(2)
    assert own.take(LARGE, 1, 2 * slot_bytes(LARGE), shares=False) is not None, "now there is room"


def test_a_slot_for_which_there_is_no_room_is_kept_where_nothing_can_be_waited_for() -> None:
    own = Slots()
    first, second = own.take(LARGE, 0, 0, shares=True), own.take(LARGE, 0, 0, shares=True)
    assert first is not None
    assert second is not None

    assert not own.crowd(second), "the caller has the first in hand"

    assert second.memory.pages is None
    assert second.memory.parts


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
