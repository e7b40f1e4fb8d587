"""The end of the in-process class: interrupted and repeated, and beside a start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distgrad import Adam, DistributedGradients
from distgrad.durable.disk_writer import DiskWriter
from distgrad.errors import Destroyed, GradientRefused
from support.gates import Gate, Running, interrupt


def opened(folder: Path) -> DistributedGradients:
    return DistributedGradients(optimizer=Adam(lr=0.5), data=folder)


def begun(folder: Path) -> DistributedGradients:
    shared = opened(folder)
    shared.set_model_parameters(np.zeros(3))
    shared.start()
    shared.add_gradients(np.ones(3))
    shared.flush()
    return shared


def test_a_destroy_that_was_interrupted_during_an_update_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = begun(tmp_path)
    gate = Gate(shared._holder.apply)
    monkeypatch.setattr(shared._holder, "apply", gate)
    shared.add_gradients(np.ones(3))
    gate.wait_for_arrival()

    for _ in range(2):
        interrupt(shared.destroy, lambda: shared._guard.is_destroyed)
        with pytest.raises(Destroyed):
            shared.flush()
    gate.open()
    shared.destroy()

    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    with opened(tmp_path) as again:
        assert (again.version, again.get_model_parameters().tolist()) == (2, pytest.approx([-1.0] * 3))


def test_a_destroy_that_was_interrupted_during_the_last_checkpoint_keeps_what_it_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = begun(tmp_path)
    shared.stop()
    shared.add_gradients(np.ones(3))
    shared._keeper.wait(None, lambda: None)  # type: ignore[union-attr]
    gate = Gate(shared._keeper._journal._snapshot)  # type: ignore[union-attr]
    monkeypatch.setattr(shared._keeper._journal, "_snapshot", gate)  # type: ignore[union-attr]

    interrupt(shared.destroy, lambda: shared._keeper._journal._is_closing)  # type: ignore[union-attr]
    gate.open()
    shared.destroy()
    shared.destroy()

    with opened(tmp_path) as again:
        assert (again.version, again.queued) == (1, 1)
        assert again.get_model_parameters().tolist() == pytest.approx([-0.5] * 3)


def test_an_updater_that_somebody_joined_in_vain_is_still_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = begun(tmp_path)
    shared.stop()
    gate = Gate(shared._holder.apply)
    monkeypatch.setattr(shared._holder, "apply", gate)
    handle = shared.start()
    shared.add_gradients(np.ones(3))
    gate.wait_for_arrival()

    interrupt(handle.join)

    assert handle.is_alive()
    ending = Running(shared.destroy)
    gate.open()
    ending.result()
    assert handle.join(0)
    with opened(tmp_path) as again:
        assert again.version == 2


def test_a_slow_disk_is_waited_for_by_the_next_destroy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = begun(tmp_path)
    gate = Gate(DiskWriter.step)
    monkeypatch.setattr(DiskWriter, "step", lambda *args: gate(*args))
    shared.add_gradients(np.ones(3))
    shared._queue.join(None)  # as flush, but without the disk

    interrupt(shared.destroy, lambda: shared._keeper._journal._is_closing)  # type: ignore[union-attr]
    gate.open()
    shared.destroy()

    with opened(tmp_path) as again:
        assert (again.version, again.settled) == (2, 2)


def test_a_start_that_comes_too_late_is_refused() -> None:
    shared = DistributedGradients()
    shared.set_model_parameters(np.zeros(3))
    gate = Gate(shared._updater.start)
    shared._updater.start = gate  # type: ignore[method-assign]
    starting = Running(shared.start)
    gate.wait_for_arrival()

    shared.destroy()
    gate.open()

    with pytest.raises(Destroyed):
        starting.result()
    assert not shared.running


@pytest.mark.parametrize("end", ["destroy", "stop"])
def test_an_updater_that_is_just_being_started_is_ended(end: str) -> None:
    shared = DistributedGradients()
    shared.set_model_parameters(np.zeros(3))
    entered, gate = Gate(shared._updater.end), Gate(shared._queue.open)
    entered.open()
    shared._updater.end, shared._queue.open = entered, gate  # type: ignore[method-assign]
    starting = Running(shared.start)
    gate.wait_for_arrival()
    ending = Running(getattr(shared, end))
    entered.wait_for_arrival()

    gate.open()

    ending.result()
    assert starting.result().join(0)
    shared.destroy()


def test_the_end_of_a_block_applies_what_was_added_in_it() -> None:
    with DistributedGradients() as made:
        made.set_model_parameters({"w": np.zeros(50_000)})
        made.start()
        for _ in range(40):
            made.add_gradients({"w": np.ones(50_000)})

    assert made.version == 40


def test_the_end_of_a_block_raises_what_was_refused_in_it() -> None:
    def add_what_is_refused() -> None:
        with DistributedGradients() as made:
            made.set_model_parameters({"w": np.zeros(2)})
            made.start()
            made.add_gradients({"w": np.array([np.nan, 1.0])})

    with pytest.raises(GradientRefused):
        add_what_is_refused()


def test_a_block_that_fails_does_not_wait_for_what_was_added() -> None:
    def fail() -> None:
        with DistributedGradients() as made:
            made.set_model_parameters({"w": np.zeros(2)})
            made.add_gradients({"w": np.ones(2)})
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
