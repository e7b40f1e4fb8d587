"""Rates come from differences, and only between answers of one process of the broker."""

from __future__ import annotations

import math
from typing import Any

from distgrad.seeing.history import History, mean_loss


def status(applied: int, incarnation: str = "one") -> dict[str, Any]:
    return {"incarnation": incarnation, "applied": applied, "queued": 3, "version": applied}


def worker(settled: int, name: str = "a", loss: float | None = None, state: str = "live") -> dict[str, Any]:
    return {"id": name, "settled": settled, "loss": loss, "state": state}


def test_the_first_look_has_no_rate_and_the_next_one_has() -> None:
    history = History()

    first = history.add(100.0, status(10), [worker(4)])
    second = history.add(102.0, status(30), [worker(9), worker(5, "new")])

    assert [row["rate"] for row in first.workers] == [None]
    assert [row["rate"] for row in second.workers] == [2.5, None]
    assert [point.rate for point in history.points] == [None, 10.0]


def test_another_process_of_the_broker_is_not_compared_with_the_former_one() -> None:
    history = History()
    history.add(100.0, status(500), [worker(400)])

    sight = history.add(101.0, status(2, "two"), [worker(1)])

    assert history.points[-1].rate is None
    assert sight.workers[0]["rate"] is None


def test_a_look_that_failed_keeps_what_was_seen_and_adds_no_point() -> None:
    history = History()
    history.add(100.0, status(10), [worker(4)])

    sight = history.miss(105.0, "no answer")
    after = history.add(106.0, status(20), [worker(5)])

    assert (sight.error, sight.status["applied"], len(history.points)) == ("no answer", 10, 2)
    assert after.error is None
    assert history.points[-1].rate is None, "nobody knows how long the silence was"


def test_points_are_bounded() -> None:
    history = History(max_points=3)

    for second in range(10):
        history.add(float(second), status(second), [])

    assert [point.version for point in history.points] == [7, 8, 9]


def test_the_loss_is_the_mean_of_those_who_live_and_tell_a_finite_one() -> None:
    assert mean_loss([]) is None
    assert mean_loss([worker(1, loss=None)]) is None
    assert mean_loss([worker(1, loss=2.0), worker(1, loss=4.0), worker(1, loss=math.nan)]) == 3.0
    assert mean_loss([worker(1, loss=2.0), worker(1, loss=9.0, state="silent")]) == 2.0
    assert mean_loss([worker(1, loss=9.0, state="silent")]) == 9.0
