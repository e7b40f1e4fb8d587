"""Tests of `distgrad.spinning`, on a clock that only moves when somebody looks, sleeps or gives way."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad import spinning
from distgrad.spinning import ALONE_S, MAX_PAUSE, MIN_PAUSE, MIN_SHORT_WAITS, OTHERS_S, PAUSE_GROWTH, SOON_S, SPIN_S

LOOK_S = 2e-6


class World:
    """A clock, one source of messages, and a spinner that waits for them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.message_at = math.inf
        self.others_s = 1e-6
        self.polls: list[int] = []
        self.spinner = spinning.Spinner(lambda: self.now, self.give_way)

    def give_way(self) -> None:
        """Let others run."""
        self.now += self.others_s

    def poll(self, timeout_ms: int) -> bool:
        """Look, or sleep until the message or the end of the time."""
        self.polls.append(timeout_ms)
        self.now += LOOK_S
        if timeout_ms:
            self.now = max(self.now, min(self.message_at, self.now + timeout_ms / 1000))
        return self.now >= self.message_at

    def wait(self, message_in_s: float, timeout_ms: int = 100) -> bool:
        """Wait for a message that comes after a time; tells whether the spinner slept."""
        self.polls.clear()
        self.message_at = self.now + message_in_s
        is_ready = self.spinner.poll(self.poll, timeout_ms)
        assert is_ready == (self.now >= self.message_at)
        return bool(self.polls[-1])


@pytest.fixture(name="awake")
def fixture_awake() -> World:
    """Make a spinner that has seen as many short waits as it takes."""
    world = World()
    for _ in range(MIN_SHORT_WAITS):
        assert world.wait(SPIN_S / 2)
    assert not world.wait(SPIN_S / 2)
    return world


def test_after_a_few_short_waits_it_stays_awake(awake: World) -> None:
    assert awake.polls.count(0) == len(awake.polls) > 10


def test_a_wait_that_lasts_ends_in_sleep_and_so_do_the_next_ones(awake: World) -> None:
    began = awake.now
    assert awake.wait(0.05)
    assert awake.polls.count(0) <= 1 + SPIN_S / LOOK_S
    assert awake.now - began == pytest.approx(0.05, abs=1e-4)
    for _ in range(MIN_SHORT_WAITS):
        assert awake.wait(SPIN_S / 2)
        assert awake.polls == [100]
    assert not awake.wait(SPIN_S / 2)


def test_short_and_long_waits_by_turns_never_keep_it_awake() -> None:
    world = World()
    for _ in range(20):
        assert world.wait(SPIN_S / 2)
        assert world.polls == [100]
        assert world.wait(0.01)
        assert world.polls == [100]


def test_a_poll_that_may_not_wait_looks_once_and_teaches_nothing(awake: World) -> None:
    assert not awake.wait(math.inf, timeout_ms=0)
    assert awake.polls == [0]
    assert not awake.wait(SPIN_S / 2)


def test_who_gives_way_to_a_neighbour_sleeps_this_time_only(awake: World) -> None:
    awake.others_s = 2 * ALONE_S
    assert awake.wait(SPIN_S / 2)
    assert awake.polls == [0, 100]
    awake.others_s = 1e-6
    assert not awake.wait(SPIN_S / 2)


def lose(world: World) -> float:
    """Give way to a program that computes, and tell until when it then sleeps at once."""
    world.others_s = 4 * OTHERS_S
    assert world.wait(SPIN_S / 2)
    world.others_s = 1e-6
    lost_at = world.now
    while world.wait(SPIN_S / 2):
        pass
    return world.now - lost_at


def test_beside_programs_that_compute_little_is_lost(awake: World) -> None:
    pause = MIN_PAUSE
    for _ in range(6):
        slept = lose(awake)
        assert slept == pytest.approx(pause * 4 * OTHERS_S, abs=4 * SPIN_S)
        pause = min(PAUSE_GROWTH * pause, MAX_PAUSE)
    assert pause == MAX_PAUSE


def test_a_loss_long_after_the_last_one_counts_as_an_accident(awake: World) -> None:
    assert lose(awake) < lose(awake)
    awake.now += 2 * SOON_S
    assert lose(awake) == pytest.approx(MIN_PAUSE * 4 * OTHERS_S, abs=4 * SPIN_S)


def test_who_was_stopped_for_a_minute_pauses_for_a_moment(awake: World) -> None:
    awake.others_s = 60.0
    awake.wait(SPIN_S / 2)
    awake.others_s = 1e-6
    stopped_at = awake.now
    while awake.wait(SPIN_S / 2):
        pass
    assert awake.now - stopped_at < 0.5


@settings(deadline=None)
@given(
    waits=st.lists(
        st.tuples(st.floats(0, 0.02), st.integers(0, 20), st.floats(0, 0.006)),
        max_size=60,
    )
)
def test_it_returns_what_was_polled_and_waits_no_longer_than_it_may(waits: list[tuple[float, int, float]]) -> None:
    world = World()
    for message_in_s, timeout_ms, others_s in waits:
        world.others_s = others_s
        began = world.now
        world.wait(message_in_s, timeout_ms)
        assert world.now - began <= min(message_in_s, timeout_ms / 1000) + SPIN_S + others_s + 4 * LOOK_S
        assert sum(map(bool, world.polls)) <= 1
        assert max(world.polls) <= timeout_ms


def test_the_default_gives_way_to_others() -> None:
    assert spinning.Spinner().poll(lambda timeout_ms: timeout_ms + 1, 7) == 8
