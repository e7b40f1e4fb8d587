"""What gets lost between a worker and its broker: patience, tries, and what a restart has cost."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distgrad.errors import BrokerRestarted, HistoryLost
from distgrad_worker.losses import MAX_TRIES, SLOW_BYTES_PER_S, STALL_S, Progress, cost_of_restart


def cost(
    settled: int, accepted: int, *, is_adopted: bool = False, is_durable: bool = True, kept: int | None = None
) -> Any:
    return cost_of_restart("w", settled, accepted, is_adopted=is_adopted, is_durable=is_durable, kept=kept)


@pytest.mark.parametrize(("settled", "accepted"), [(0, 0), (5, 5), (5, 9), (0, 3)])
def test_a_broker_that_kept_all_that_it_had_settled_costs_nothing(settled: int, accepted: int) -> None:
    assert cost(settled, accepted) is None


def test_a_broker_that_has_less_than_it_had_settled_has_lost_history() -> None:
    lost = cost(5, 4)

    assert isinstance(lost, HistoryLost)
    assert "has 4 gradients of 'w', but had settled 5" in str(lost)


def test_that_is_lost_history_whatever_it_says_of_its_disk() -> None:
    assert isinstance(cost(5, 4, is_durable=False), HistoryLost)


def test_a_broker_that_adopted_the_numbers_says_what_is_gone() -> None:
    restarted = cost(5, 5, is_adopted=True, is_durable=False)

    assert isinstance(restarted, BrokerRestarted)
    assert restarted.lost == (1, 5)
    assert restarted.hint is not None


@pytest.mark.parametrize(
    ("settled", "kept", "lost", "told"),
    [
        (5, None, (1, 5), "kept nothing on disk: the effect of gradients 1 to 5 of this worker is gone"),
        (5, 3, (4, 5), "went back to its newest checkpoint: the effect of gradients 4 to 5 of this worker is gone"),
        (5, 0, (1, 5), "went back to its newest checkpoint: the effect of gradients 1 to 5 of this worker is gone"),
        (5, 6, None, "went back to its newest checkpoint: it has all that was settled of this worker"),
    ],
)
def test_only_what_no_checkpoint_has_is_told_to_be_gone(
    settled: int, kept: int | None, lost: tuple[int, int] | None, told: str
) -> None:
    restarted = cost(settled, settled, is_adopted=True, is_durable=False, kept=kept)

    assert restarted.lost == lost
    assert told in str(restarted)


def test_a_broker_without_files_before_anything_was_settled_has_lost_nothing() -> None:
    restarted = cost(0, 0, is_durable=False)

    assert isinstance(restarted, BrokerRestarted)
    assert restarted.lost is None


def test_a_broker_that_settles_at_once_and_has_all_from_its_last_checkpoint_costs_nothing() -> None:
    assert cost(5, 5, is_durable=False) is None


def test_progress_is_news_of_any_kind() -> None:
    progress = Progress()
    progress.since = 10.0

    progress.hear(0, 20.0, is_news=False)
    assert progress.since == 10.0
    progress.hear(0, 20.0, is_news=True)
    assert progress.since == 20.0
    progress.hear(3, 30.0, is_news=False)

    assert (progress.since, progress.accepted) == (30.0, 3)
    progress.hear(2, 40.0, is_news=False)
    assert (progress.since, progress.accepted) == (30.0, 3)


def test_patience_grows_with_what_is_on_the_way() -> None:
    progress = Progress()

    assert not progress.is_stalled(0, STALL_S)
    assert progress.is_stalled(0, STALL_S + 0.01)
    assert not progress.is_stalled(int(SLOW_BYTES_PER_S), STALL_S + 0.99)
    assert progress.is_stalled(int(SLOW_BYTES_PER_S), STALL_S + 1.01)


def test_patience_doubles_with_each_try_in_vain() -> None:
    progress = Progress()
    for _ in range(3):
        assert progress.count_try(4, "tcp://there", 0.0) is None

    assert not progress.is_stalled(0, 4 * STALL_S)
    assert progress.is_stalled(0, 4 * STALL_S + 0.01)


def test_the_same_gradient_in_vain_too_often_is_a_failure_and_a_later_one_counts_anew() -> None:
    progress = Progress()
    for _ in range(MAX_TRIES - 1):
        assert progress.count_try(4, "tcp://there", 0.0) is None
    assert progress.count_try(5, "tcp://there", 0.0) is None
    for _ in range(MAX_TRIES - 2):
        assert progress.count_try(5, "tcp://there", 0.0) is None

    failure = progress.count_try(5, "tcp://there", 0.0)

    assert failure is not None
    assert "gradient 6 was sent 5 times" in str(failure)
    assert "tcp://there" in str(failure)


def test_from_the_third_try_in_vain_on_there_is_a_pause_before_the_next_and_none_once_something_has_arrived() -> None:
    """Regression: a connection that was reset five times within 7 ms ended the session."""
    progress = Progress()
    resent = []
    for _ in range(MAX_TRIES - 1):
        assert progress.count_try(4, "tcp://there", 10.0) is None
        resent.append(progress.resend_at)

    assert resent == [-math.inf, -math.inf, 10.5, 12.0]
    progress.hear(5, 11.0, is_news=False)
    assert progress.resend_at == -math.inf


def test_what_arrives_is_not_counted_as_lost_even_if_it_has_to_be_sent_again() -> None:
    """Regression: a version that crash after crash took back made workers give up that waited for it to come again."""
    progress = Progress()
    for _ in range(3):
        for _ in range(MAX_TRIES - 1):
            assert progress.count_try(4, "tcp://there", 0.0) is None

        progress.hear(4, 1.0, is_news=True)
