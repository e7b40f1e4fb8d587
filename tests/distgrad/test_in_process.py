"""The in-process class: every row of the table in the architecture, by the original's name."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from distgrad.errors import (
    AlreadyRunning,
    ConfigError,
    Destroyed,
    GradientRefused,
    InvalidMode,
    LayoutError,
    NoParameters,
    QueueFull,
)
from distgrad.in_process import DistributedGradients
from distgrad.rules import SGD, Adam
from support.gates import WAIT_S, Gate, Running
from support.random_nests import same


class Layer(NamedTuple):
    """A namedtuple of parameters."""

    w: Any
    b: Any


@pytest.fixture
def gradients() -> Iterator[DistributedGradients]:
    with DistributedGradients() as made:
        yield made


def hold(gradients: DistributedGradients, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Stop the updater in front of every gradient."""
    gate = Gate(gradients._holder.apply)
    monkeypatch.setattr(gradients._holder, "apply", gate)
    return gate


def test_row_new_knows_two_modes_in_any_case_and_refuses_others_at_once() -> None:
    for mode in ("descent", "Ascent", "DESCENT"):
        assert DistributedGradients(mode).gradient_change_mode == mode.lower()
    assert DistributedGradients().gradient_change_mode == "descent"
    for wrong in ("down", "", None, 1):
        with pytest.raises(InvalidMode, match="'descent' or 'ascent'"):
            DistributedGradients(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'descent' or 'ascent'"):
            DistributedGradients(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_queue"):
        DistributedGradients(max_queue=0)
    with pytest.raises(ConfigError, match="optimizer must be a rule"):
        DistributedGradients(optimizer="sgd")  # type: ignore[arg-type]


def test_row_new_takes_an_optimizer_as_a_value() -> None:
    with DistributedGradients("ascent", optimizer=SGD(lr=0.5)) as gradients:
        gradients.set_model_parameters(np.zeros(2))
        gradients.start()
        gradients.add_gradients(np.ones(2))
        gradients.flush()

        assert gradients.get_model_parameters().tolist() == [0.5, 0.5]


def test_row_set_parameters_changes_the_mode_from_the_next_gradient_on_while_running(
    gradients: DistributedGradients,
) -> None:
    gradients.set_model_parameters(np.zeros(1))
    gradients.start()
    for mode, total in [("ascent", 1), (None, 2), ("Descent", 1), (None, 0)]:
        gradients.set_parameters(mode)
        gradients.add_gradients(np.ones(1))
        gradients.flush()

        assert gradients.get_model_parameters().tolist() == [total]
    with pytest.raises(InvalidMode):
        gradients.set_parameters("sideways")
    assert gradients.gradient_change_mode == "descent"


def test_row_set_parameters_changes_numbers_of_the_optimizer_or_nothing() -> None:
    with DistributedGradients(optimizer=SGD(lr=1.0)) as gradients:
        gradients.set_parameters(lr=0.25)
        with pytest.raises(ConfigError):
            gradients.set_parameters("ascent", lr=-1)
        with pytest.raises(InvalidMode):
            gradients.set_parameters("up", lr=9)

        assert gradients.optimizer == SGD(lr=0.25)
        assert gradients.gradient_change_mode == "descent"


def test_row_add_gradients_applies_each_once_in_order(gradients: DistributedGradients) -> None:
    with DistributedGradients(optimizer=Adam(lr=0.1)) as reference:
        reference.set_model_parameters(np.zeros(3))
        reference.start()
        for step in range(20):
            reference.add_gradients(np.arange(3.0) + step)
            reference.flush()
        expected = reference.get_model_parameters()
    with DistributedGradients(optimizer=Adam(lr=0.1)) as queued:
        queued.set_model_parameters(np.zeros(3))
        numbers = [queued.add_gradients(np.arange(3.0) + step) for step in range(20)]
        queued.start()
        queued.flush()

        assert queued.get_model_parameters().tobytes() == expected.tobytes()
        assert numbers == list(range(1, 21))
        assert (queued.version, queued.queued, queued.refused) == (20, 0, {})


def test_row_add_gradients_copies_and_casts_on_entry(gradients: DistributedGradients) -> None:
    gradients.set_model_parameters({"w": np.zeros(3, np.float32), "n": np.arange(2)})
    gradient = np.ones(3)

    gradients.add_gradients({"w": gradient})
    gradient[:] = 9
    gradients.start()
    gradients.flush()

    assert gradients.get_model_parameters()["w"].dtype == np.float32
    assert gradients.get_model_parameters()["w"].tolist() == [-1, -1, -1]
    assert gradients.get_model_parameters()["n"].tolist() == [0, 1]


def test_row_add_gradients_refuses_what_does_not_fit_at_the_call(gradients: DistributedGradients) -> None:
    gradients.set_model_parameters({"w": np.zeros(3, np.float32)})

    for wrong in ({"w": np.ones(4)}, {"v": np.ones(3)}, {"w": np.ones(3, complex)}, {"w": None}, {}):
        with pytest.raises(LayoutError):
            gradients.add_gradients(wrong)

    assert gradients.queued == 0
    assert gradients.refused == {}


def test_row_add_gradients_before_parameters_are_set_checks_them_then(gradients: DistributedGradients) -> None:
    gradient: dict[str, Any] = {"w": np.ones(3), "n": None}
    gradients.add_gradients(gradient)
    gradients.add_gradients({"w": np.ones(4)})
    gradients.add_gradients([np.ones(3)])
    gradients.add_gradients({"w": [1.0]})
    gradient["w"] += 9
    with pytest.raises(LayoutError, match="dtype object"):
        gradients.add_gradients({"w": np.array([object()])})

    gradients.set_model_parameters({"w": np.zeros(3), "n": np.arange(3)})
    gradients.start()
    with pytest.raises(
        GradientRefused, match=r"gradient 2 was refused: .*\(and 2 more were refused after it\)"
    ) as refused:
        gradients.flush()

    assert (refused.value.reason, refused.value.leaf, refused.value.number) == ("layout", "w", 2)
    assert gradients.refused == {"layout": 3}
    assert gradients.version == 1
    assert gradients.get_model_parameters()["w"].tolist() == [-1, -1, -1]


def test_row_add_gradients_raises_queue_full_at_once_while_stopped() -> None:
    with DistributedGradients(max_queue=2) as gradients:
        for _ in range(2):
            gradients.add_gradients(np.ones(1))
        for block in (True, False):
            with pytest.raises(QueueFull, match="2 gradients wait"):
                gradients.add_gradients(np.ones(1), block=block)
        assert gradients.queued == 2


def test_row_set_model_parameters_copies_by_default(gradients: DistributedGradients) -> None:
    mine = {"w": np.ones(3)}

    gradients.set_model_parameters(mine)
    mine["w"][:] = 9

    assert gradients.get_model_parameters()["w"].tolist() == [1, 1, 1]


def test_row_set_model_parameters_without_a_copy_changes_the_callers_arrays(gradients: DistributedGradients) -> None:
    mine: list[Any] = [Layer(np.zeros((2, 3), np.float32), np.zeros(2)), np.zeros((3, 2)).T, np.array(5)]
    gradients.set_model_parameters(mine, True)
    gradients.start()

    gradients.add_gradients([Layer(np.ones((2, 3)), np.ones(2)), np.ones((2, 3)), None])
    gradients.flush()

    assert (mine[0].w == -1).all()
    assert (mine[0].b == -1).all()
    assert (mine[1] == -1).all()
    shared = np.ones(3)
    for wrong in ([shared, shared], np.broadcast_to(1.0, 3)):
        with pytest.raises(LayoutError):
            gradients.set_model_parameters(wrong, do_not_deep_copy=True)
    assert same(gradients.get_model_parameters(), mine)


def test_row_set_model_parameters_none_clears_and_gradients_wait(gradients: DistributedGradients) -> None:
    gradients.set_model_parameters(np.zeros(2))
    gradients.start()
    gradients.set_model_parameters(None)

    gradients.add_gradients(np.ones(2))
    with pytest.raises(TimeoutError):
        gradients.flush(timeout=0.01)
    assert gradients.get_model_parameters() is None
    assert gradients.queued == 1

    gradients.set_model_parameters(np.zeros(2))
    gradients.flush()
    assert gradients.get_model_parameters().tolist() == [-1, -1]


def test_row_set_model_parameters_while_running_resets_the_state_and_keeps_the_version() -> None:
    with DistributedGradients(optimizer=SGD(lr=1.0, momentum=0.5)) as gradients:
        gradients.set_model_parameters(np.zeros(1))
        gradients.start()
        for _ in range(2):
            gradients.add_gradients(np.ones(1))
        gradients.flush()
        gradients.set_model_parameters(np.zeros(1))
        gradients.add_gradients(np.ones(1))
        gradients.flush()

        assert gradients.get_model_parameters().tolist() == [-1]
        assert gradients.version == 3


def test_row_set_model_parameters_refuses_queued_gradients_of_another_layout(gradients: DistributedGradients) -> None:
    gradients.set_model_parameters([np.zeros(2)])
    gradients.add_gradients([np.ones(2)])
    gradients.set_model_parameters([np.zeros(3)])
    gradients.start()
    with pytest.raises(GradientRefused, match="another layout"):
        gradients.flush()
    gradients.add_gradients([np.ones(3)])
    gradients.flush()

    assert gradients.refused == {"layout": 1}
    assert gradients.get_model_parameters()[0].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    "nest",
    [
        np.arange(3.0),
        np.float32(2),
        [np.ones((2, 2), np.float16), (np.ones(1), {"a": np.arange(3), 7: np.array([True])})],
        Layer(np.ones(3), [Layer(np.zeros(0), np.array(1.0))]),
    ],
)
def test_row_get_model_parameters_returns_the_nest_that_was_set(gradients: DistributedGradients, nest: Any) -> None:
    assert gradients.get_model_parameters() is None

    gradients.set_model_parameters(nest)

    assert same(gradients.get_model_parameters(), nest)
    assert same(gradients.get_model_parameters(True), nest)


def test_row_get_model_parameters_is_a_snapshot_of_one_version_or_a_live_read_only_view(
    gradients: DistributedGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients.set_model_parameters([np.zeros(1000), np.zeros(7, np.float32)])
    view = gradients.get_model_parameters(do_not_deep_copy=True)
    gate = hold(gradients, monkeypatch)
    gradients.start()
    gradients.add_gradients([np.ones(1000), np.ones(7)])
    gate.wait_for_arrival()

    asked_during_the_update = Running(gradients.get_model_parameters)
    gate.open()
    snapshot = asked_during_the_update.result()
    gradients.flush()

    assert len({float(value) for array in snapshot for value in array}) == 1
    assert (view[0] == -1).all()
    assert not view[0].flags.writeable
    snapshot[0][:] = 5
    assert (view[0] == -1).all()


def test_row_start_returns_a_handle_and_fails_in_this_order(gradients: DistributedGradients) -> None:
    with pytest.raises(NoParameters):
        gradients.start()
    gradients.set_model_parameters(np.zeros(1))
    handle = gradients.start()
    with pytest.raises(AlreadyRunning):
        gradients.start()
    gradients.set_model_parameters(None)
    with pytest.raises(NoParameters):
        gradients.start()

    assert handle.is_alive()
    assert handle.exception() is None
    assert not handle.join(timeout=0)
    gradients.stop()
    assert handle.join(WAIT_S)
    assert not handle.is_alive()
    assert handle.exception() is None


def test_row_stop_is_idempotent_drains_and_start_works_again(gradients: DistributedGradients) -> None:
    gradients.stop()
    gradients.set_model_parameters(np.zeros(1))
    for run in range(1, 4):
        gradients.start()
        for _ in range(10):
            gradients.add_gradients(np.ones(1))
        gradients.stop()
        gradients.stop()

        assert not gradients.running
        assert (gradients.version, gradients.queued) == (run * 10, 0)


def test_row_clear_gradients_empties_the_queue_and_tells_how_many(gradients: DistributedGradients) -> None:
    for _ in range(5):
        gradients.add_gradients(np.ones(1))

    assert gradients.clear_gradients() == 5
    assert gradients.clear_gradients() == 0
    gradients.flush()
    assert gradients.add_gradients(np.ones(1)) == 6


def test_row_destroy_ends_everything_and_every_later_call_raises() -> None:
    gradients = DistributedGradients()
    gradients.set_model_parameters(np.zeros(1))
    handle = gradients.start()
    gradients.destroy()
    gradients.destroy()

    assert not handle.is_alive()
    arguments: dict[str, tuple[Any, ...]] = {"add_gradients": (np.ones(1),), "set_model_parameters": (None,)}
    methods = [name for name, _ in inspect.getmembers(DistributedGradients, inspect.isfunction) if name[0] != "_"]
    assert len(methods) == 9
    for name in methods:
        if name != "destroy":
            with pytest.raises(Destroyed):
                getattr(gradients, name)(*arguments.get(name, ()))
    with pytest.raises(Destroyed), gradients:
        pass


def test_neither_sockets_nor_a_compiler_are_imported_with_the_class() -> None:
    names = ("zmq", "numba", "click", "rich")
    code = f"import sys, distgrad.in_process; print([name for name in {names} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
