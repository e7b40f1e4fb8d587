"""The class's verbs through `Admin`, against a real broker process: one test or more for each row of the table.

The table is that of the in-process class in ``docs/architecture.md``; each test names its row by the original's verb.
The last row, ``destroy``, is with the life of brokers in ``test_admin_and_broker.py``.
"""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Iterator

import numpy as np
import pytest

from distgrad.admin import Admin
from distgrad.errors import (
    ConfigError,
    GradientRefused,
    InvalidMode,
    LayoutError,
)
from distgrad_worker import Worker
from support import processes
from support.broker_process import broker_process, cleared, queue_up, wait_until

Point = namedtuple("Point", ["x", "y"])


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    with broker_process() as (address, _):
        yield address


@pytest.fixture(scope="module")
def heavy_ball() -> Iterator[str]:
    with broker_process("--optimizer", "sgd", "--lr", "1", "--momentum", "0.5") as (address, _):
        yield address


@pytest.fixture
def admin(plain: str) -> Iterator[Admin]:
    with cleared(plain) as admin:
        yield admin


@pytest.fixture
def momentum(heavy_ball: str) -> Iterator[Admin]:
    with cleared(heavy_ball) as admin:
        admin.set_parameters(lr=1.0)
        yield admin


# new(gradientChangeMode)


def test_new_descent_is_the_default_and_a_gradient_is_the_step(admin: Admin) -> None:
    admin.set_model_parameters(np.array([1.0, 2.0]))

    with Worker(admin.address) as worker:
        worker.push(np.array([0.25, 1.0]))
        worker.flush()

    assert admin.status()["mode"] == "descent"
    np.testing.assert_array_equal(admin.get_model_parameters(), [0.75, 1.0])


def test_new_ascent_in_any_case_adds() -> None:
    with broker_process("--mode", "Ascent") as (address, _), Admin(address, timeout=20) as admin:
        admin.set_model_parameters(np.zeros(2))

        with Worker(admin.address) as worker:
            worker.push(np.ones(2))

        np.testing.assert_array_equal(admin.get_model_parameters(), [1, 1])


def test_new_refuses_any_other_mode_at_once() -> None:
    ended = processes.run("broker", "--mode", "sideways")

    assert ended.returncode == 2
    assert "descent" in ended.stderr
    assert "ascent" in ended.stderr


# setParameters(gradientChangeMode)


def test_set_parameters_turns_the_mode_while_running_from_the_next_gradient_on(admin: Admin) -> None:
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        worker.push(np.ones(1))
        worker.flush()
        assert admin.set_parameters("ASCENT")["mode"] == "ascent"
        worker.push(np.full(1, 10.0))
        worker.flush()
        assert admin.set_parameters()["mode"] == "ascent", "None keeps the former one"
        worker.push(np.full(1, 100.0))

    np.testing.assert_array_equal(admin.get_model_parameters(), [109])


def test_set_parameters_counts_for_gradients_that_were_queued_before(admin: Admin) -> None:
    admin.stop(drain=False)
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1))
        admin.set_parameters("ascent")
        admin.start()
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [1])


def test_set_parameters_refuses_any_other_mode_at_once() -> None:
    with Admin("127.0.0.1:1") as admin, pytest.raises(InvalidMode, match="sideways") as caught:
        admin.set_parameters("sideways")

    assert isinstance(caught.value, ValueError)


def test_set_parameters_changes_the_rules_numbers(momentum: Admin) -> None:
    momentum.set_model_parameters(np.zeros(1))

    with Worker(momentum.address) as worker:
        worker.push(np.ones(1))
        worker.flush()
        assert momentum.set_parameters(lr=0.5)["lr"] == 0.5
        worker.push(np.ones(1))

    np.testing.assert_array_equal(momentum.get_model_parameters(), [-(1 + 0.5 * 1.5)])


@pytest.mark.parametrize("numbers", [{"lr": -1.0}, {"beta1": 0.5}, {"nonsense": 1.0}])
def test_set_parameters_refuses_numbers_that_the_rule_has_not_and_keeps_the_others(
    momentum: Admin, numbers: dict[str, float]
) -> None:

    with pytest.raises(ConfigError):
        momentum.set_parameters("ascent", **numbers)

    in_force = momentum.set_parameters()
    assert in_force["mode"] == "descent"
    assert in_force["lr"] == 1.0


