"""The in-process class when something goes wrong: bad gradients, bugs, forks, impatient callers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distgrad.errors import Forked, GradientRefused, UpdaterFailed
from distgrad.in_process import DistributedGradients
from distgrad.rules import Adam
from support.gates import Gate, Running


@pytest.fixture
def gradients() -> Iterator[DistributedGradients]:
    with DistributedGradients() as made:
        made.set_model_parameters({"w": np.zeros(2), "b": [np.zeros(1)]})
        yield made


def gradient(value: float = 1.0) -> dict[str, Any]:
    return {"w": np.ones(2), "b": [np.array([value])]}


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not_finite"), (np.inf, "not_finite"), (1e300, "overflow")])
def test_a_bad_gradient_is_refused_whole_counted_reported_once_and_stops_nothing(value: float, reason: str) -> None:
    with DistributedGradients(optimizer=Adam()) as gradients:
        gradients.set_model_parameters({"w": np.zeros(2), "b": [np.zeros(1)]})
        handle = gradients.start()
        gradients.add_gradients(gradient())
        gradients.add_gradients(gradient(value))
        gradients.add_gradients(gradient())

        with pytest.raises(GradientRefused, match=r"gradient 2 was refused: gradient of 'b\.0' holds") as refused:
            gradients.flush()

        assert (refused.value.reason, refused.value.leaf, refused.value.number) == (reason, "b.0", 2)
        gradients.flush()
        assert gradients.refused == {reason: 1}
        assert gradients.version == 2
        assert handle.is_alive()


def test_the_next_call_reports_a_refusal_and_does_nothing_else(gradients: DistributedGradients) -> None:
    gradients.start()
    calls: list[Any] = [
        lambda: gradients.add_gradients(gradient()),
        lambda: gradients.set_parameters("ascent"),
        lambda: gradients.set_model_parameters(None),
        gradients.get_model_parameters,
        gradients.clear_gradients,
        gradients.start,
        gradients.stop,
    ]
    for number, call in enumerate(calls, 1):
        gradients.add_gradients(gradient(np.nan))
        gradients._queue.join(None)  # as flush, but it leaves the report to the next call

        with pytest.raises(GradientRefused):
            call()

        assert gradients.refused == {"not_finite": number}
    assert gradients.gradient_change_mode == "descent"
    assert gradients.get_model_parameters() is not None
    assert not gradients.running, "stop has done its work first"


def test_leaving_the_context_reports_a_refusal_that_nobody_was_told() -> None:
    def leave(error: Exception | None) -> None:
        with DistributedGradients() as gradients:
            gradients.set_model_parameters(np.zeros(1))
            gradients.start()
            gradients.add_gradients(np.array([np.nan]))
            gradients._queue.join(None)
            if error:
                raise error

    with pytest.raises(GradientRefused):
        leave(None)
    with pytest.raises(KeyError):
        leave(KeyError("the caller's own"))


def broken(*args: Any, **kwargs: Any) -> None:
    raise ZeroDivisionError("a bug")


def test_a_failure_in_the_updater_reaches_handle_and_next_calls_until_parameters_are_set_anew(
    gradients: DistributedGradients, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(gradients._holder, "apply", broken)
        handle = gradients.start()
        gradients.add_gradients(gradient())
        assert handle.join(20)

    assert isinstance(handle.exception(), ZeroDivisionError)
    assert "the updater failed" in caplog.text
    with pytest.raises(UpdaterFailed, match="a bug") as failed:
        gradients.set_model_parameters(np.zeros(3))  # heals, but not before somebody was told
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    for call in (gradients.start, gradients.flush, gradients.get_model_parameters):
        with pytest.raises(UpdaterFailed):
            call()
    gradients.set_model_parameters(np.zeros(3))
    gradients.start()
    gradients.add_gradients(np.ones(3))
    gradients.flush()
    assert gradients.get_model_parameters().tolist() == [-1, -1, -1]


def test_who_waits_for_an_updater_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = DistributedGradients(max_queue=1)
    gradients.set_model_parameters(np.zeros(1))
    gate = Gate(broken)
    monkeypatch.setattr(gradients._holder, "apply", gate)
    gradients.start()
    gradients.add_gradients(np.ones(1))
    gate.wait_for_arrival()
    gradients.add_gradients(np.ones(1))

    waiting = [Running(gradients.flush), Running(lambda: gradients.add_gradients(np.ones(1)))]
    gate.open()

    for call in waiting:
        with pytest.raises(UpdaterFailed):
            call.result()
    with pytest.raises(UpdaterFailed):
        gradients.destroy()
    gradients.destroy()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_while_the_updater_runs_and_has_a_copy_otherwise(
    gradients: DistributedGradients,
) -> None:
    def in_child(running: bool) -> int:
        calls: list[Any] = [
            lambda: gradients.add_gradients(gradient()),
            gradients.flush,
            gradients.get_model_parameters,
            gradients.stop,
            gradients.start,
        ]
        for call in calls if running else []:
            try:
                call()
            except Forked:
                continue
            return 1
        if not running:
            gradients.add_gradients(gradient())
            gradients.start()
            gradients.flush()
            if gradients.version != 1:
                return 2
        gradients.destroy()
        return 0

    for running in (False, True):
        if running:
            gradients.start()
        child = os.fork()
        if child == 0:
            status = 3
            try:
                status = in_child(running)
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    gradients.add_gradients(gradient())
    gradients.flush()
    assert gradients.version == 1


def test_readers_get_their_turn_while_gradients_are_applied_without_a_pause() -> None:
    """An unfair lock would let the updater take it again at once, and a reader wait for the queue's end."""
    gradients = DistributedGradients(max_queue=8)
    with gradients:
        gradients.set_model_parameters(np.zeros(200_000))
        gradients.start()
        done = False

        def add() -> None:
            while not done:
                gradients.add_gradients(np.ones(200_000))

        adding = Running(add)
        try:
            for _ in range(50):
                snapshot = gradients.get_model_parameters()
                assert (snapshot == snapshot[0]).all()
        finally:
            done = True
            adding.result()
        gradients.stop()


def test_many_threads_add_and_every_gradient_counts_once() -> None:
    with DistributedGradients(max_queue=3) as gradients:
        gradients.set_model_parameters(np.zeros(10))
        gradients.start()

        def add(value: float) -> None:
            for _ in range(100):
                gradients.add_gradients(np.full(10, value))

        for thread in [Running(lambda value=value: add(value)) for value in (1.0, 2.0, 4.0, 8.0)]:  # type: ignore[misc]
            thread.result()
        gradients.flush()

        assert gradients.version == 400
        assert gradients.get_model_parameters().tolist() == [-1500.0] * 10


def test_ten_thousand_leaves_work() -> None:
    nest = {f"layer{number}": np.zeros(3, np.float32) for number in range(10_000)}
    for adopt in (False, True):
        with DistributedGradients() as gradients:
            gradients.set_model_parameters(nest, adopt)
            gradients.start()
            gradients.add_gradients({name: np.ones(3) for name in nest})
            gradients.flush()

            assert all((array == -1).all() for array in gradients.get_model_parameters().values())
