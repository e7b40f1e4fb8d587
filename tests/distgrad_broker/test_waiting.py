"""Until when requests wait: each is told once, in the order of their deadlines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distgrad_broker.waiting import Deadlines, Waiter


def waiter(deadline: float, name: bytes = b"who") -> Waiter:
    return Waiter((name, b""), 1, None, deadline)


def test_nobody_waits_and_nothing_is_due_at_first() -> None:
    deadlines = Deadlines()

    assert deadlines.next() is None
    assert deadlines.due(1e9) == []


def test_who_waits_is_due_at_its_deadline_and_only_once() -> None:
    deadlines = Deadlines()
    late = waiter(5.0)
    deadlines.wait(late, print)

    assert deadlines.next() == 5.0
    assert deadlines.due(4.999) == []
    assert deadlines.due(5.0) == [late]
    assert late.on_deadline is print
    assert (deadlines.due(6.0), deadlines.next()) == ([], None)


def test_who_was_answered_is_not_due_and_does_not_wake_anybody() -> None:
    deadlines = Deadlines()
    first, second = waiter(5.0), waiter(7.0)
    deadlines.wait(first, print)
    deadlines.wait(second, print)

    first.is_done = True

    assert deadlines.next() == 7.0
    assert deadlines.due(10.0) == [second]


def test_who_was_answered_among_those_that_are_due_is_left_out() -> None:
    deadlines = Deadlines()
    waiters = [waiter(float(number)) for number in range(4)]
    for each in waiters:
        deadlines.wait(each, print)
    waiters[1].is_done = True

    assert deadlines.due(2.0) == [waiters[0], waiters[2]]
    assert deadlines.next() == 3.0


def test_one_that_waits_anew_is_due_again() -> None:
    deadlines = Deadlines()
    late = waiter(1.0)
    deadlines.wait(late, print)
    deadlines.due(1.0)

    late.deadline = 3.0
    deadlines.wait(late, print)

    assert (deadlines.due(2.0), deadlines.due(3.0)) == ([], [late])


@given(st.lists(st.integers(0, 5)), st.integers(0, 6))
def test_those_due_come_by_deadline_and_then_in_the_order_of_their_coming(times: list[int], now: int) -> None:
    deadlines = Deadlines()
    waiters = [waiter(float(time), b"%d" % place) for place, time in enumerate(times)]
    for each in waiters:
        deadlines.wait(each, print)

    due = deadlines.due(float(now))

    assert due == sorted((each for each in waiters if each.deadline <= now), key=lambda each: each.deadline)
    assert deadlines.next() == min((each.deadline for each in waiters if each.deadline > now), default=None)
