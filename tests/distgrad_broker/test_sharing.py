"""Slots: the broker attaches to what a worker shares, or says that it cannot, and takes gradients from both alike."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad.codec import slot_arenas, slot_bytes
from distgrad.layout import Layout
from distgrad.shared_pages import SharedPages, host_name
from distgrad_broker.shared_slots import MAX_SLOTS, SharedSlots
from support.core_kit import LAYOUT, OTHER, Kit, frames_of

if host_name() is None:
    pytest.skip("memory is shared on Linux only", allow_module_level=True)


class SharingKit(Kit):
    """A core that can attach to slots, and one worker."""

    def __init__(self) -> None:
        super().__init__()
        self.state.slots = self.slots = SharedSlots()
        self.pages: list[SharedPages] = []
        self.hello()

    def share(self, number: int, layout: Layout = LAYOUT, **keys: Any) -> dict[str, Any]:
        self.pages.append(SharedPages(slot_bytes(layout)))
        member = self.member()
        request: dict[str, Any] = {
            "worker": member.worker,
            "session": member.session,
            "slot": number,
            "address": list(self.pages[-1].address),
            "fingerprint": layout.fingerprint,
        }
        header: dict[str, Any] = self.ask("share", **(request | keys))
        return header

    def push_slot(self, number: int, slot: int) -> None:
        gradient = self.gradient(number, parts=(), slot=slot)
        self.slots.find(gradient)
        self.handle(gradient)


def mapped() -> set[str]:
    """Name the pieces of shared memory that this process has mapped."""
    return set(re.findall(r"/memfd:(distgrad-[0-9a-f]+)", Path("/proc/self/maps").read_text()))


@pytest.fixture
def kit() -> Iterator[SharingKit]:
    kit = SharingKit()
    yield kit
    # Memory that is still mapped counts as a leak.
    kit.slots.forget(kit.member().worker)
    kit.pages.clear()
    gc.collect()


def test_a_gradient_in_a_slot_is_applied_like_any_other(kit: SharingKit) -> None:
    assert kit.share(0)["slots"] == [0]
    for arena in slot_arenas(LAYOUT, kit.pages[0].array):
        arena[:] = 1

    kit.push_slot(1, 0)
    assert kit.member().queued_bytes == max(1024, LAYOUT.gradient_bytes)
    kit.work(2)

    assert (kit.member().applied, kit.member().settled) == (1, 1)
    assert kit.total == -LAYOUT.gradient_bytes // LAYOUT.arenas[0].dtype.itemsize


def test_a_gradient_in_a_slot_that_is_not_known_is_missing(kit: SharingKit) -> None:
    kit.push_slot(1, 0)

    assert kit.state.dropped == {"slot": 1}
    assert (kit.member().missing, kit.member().accepted) == (True, 0)
    assert kit.beat()["resend"]
    assert "slots" not in kit.beat()


def test_slots_go_with_the_session_and_with_the_lease(kit: SharingKit) -> None:
    kit.share(0)
    kit.share(7)
    assert kit.beat()["slots"] == [0, 7]

    kit.hello(nonce=b"another process of it")

    assert not kit.member().slots
    assert kit.share(1)["slots"] == [1]
    kit.wait(1000.0)
    assert not kit.member().slots
    kit.push_slot(1, 1)
    assert kit.state.dropped["slot"] == 1


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"address": None}, "unavailable"),
        ({"address": [1, 0, "distgrad-x", 4096]}, "unavailable"),
        ({"address": [1, 0, "distgrad-x", 5]}, "unavailable"),
        ({"fingerprint": OTHER.fingerprint}, "layout"),
        ({"slot": -1}, "malformed"),
        ({"slot": "0"}, "malformed"),
        ({"session": "one:99"}, "fenced"),
        ({"worker": "stranger"}, "unknown_worker"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_changes_nothing(
    kit: SharingKit, keys: dict[str, Any], error: str
) -> None:
    kit.share(0)

    assert kit.share(1, **keys)["error"] == error
    assert kit.member().slots == [0]


def test_where_grants_are_turns_each_worker_shares_one_slot(kit: SharingKit) -> None:
    kit.state.grants.uses_turns = True
    assert kit.share(0)["slots"] == [0]

    assert kit.share(1)["error"] == "crowded"
    assert kit.share(0)["slots"] == [0], "told once more, after a lost reply"

    assert kit.share(2, layout=OTHER)["error"] == "layout"
    kit.state.grants.uses_turns = False
    assert kit.share(1)["slots"] == [0, 1]


def test_where_grants_are_turns_a_slot_of_another_layout_is_in_nobodys_way(kit: SharingKit) -> None:
    kit.share(0)
    kit.share(1)
    kit.ask("set", frames_of(OTHER, 3.0))
    kit.state.grants.uses_turns = True

    assert kit.share(2, layout=OTHER)["slots"] == [2]
    assert kit.share(3, layout=OTHER)["error"] == "crowded"


def test_a_broker_that_shares_nothing_says_so() -> None:
    kit = SharingKit()
    kit.state.slots = None

    assert kit.share(0)["error"] == "unavailable"


def test_a_worker_cannot_make_the_broker_map_without_end(kit: SharingKit) -> None:
    for slot in range(MAX_SLOTS):
        kit.share(slot)

    assert kit.share(MAX_SLOTS)["error"] == "unavailable"
    assert kit.share(0)["slots"] == list(range(MAX_SLOTS))  # one that is replaced


def test_slots_go_with_the_layout_that_they_were_made_for(kit: SharingKit) -> None:
    for slot in range(0, 4 * MAX_SLOTS, 2):
        for number, layout in enumerate((LAYOUT, OTHER)):
            kit.ask("set", frames_of(layout))
            assert kit.share(slot + number, layout)["slots"] == [slot + number]
    kit.pages.clear()
    gc.collect()

    assert len(mapped()) == 1


def test_what_is_queued_in_a_slot_of_a_former_layout_is_decided_on_and_what_comes_later_is_sent(
    kit: SharingKit,
) -> None:
    kit.share(0)
    kit.push_slot(1, 0)
    kit.ask("set", frames_of(OTHER))
    kit.share(1, OTHER)

    kit.push_slot(2, 0)
    assert kit.beat()["resend"]
    kit.ask("set", frames_of(LAYOUT))
    kit.work(1)
    assert (kit.member().applied, kit.member().settled) == (1, 1)
    kit.push(2)
    kit.work(1)

    assert (kit.member().applied, kit.member().settled) == (2, 2)


def test_what_is_queued_keeps_the_memory_that_it_lies_in(kit: SharingKit) -> None:
    kit.share(0)
    for arena in slot_arenas(LAYOUT, kit.pages[0].array):
        arena[:] = 2
    kit.push_slot(1, 0)

    kit.slots.forget(kit.member().worker)
    kit.pages.clear()
    kit.work(1)

    assert kit.total == -2 * LAYOUT.gradient_bytes // LAYOUT.arenas[0].dtype.itemsize
    assert np.isfinite(kit.total)
