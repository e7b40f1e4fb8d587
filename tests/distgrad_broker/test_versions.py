"""Version buffers: readers keep what they read, updates never wait, memory does not grow with readers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad.codec import LENT_BYTES
from distgrad.errors import GradientRefused
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.wire import PART_BYTES
from distgrad_broker.buffers import N_BUFFERS, most_buffers
from distgrad_broker.holds import MAX_READERS, QUIET_S, SERVED_PARTS
from distgrad_broker.versions import Versions
from support.core_kit import Kit

MAX_HELD = N_BUFFERS - 1
LARGE = Layout.of({"n": np.zeros(1, np.int64), "w": np.zeros(5 << 20, np.float32)})


class Pool:
    """Versions of a model that is read in ranges, and gradients of ones."""

    def __init__(self) -> None:
        self.versions = Versions(ParameterHolder(executor="numpy"))
        self.versions.set(LARGE, [np.zeros(arena.size, arena.dtype) for arena in LARGE.arenas])
        kit = Kit(None)
        self.good = kit.gradient(1, layout=LARGE)
        self.bad = kit.gradient(1, layout=LARGE, value=np.nan)

    def update(self, times: int = 1) -> None:
        for _ in range(times):
            self.versions.apply(self.good)

    def open(self, now: float = 0.0) -> str:
        token = self.try_open(now)
        assert token is not None
        return token

    def try_open(self, now: float = 0.0) -> str | None:
        opened = self.versions.open(now)
        return None if opened is None else opened.token

    def rest(self, token: str, now: float = 0.0) -> float | None:
        """Read on to the end, and tell the value that all trained numbers have."""
        values: set[Any] = set()
        for first in range(SERVED_PARTS, len(LARGE.parts()), SERVED_PARTS):
            found = self.versions.read(token, first, now)
            if found is None:
                return None
            trained = [part for part in found.parts if len(part) == PART_BYTES]
            values |= {value for part in trained for value in np.frombuffer(part, np.float32)[:: 1 << 16]}
        (value,) = values
        return float(value)

    def buffers(self) -> int:
        versions = self.versions
        storages = {id(hold.storage) for hold in versions._buffers.holds.values()} | {id(versions.holder.storage)}
        return len(storages | {id(spare) for spare in versions._buffers.spares})


def test_a_reader_keeps_its_version_while_updates_go_on() -> None:
    pool = Pool()
    pool.update()
    token = pool.open()

    pool.update(5)

    assert pool.rest(token) == -1.0
    assert pool.versions.version == 6


def test_without_readers_two_buffers_take_turns() -> None:
    pool = Pool()
    pool.update(5)

    assert pool.buffers() == 2


def test_small_parameters_may_have_more_versions_in_as_little_memory() -> None:
    assert [most_buffers(mib << 20) for mib in (0, 1, 4, 16, 25, 100)] == [10, 10, 10, 4, 3, 3]


def test_a_refused_gradient_leaves_version_and_spare_as_they_were() -> None:
    pool = Pool()
    pool.update()
    spares = list(pool.versions._buffers.spares)

    with pytest.raises(GradientRefused):
        pool.versions.apply(pool.bad)

    assert pool.versions._buffers.spares == spares
    assert pool.versions.version == 1


def test_a_gradient_of_another_layout_is_refused_also_while_there_are_no_parameters() -> None:
    pool = Pool()
    pool.versions.clear()

    with pytest.raises(GradientRefused) as caught:
        pool.versions.apply(pool.good)
    assert caught.value.reason == "layout"


def test_many_slow_readers_hold_few_versions_and_delay_no_update() -> None:
    pool = Pool()
    tokens = []
    for _ in range(3 * MAX_HELD):
        tokens.append(pool.try_open())
        pool.update()

    assert pool.versions.version == 3 * MAX_HELD
    assert pool.versions.held == MAX_HELD
    assert pool.buffers() == N_BUFFERS
    assert [token is not None for token in tokens] == [True] * MAX_HELD + [False] * 2 * MAX_HELD
    assert [pool.rest(token) for token in tokens[:MAX_HELD] if token] == [0.0, -1.0]


def test_a_bad_gradient_changes_nothing_where_updates_are_made_in_place() -> None:
    pool = Pool()
    for _ in range(MAX_HELD):
        pool.open()
        pool.update()
    pool.update()

    with pytest.raises(GradientRefused):
        pool.versions.apply(pool.bad)

    assert pool.versions.holder.storage is not None
    assert set(pool.versions.holder.storage.arenas[0].tolist()) == {-3.0}


def test_who_waits_for_too_long_gets_the_place_of_a_quiet_reader_or_of_the_one_that_is_least_far() -> None:
    pool = Pool()
    quiet = pool.open(now=0.0)
    pool.update()
    beginner = pool.open(now=QUIET_S + 1)
    pool.update()
    assert pool.try_open(QUIET_S + 1) is None

    pool.versions.relieve()
    assert pool.rest(quiet) is None
    third = pool.open(now=QUIET_S + 1)
    pool.versions.read(third, 1, QUIET_S + 1)
    pool.update()
    assert pool.try_open(QUIET_S + 1) is None

    pool.versions.relieve()
    assert pool.rest(beginner) is None
    assert pool.rest(third, QUIET_S + 1) == -2.0
    assert pool.versions.revoked == 2


def test_readers_of_one_version_share_it() -> None:
    pool = Pool()
    tokens = [pool.open() for _ in range(5)]
    pool.update(3)

    assert pool.versions.held == 1
    assert pool.buffers() == N_BUFFERS
    assert {pool.rest(token) for token in tokens} == {0.0}


def test_what_is_lent_is_not_written_to_and_only_one_version_is_lent() -> None:
    pool = Pool()
    lent = pool.versions.open(0.0)
    assert lent is not None
    assert lent.token is not None
    assert lent.is_lent
    pool.versions.release(lent.token)
    pool.update()
    copied = pool.versions.open(0.0)
    assert copied is not None
    assert not copied.is_lent
    pool.update(3)

    assert {value for part in lent.parts[1:] for value in np.frombuffer(part, np.float32)[:: 1 << 16]} == {0.0}
    assert pool.buffers() <= N_BUFFERS
    del lent, copied
    again = pool.versions.open(0.0)
    assert again is not None
    assert again.is_lent


def test_who_has_read_everything_holds_nothing() -> None:
    pool = Pool()
    token = pool.open()
    pool.rest(token)

    pool.update(2)

    assert pool.versions.held == 0
    assert pool.buffers() == 2


def test_quiet_readers_are_forgotten_in_the_end() -> None:
    pool = Pool()
    token = pool.open(now=0.0)
    pool.update()

    pool.versions.expire(15 * QUIET_S)
    assert pool.versions.held == 1
    pool.versions.expire(15 * QUIET_S + 1)

    assert pool.versions.held == 0
    assert pool.rest(token) is None


def test_readers_that_only_ever_begin_are_bounded() -> None:
    """Regression: each get of a large model was kept for half a minute, however many came."""
    pool = Pool()
    pinned = pool.versions.pin(0.0)[0]
    tokens = [pool.open(now=float(number)) for number in range(MAX_READERS + 5)]

    assert pool.rest(tokens[4]) is None
    assert pool.rest(tokens[5]) == 0.0
    assert pool.versions.revoked == 5
    assert pinned in pool.versions._buffers.pinned


def test_a_pinned_version_is_never_revoked_and_comes_back_when_it_is_released() -> None:
    pool = Pool()
    token, layout, arenas, version = pool.versions.pin(0.0)
    for _ in range(3 * MAX_HELD):
        pool.update()
        pool.try_open()
        pool.versions.relieve()
    pool.versions.expire(1000.0)

    assert (layout, version, float(arenas[0].sum())) == (LARGE, 0, 0.0)
    assert pool.versions.read(token, 0, 0.0) is None, "nobody reads with the file thread's token"
    pool.versions.set(LARGE, [np.ones(arena.size, arena.dtype) for arena in LARGE.arenas])
    assert float(arenas[0].sum()) == 0.0
    pool.versions.release(token)
    pool.versions.release(token)
    pool.update()
    assert pool.versions.holder.storage is not None
    assert float(pool.versions.holder.storage.arenas[1][0]) == 1.0, "integers are those of the present parameters"


def test_replaced_parameters_are_not_read_on() -> None:
    pool = Pool()
    token = pool.open()
    pool.versions.set(LARGE, [np.ones(arena.size, arena.dtype) for arena in LARGE.arenas])

    assert pool.rest(token) is None
    assert pool.versions.version == 0


@pytest.mark.parametrize(("size", "is_lent"), [(LENT_BYTES // 4 - 1, False), (LENT_BYTES // 4, True)])
def test_parameters_that_one_reply_holds_are_lent_if_copying_them_costs_more(size: int, is_lent: bool) -> None:
    layout = Layout.of(np.zeros(size, np.float32))
    versions = Versions(ParameterHolder(executor="numpy"))
    versions.set(layout, [np.zeros(size, np.float32)])
    gradient = Kit(None).gradient(1, layout=layout)

    first = versions.open(0.0)
    assert first is not None
    versions.apply(gradient)
    second = versions.open(0.0)
    assert second is not None
    for _ in range(5):
        versions.apply(gradient)

    assert (first.is_lent, second.is_lent) == (is_lent, False)
    assert (first.token, second.token) == (None, None)
    if is_lent:
        assert {value for part in first.parts for value in np.frombuffer(part, np.float32)} == {0.0}
        del first
        third = versions.open(0.0)
        assert third is not None
        assert third.is_lent