# addGradients(Gradients)


def test_add_gradients_applies_each_once_and_in_order(momentum: Admin) -> None:
    """With momentum the order shows in the result."""
    momentum.set_model_parameters(np.zeros(1))
    version = momentum.status()["version"]

    with Worker(momentum.address) as worker:
        for gradient in (1.0, 2.0, 4.0):
            worker.push(np.array([gradient]))

    np.testing.assert_array_equal(momentum.get_model_parameters(), [-(1 + 2.5 + 5.25)])
    assert momentum.status()["version"] == version + 3


def test_add_gradients_is_allowed_while_stopped_and_applied_after_start(admin: Admin) -> None:
    admin.stop(drain=False)
    admin.set_model_parameters(np.zeros(2))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(2), np.ones(2))
        np.testing.assert_array_equal(admin.get_model_parameters(), [0, 0])
        admin.start()
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [-2, -2])


def test_add_gradients_casts_to_the_parameters_dtype(admin: Admin) -> None:
    admin.set_model_parameters(np.zeros(2, np.float32))

    with Worker(admin.address) as worker:
        worker.push(np.ones(2))

    assert admin.get_model_parameters().dtype == np.float32


def test_add_gradients_refuses_a_bad_one_whole_and_goes_on(admin: Admin) -> None:
    admin.set_model_parameters({"a": np.zeros(2), "b": np.zeros(2)})
    refused = admin.status()["refused"].get("not_finite", 0)

    with Worker(admin.address) as worker:
        worker.push({"a": np.ones(2), "b": np.array([1.0, np.nan])})
        with pytest.raises(GradientRefused) as caught:
            worker.flush()
        worker.push({"a": np.ones(2), "b": np.ones(2)})

    assert (caught.value.reason, caught.value.leaf) == ("not_finite", "b")
    assert admin.status()["refused"]["not_finite"] == refused + 1
    np.testing.assert_array_equal(admin.get_model_parameters()["a"], [-1, -1])


# setModelParameters(p, doNotDeepCopy)


def test_set_model_parameters_copies(admin: Admin) -> None:
    mine = np.zeros(3)

    admin.set_model_parameters(mine)
    mine[:] = 7

    np.testing.assert_array_equal(admin.get_model_parameters(), [0, 0, 0])


def test_set_model_parameters_while_running_resets_the_rules_state_and_keeps_the_version(momentum: Admin) -> None:
    momentum.set_model_parameters(np.zeros(1))

    with Worker(momentum.address) as worker:
        worker.push(np.ones(1))
        worker.flush()
        version = momentum.status()["version"]
        momentum.set_model_parameters(np.zeros(1))
        assert momentum.status()["version"] == version
        worker.push(np.ones(1))
        worker.flush()

    # With momentum left it would be -1.5.
    np.testing.assert_array_equal(momentum.get_model_parameters(), [-1])


def test_set_model_parameters_to_none_takes_them_away_and_gradients_wait(admin: Admin) -> None:
    admin.stop(drain=False)
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1))
        admin.set_model_parameters(None)
        admin.start()
        assert admin.get_model_parameters() is None
        assert admin.status()["queued"] == 1
        admin.set_model_parameters(np.zeros(1))
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [-1])


def test_set_model_parameters_of_another_layout_refuses_what_is_queued(admin: Admin) -> None:
    admin.stop(drain=False)
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1))
        admin.set_model_parameters(np.zeros(2))
        version = admin.status()["version"]
        admin.start()
        with pytest.raises(GradientRefused) as caught:
            worker.flush()

    assert caught.value.reason == "layout"
    np.testing.assert_array_equal(admin.get_model_parameters(), [0, 0])
    assert admin.status()["version"] == version


def test_set_model_parameters_that_cannot_be_laid_out_asks_the_broker_nothing() -> None:
    with Admin("127.0.0.1:1") as admin, pytest.raises(LayoutError):
        admin.set_model_parameters({"a": np.array(["text"])})


# getModelParameters(doNotDeepCopy)


