"""Buffers within one process: the mean of every K gradients is one update."""

from __future__ import annotations

import numpy as np
import pytest

from distgrad import DistributedGradients
from distgrad.errors import ConfigError, GradientRefused
from distgrad.policies import Asynchronous, Bounded, Buffered, Policy, Synchronous

ONES = np.ones(3)


def test_every_so_many_gradients_are_one_update_by_their_mean() -> None:
    with DistributedGradients(policy=Buffered(2)) as gradients:
        gradients.set_model_parameters(np.zeros(3))
        for factor in (1, 3, 5, 7):
            gradients.add_gradients(factor * ONES)
        gradients.start()
        gradients.flush(20)

        assert gradients.version == 2
        assert gradients.get_model_parameters().tolist() == [-8.0] * 3


def test_a_sum_is_made_if_asked_for() -> None:
    with DistributedGradients(policy=Buffered(3), reduction="sum") as gradients:
        gradients.set_model_parameters(np.zeros(3))
        gradients.start()
        for _ in range(3):
            gradients.add_gradients(ONES)
        gradients.flush(20)

        assert (gradients.version, gradients.get_model_parameters()[0]) == (1, -3)


@pytest.mark.parametrize("end", ["flush", "stop"])
def test_a_partial_buffer_waits_until_somebody_waits_for_it(end: str) -> None:
    with DistributedGradients(policy=Buffered(4)) as gradients:
        gradients.set_model_parameters(np.zeros(3))
        gradients.start()
        gradients.add_gradients(ONES)
        gradients.add_gradients(3 * ONES)
        assert (gradients.version, gradients.queued) == (0, 2)

        if end == "flush":
            gradients.flush(20)
        else:
            gradients.stop(timeout=20)

        assert (gradients.version, gradients.get_model_parameters()[0]) == (1, -2)


def test_what_waits_in_the_buffer_can_be_cleared() -> None:
    with DistributedGradients(policy=Buffered(4)) as gradients:
        gradients.set_model_parameters(np.zeros(3))
        gradients.start()
        gradients.add_gradients(ONES)

        assert gradients.clear_gradients() == 1
        gradients.flush(20)
        assert gradients.version == 0


def test_a_bad_gradient_is_refused_alone_and_the_mean_is_that_of_the_others() -> None:
    with DistributedGradients(policy=Buffered(3)) as gradients:
        gradients.set_model_parameters(np.zeros(3))
        for factor in (2.0, np.nan, 4.0):
            gradients.add_gradients(factor * ONES)
        gradients.start()

        with pytest.raises(GradientRefused, match=r"gradient 2 was refused.*nan"):
            gradients.flush(20)

        assert (gradients.version, gradients.get_model_parameters()[0]) == (1, -3)


def test_an_overflowing_sum_refuses_all_that_are_in_it() -> None:
    with DistributedGradients(policy=Buffered(2), reduction="sum") as gradients:
        gradients.set_model_parameters(np.zeros(1, np.float32))
        for _ in range(2):
            gradients.add_gradients(np.array([3e38], np.float32))
        gradients.start()
        with pytest.raises(GradientRefused):
            gradients.flush(20)

        assert gradients.refused == {"not_finite": 2}


@pytest.mark.parametrize("policy", [Synchronous(), Bounded(2)])
def test_a_policy_that_tells_workers_apart_is_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="tells workers apart; start a broker"):
        DistributedGradients(policy=policy)


def test_a_buffer_larger_than_the_queue_and_an_unknown_reduction_are_refused() -> None:
    with pytest.raises(ConfigError, match="must hold 9 gradients, but max_queue is 8"):
        DistributedGradients(policy=Buffered(9), max_queue=8)
    with pytest.raises(ConfigError, match="mean, sum"):
        DistributedGradients(reduction="median")


def test_async_is_what_there_is_without_a_policy() -> None:
    with DistributedGradients(policy=Asynchronous()) as gradients:
        gradients.set_model_parameters(np.zeros(3))
        gradients.start()
        gradients.add_gradients(ONES)
        gradients.add_gradients(ONES)
        gradients.flush(20)

        assert gradients.version == 2


def test_a_name_is_no_policy_here_and_what_is_one_is_said() -> None:
    with pytest.raises(ConfigError, match=r"policy must be a policy such as distgrad\.policies\.Buffered.*got 'sync'"):
        DistributedGradients(policy="sync")  # type: ignore[arg-type]
