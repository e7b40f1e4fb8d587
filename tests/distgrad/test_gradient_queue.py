"""The queue between callers and updater: who waits, for how long, and what stopping leaves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from distgrad.errors import Destroyed, QueueFull, StateError
from distgrad.in_process import DistributedGradients
from support.gates import WAIT_S, Gate, Running


@pytest.fixture
def gradients() -> Iterator[DistributedGradients]:
    with DistributedGradients() as made:
        yield made


def hold(gradients: DistributedGradients, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Stop the updater in front of every gradient."""
    gate = Gate(gradients._holder.apply)
    monkeypatch.setattr(gradients._holder, "apply", gate)
    return gate


def test_add_gradients_blocks_while_the_updater_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    with DistributedGradients(max_queue=1) as gradients:
        gradients.set_model_parameters(np.zeros(1))
        gate = hold(gradients, monkeypatch)
        gradients.start()
        gradients.add_gradients(np.ones(1))
        gate.wait_for_arrival()
        gradients.add_gradients(np.ones(1))

        with pytest.raises(QueueFull):
            gradients.add_gradients(np.ones(1), block=False)
        with pytest.raises(QueueFull, match=r"after 0\.01 s"):
            gradients.add_gradients(np.ones(1), timeout=0.01)
        blocked = Running(lambda: gradients.add_gradients(np.ones(1)))
        gate.open()

        assert blocked.result() == 3
        gradients.flush()
        assert gradients.version == 3


def test_add_gradients_that_blocks_is_told_when_the_updater_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with DistributedGradients(max_queue=1) as gradients:
        gradients.set_model_parameters(np.zeros(1))
        gradients.start()
        gradients.set_model_parameters(None)
        gradients.add_gradients(np.ones(1))
        waits = Gate(gradients._queue._changed.wait)
        waits.open()
        monkeypatch.setattr(gradients._queue._changed, "wait", waits)

        blocked = Running(lambda: gradients.add_gradients(np.ones(1)))
        waits.wait_for_arrival()
        gradients.stop()

        with pytest.raises(QueueFull):
            blocked.result()


def test_set_model_parameters_taken_away_under_the_updater_keeps_its_gradient_first(
    gradients: DistributedGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients.set_model_parameters(np.zeros(1))
    gate = Gate(gradients._apply)
    monkeypatch.setattr(gradients, "_apply", gate)
    gradients.start()
    gradients.add_gradients(np.array([1.0]))
    gate.wait_for_arrival()
    gradients.add_gradients(np.array([10.0]))

    gradients.set_model_parameters(None)
    gate.let_one_pass()
    gradients.stop()
    assert gradients.queued == 2

    gate.open()
    gradients.set_model_parameters(np.zeros(1))
    gradients.start()
    gradients.flush()
    assert gradients.get_model_parameters().tolist() == [-11]


def test_stop_drains_what_waits_at_that_moment_and_no_more(
    gradients: DistributedGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients.set_model_parameters(np.zeros(1))
    gate = hold(gradients, monkeypatch)
    gradients.start()
    for _ in range(3):
        gradients.add_gradients(np.ones(1))
    gate.wait_for_arrival()

    with pytest.raises(TimeoutError, match="still runs"):
        gradients.stop(timeout=0.01)
    gradients.add_gradients(np.ones(1))
    gate.open()
    gradients.stop()

    assert (gradients.version, gradients.queued) == (3, 1)


def test_stop_without_drain_leaves_the_queue(gradients: DistributedGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients.set_model_parameters(np.zeros(1))
    gate = hold(gradients, monkeypatch)
    gradients.start()
    for _ in range(3):
        gradients.add_gradients(np.ones(1))
    gate.wait_for_arrival()

    with pytest.raises(TimeoutError):
        gradients.stop(drain=True, timeout=0.01)
    with pytest.raises(TimeoutError):
        gradients.stop(drain=False, timeout=0.01)
    gate.open()
    gradients.stop()

    assert (gradients.version, gradients.queued) == (1, 2)


def test_stop_ends_without_parameters_though_gradients_wait(gradients: DistributedGradients) -> None:
    gradients.set_model_parameters(np.zeros(1))
    gradients.start()
    gradients.set_model_parameters(None)
    gradients.add_gradients(np.ones(1))

    gradients.stop(timeout=WAIT_S)

    assert gradients.queued == 1


def test_destroy_is_what_leaving_the_context_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with DistributedGradients(max_queue=1) as gradients:
        gradients.set_model_parameters(np.zeros(1))
        gate = hold(gradients, monkeypatch)
        handle = gradients.start()
        gradients.add_gradients(np.ones(1))
        gate.wait_for_arrival()
        gradients.add_gradients(np.ones(1))
        blocked = Running(lambda: gradients.add_gradients(np.ones(1)))
        flushing = Running(gradients.flush)
        gate.open()
    for call in (blocked, flushing):
        try:
            call.result()
        except Destroyed:
            continue

    assert not handle.is_alive()
    assert gradients.queued == 0


def test_flush_while_stopped_raises_instead_of_waiting_for_ever(gradients: DistributedGradients) -> None:
    gradients.set_model_parameters(np.zeros(1))
    gradients.flush()
    gradients.add_gradients(np.ones(1))

    with pytest.raises(StateError, match="does not run"):
        gradients.flush()