def test_get_model_parameters_is_none_while_there_are_none(admin: Admin) -> None:
    assert admin.get_model_parameters() is None


def test_get_model_parameters_gives_the_nest_that_was_set(admin: Admin) -> None:
    nest = {
        "list": [np.zeros((2, 3), np.float16), np.arange(4, dtype=np.int32)],
        "tuple": (np.ones(()), np.array([True, False])),
        3: {"deep": np.full((1, 1, 1), 2.5, np.float32)},
        "empty": np.zeros((0, 2)),
    }
    admin.set_model_parameters(nest)

    found = admin.get_model_parameters()

    assert list(found) == list(nest)
    assert isinstance(found["list"], list)
    assert isinstance(found["tuple"], tuple)
    assert found["list"][0].dtype == np.float16
    np.testing.assert_array_equal(found["list"][1], [0, 1, 2, 3])
    np.testing.assert_array_equal(found["tuple"][1], [True, False])
    np.testing.assert_array_equal(found[3]["deep"], [[[2.5]]])
    assert found["empty"].shape == (0, 2)


def test_get_model_parameters_gives_a_namedtuple_as_a_dict_unless_it_is_told_the_class(admin: Admin) -> None:
    nest = {"p": Point(np.zeros(1), np.ones(1))}
    admin.set_model_parameters(nest)

    assert list(admin.get_model_parameters()["p"]) == ["x", "y"]
    assert isinstance(admin.get_model_parameters(like=nest)["p"], Point)


def test_get_model_parameters_is_a_copy(admin: Admin) -> None:
    admin.set_model_parameters(np.zeros(2))

    admin.get_model_parameters()[:] = 5

    np.testing.assert_array_equal(admin.get_model_parameters(), [0, 0])


def test_get_model_parameters_is_one_version_of_many_parts_while_updates_go_on(admin: Admin) -> None:
    """20 MB need a second range, and so a version that is held while newer ones are made."""
    admin.set_model_parameters({"a": np.zeros(2_500_000, np.float32), "b": np.zeros(1_250_000)})
    first = admin.status()["version"]
    is_over = threading.Event()

    def push() -> None:
        with Worker(admin.address) as worker:
            while not is_over.is_set():
                worker.push({"a": np.ones(2_500_000, np.float32), "b": np.ones(1_250_000)})

    pusher = threading.Thread(target=push)
    pusher.start()
    try:
        wait_until(lambda: bool(admin.status()["version"] >= first + 2))
        for _ in range(3):
            fetched = admin.fetch()
            assert fetched is not None
            assert [set(np.unique(arena)) for arena in fetched.arenas] == [{first - fetched.state.version}] * 2
    finally:
        is_over.set()
        pusher.join()


# start(), stop()


def test_start_and_stop_say_whether_they_changed_anything(admin: Admin) -> None:
    admin.set_model_parameters(np.zeros(1))

    assert [admin.start(), admin.stop(), admin.stop(), admin.start()] == [False, True, False, True]


def test_stop_drains_and_start_works_again(admin: Admin) -> None:
    admin.stop(drain=False)
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, *[np.ones(1)] * 20)
        admin.start()
        admin.stop()
        assert admin.status()["queued"] == 0
        assert admin.status()["running"] is False
        queue_up(admin, worker, np.ones(1))
        np.testing.assert_array_equal(admin.get_model_parameters(), [-20])
        admin.start()
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [-21])


def test_stop_without_draining_leaves_the_queue(admin: Admin) -> None:
    admin.stop(drain=False)
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1))
        assert admin.stop(drain=False) is False
        assert admin.status()["queued"] == 1
        admin.start()


# clearGradients()


def test_clear_gradients_empties_the_queue_and_counts(admin: Admin) -> None:
    admin.stop(drain=False)
    admin.set_model_parameters(np.zeros(1))

    with Worker(admin.address) as worker:
        queue_up(admin, worker, np.ones(1), np.ones(1), np.ones(1))
        assert admin.clear_gradients() == 3
        assert admin.clear_gradients() == 0
        admin.start()
        worker.flush()

    np.testing.assert_array_equal(admin.get_model_parameters(), [0])
