"""The in-process class with a data folder: what one object did, the next one goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from distgrad import SGD, Adam, DistributedGradients
from distgrad.errors import (
    ConfigError,
    Destroyed,
    Forked,
    GradientRefused,
    LayoutError,
    QueueFull,
    UpdaterFailed,
)
from distgrad.policies import Buffered
from support.gates import WAIT_S, Gate, Running
from support.random_nests import same


class Pair(NamedTuple):
    """A namedtuple of parameters."""

    w: Any
    b: Any


def test_everything_comes_back(tmp_path: Path) -> None:
    nest = {"layers": [Pair(np.ones((2, 3), np.float32), np.ones(2, np.float16)), (np.ones(1),)], "steps": np.arange(3)}
    gradient = {"layers": [{"w": np.ones((2, 3)), "b": np.ones(2)}, (np.ones(1),)]}
    with DistributedGradients("ascent", optimizer=SGD(lr=0.5, momentum=0.9), data=tmp_path) as first:
        first.set_model_parameters(nest)
        first.start()
        for number in range(1, 4):
            assert first.add_gradients(gradient, cursor=f"batch {number}") == number
        first.flush(WAIT_S)
        assert (first.settled, first.cursor, first.disk_trouble) == (3, "batch 3", None)
        expected = first.get_model_parameters()

    with DistributedGradients("ascent", optimizer=SGD(lr=0.5, momentum=0.9), data=tmp_path) as second:
        found = second.get_model_parameters()
        assert same(found["layers"][0]["w"], expected["layers"][0].w)
        assert same(found["layers"][0]["b"], expected["layers"][0].b)
        assert isinstance(found["layers"][1], tuple)
        assert same(found["layers"][1][0], expected["layers"][1][0])
        assert same(found["steps"], nest["steps"])
        assert (second.version, second.settled, second.cursor, second.queued) == (3, 3, "batch 3", 0)
        second.start()
        assert second.add_gradients(gradient) == 4


@pytest.mark.parametrize("rule", [None, SGD(lr=0.1, momentum=0.9, nesterov=True), Adam(lr=0.01)])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path: Path, rule: Any) -> None:
    random = np.random.default_rng(1)
    steps = [{"w": random.normal(size=50), "b": random.normal(size=7)} for _ in range(20)]
    start = {"w": random.normal(size=50).astype(np.float32), "b": random.normal(size=7)}

    def train(count: int, *, data: Path | None) -> Any:
        with DistributedGradients(optimizer=rule, data=data) as shared:
            if shared.get_model_parameters() is None:
                shared.set_model_parameters(start)
            shared.start()
            for step in steps[shared.version : count]:
                shared.add_gradients(step)
            shared.flush(WAIT_S)
            return shared.get_model_parameters()

    uninterrupted = train(20, data=None)
    for count in (1, 2, 9, 9, 15, 20):
        interrupted = train(count, data=tmp_path)

    assert interrupted["w"].tobytes() == uninterrupted["w"].tobytes()
    assert interrupted["b"].tobytes() == uninterrupted["b"].tobytes()


def test_what_waits_is_still_there_and_is_applied_once(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as first:
        first.set_model_parameters({"w": np.zeros(3), "h": np.zeros(2, np.float16)})
        for factor in (1, 2, 4):
            first.add_gradients({"w": factor * np.ones(3), "h": factor * np.ones(2)}, cursor=bytes([factor]))
        assert (first.settled, first.queued) == (0, 3)

    with DistributedGradients(data=tmp_path) as second:
        assert (second.queued, second.settled, second.cursor) == (3, 0, b"\x04")
        second.start()
        second.flush(WAIT_S)
        assert second.add_gradients({"w": 8 * np.ones(3), "h": 8 * np.ones(2)}) == 4
        second.flush(WAIT_S)

    with DistributedGradients(data=tmp_path) as third:
        assert third.get_model_parameters()["w"].tolist() == [-15] * 3
        assert third.get_model_parameters()["h"].tolist() == [-15] * 2
        assert (third.version, third.settled, third.queued, third.cursor) == (4, 4, 0, b"\x04")


def test_gradients_from_before_the_parameters_come_back_too(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as first:
        first.add_gradients({"w": np.ones(3), "inner": {"b": np.array([1, 2])}, "n": None})
        first.add_gradients({"w": np.ones(4), "inner": {"b": np.array([1, 2])}})
        first.add_gradients({})
    with DistributedGradients(data=tmp_path) as second:
        assert second.get_model_parameters() is None
        second.set_model_parameters({"w": np.zeros(3, np.float32), "inner": {"b": np.zeros(2)}, "n": np.arange(2)})
        assert second.queued == 3
    with DistributedGradients(data=tmp_path) as third:
        third.start()
        with pytest.raises(GradientRefused, match=r"gradient 2 was refused: .*1 more") as refused:
            third.flush(WAIT_S)

        assert refused.value.leaf == "w"
        assert third.refused == {"layout": 2}
        assert third.get_model_parameters()["w"].tolist() == [-1] * 3
        assert third.get_model_parameters()["inner"]["b"].tolist() == [-1, -2]
    with DistributedGradients(data=tmp_path) as fourth:
        assert fourth.refused == {"layout": 2}
        assert (fourth.version, fourth.settled, fourth.queued) == (1, 3, 0)


def test_a_bare_array_and_its_early_gradient_come_back(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as first:
        first.add_gradients(np.float32(3))
    with DistributedGradients(data=tmp_path) as second:
        second.set_model_parameters(np.array(10.0))
        second.start()
        second.flush(WAIT_S)
    with DistributedGradients(data=tmp_path) as third:
        assert third.get_model_parameters() == 7


def test_queued_gradients_of_another_layout_are_refused_after_a_restart_as_before_it(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as first:
        first.set_model_parameters({"w": np.zeros(3)})
        first.add_gradients({"w": np.ones(3)})
        first.set_model_parameters({"v": np.zeros(3)})
    with DistributedGradients(data=tmp_path) as second:
        second.add_gradients({"v": np.ones(3)})
        second.start()
        with pytest.raises(GradientRefused, match="another layout"):
            second.flush(WAIT_S)
        assert second.get_model_parameters()["v"].tolist() == [-1] * 3
    with DistributedGradients(data=tmp_path) as third:
        assert (third.version, third.settled, third.refused) == (1, 2, {"layout": 1})


def test_what_was_cleared_or_taken_away_stays_so(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as first:
        first.set_model_parameters(np.zeros(3))
        first.add_gradients(np.ones(3), cursor="a")
        first.add_gradients(np.ones(3), cursor="b")
        assert first.clear_gradients() == 2
        first.flush(WAIT_S)
        assert (first.settled, first.cursor) == (2, "b")
        first.set_model_parameters(None)
        first.add_gradients(np.ones(3), cursor="c")
    with DistributedGradients(data=tmp_path) as second:
        assert second.get_model_parameters() is None
        assert (second.queued, second.settled, second.cursor) == (1, 2, "c")
        second.set_model_parameters(np.zeros(3))
        second.start()
        second.flush(WAIT_S)
    with DistributedGradients(data=tmp_path) as third:
        assert third.get_model_parameters().tolist() == [-1] * 3


def test_clearing_while_one_is_applied_settles_in_the_right_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DistributedGradients(data=tmp_path) as first:
        first.set_model_parameters(np.zeros(1))
        gate = Gate(first._holder.apply)
        monkeypatch.setattr(first._holder, "apply", gate)
        first.start()
        for cursor in "abc":
            first.add_gradients(np.ones(1), cursor=cursor)
        gate.wait_for_arrival()
        assert first.clear_gradients() == 2
        assert first.settled == 0
        gate.open()
        first.flush(WAIT_S)
        assert first.settled == 3
    with DistributedGradients(data=tmp_path) as second:
        assert (second.version, second.settled, second.get_model_parameters()[0]) == (1, 3, -1)


def test_a_buffer_goes_on_being_filled(tmp_path: Path) -> None:
    def opened() -> DistributedGradients:
        return DistributedGradients(policy=Buffered(3), reduction="sum", data=tmp_path)

    with opened() as first:
        first.set_model_parameters(np.zeros(2))
        first.start()
        first.add_gradients(np.ones(2))
        first.add_gradients(4 * np.ones(2))
        first.stop(drain=False)
    with opened() as second:
        second.start()
        assert (second.version, second.queued) == (0, 2)
        second.add_gradients(7 * np.ones(2))
        second.flush(WAIT_S)
        assert (second.version, second.get_model_parameters()[0]) == (1, -12)
    with opened() as third:
        assert (third.version, third.settled, third.get_model_parameters()[0]) == (1, 3, -12)


# Arguments and ends


def test_a_cursor_is_bytes_or_text_and_short(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as shared:
        for wrong in (5, "x" * 5000, ["a"]):
            with pytest.raises(ConfigError, match="cursor must be bytes or str"):
                shared.add_gradients(np.ones(1), cursor=wrong)  # type: ignore[arg-type]
        assert shared.cursor is None
        shared.add_gradients(np.ones(1))
        shared.add_gradients(np.ones(1), cursor="kept")
        shared.add_gradients(np.ones(1))
        shared._keeper.wait(WAIT_S, lambda: None)  # type: ignore[union-attr]
        assert shared.cursor == "kept"


def test_without_a_folder_settled_counts_what_is_decided() -> None:
    with DistributedGradients() as shared:
        shared.set_model_parameters(np.zeros(1))
        for _ in range(3):
            shared.add_gradients(np.ones(1), cursor="not kept")
        assert (shared.settled, shared.cursor, shared.disk_trouble) == (0, None, None)
        shared.start()
        shared.flush(WAIT_S)
        assert shared.settled == 3


def test_parameters_that_the_journal_cannot_describe_are_refused_before_they_are_set(tmp_path: Path) -> None:
    huge = {f"{number:0200d}": np.zeros(0) for number in range(25_000)}
    with DistributedGradients(data=tmp_path) as shared:
        shared.set_model_parameters(np.ones(1))
        with pytest.raises(LayoutError, match="on the wire"):
            shared.set_model_parameters(huge)
        with pytest.raises(LayoutError, match=r"must have|must be one array"):
            shared.add_gradients(huge)
        assert shared.get_model_parameters().tolist() == [1]
    with DistributedGradients(data=tmp_path) as again:
        assert again.get_model_parameters().tolist() == [1]


def test_destroy_ends_the_object_and_not_what_is_kept(tmp_path: Path) -> None:
    shared = DistributedGradients(data=tmp_path)
    shared.set_model_parameters(np.zeros(1))
    shared.add_gradients(np.ones(1))
    shared.destroy()
    shared.destroy()
    for call in (shared.start, shared.flush, lambda: shared.add_gradients(np.ones(1))):
        with pytest.raises(Destroyed):
            call()
    with DistributedGradients(data=tmp_path) as again:
        assert (again.queued, again.get_model_parameters()[0]) == (1, 0)


def test_an_updater_that_fails_leaves_the_folder_as_it_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        shared._holder.storage.arenas[0][0] = 99  # type: ignore[union-attr]  # half written
        raise ZeroDivisionError("a bug")

    shared = DistributedGradients(data=tmp_path)
    shared.set_model_parameters(np.zeros(2))
    monkeypatch.setattr(shared._holder, "apply", broken)
    handle = shared.start()
    shared.add_gradients(np.ones(2))
    assert handle.join(WAIT_S)
    with pytest.raises(UpdaterFailed):
        shared.destroy()

    with DistributedGradients(data=tmp_path) as again:
        assert again.get_model_parameters().tolist() == [0, 0]
        assert again.queued == 1
        again.start()
        again.flush(WAIT_S)
        assert again.get_model_parameters().tolist() == [-1, -1]


def test_after_an_updater_failed_new_parameters_go_on_without_its_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    with DistributedGradients(data=tmp_path) as shared:
        shared.set_model_parameters(np.zeros(2))
        with monkeypatch.context() as patched:
            patched.setattr(shared._holder, "apply", broken)
            handle = shared.start()
            shared.add_gradients(np.ones(2))
            assert handle.join(WAIT_S)
        with pytest.raises(UpdaterFailed):
            shared.set_model_parameters(np.ones(2))
        shared.set_model_parameters(np.ones(2))
        shared.start()
        shared.add_gradients(np.ones(2))
        shared.flush(WAIT_S)
        assert (shared.settled, shared.version) == (2, 1)
    with DistributedGradients(data=tmp_path) as again:
        assert (again.settled, again.queued, again.get_model_parameters()[0]) == (2, 0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_the_folder_alone(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as shared:
        shared.set_model_parameters(np.zeros(1))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                try:
                    shared.add_gradients(np.ones(1))
                except Forked:
                    shared.destroy()
                    status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        shared.add_gradients(np.ones(1))
        shared.start()
        shared.flush(WAIT_S)
        assert shared.settled == 1


def test_a_queue_that_came_back_may_be_longer_than_the_bound(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as first:
        first.set_model_parameters(np.zeros(1))
        for _ in range(5):
            first.add_gradients(np.ones(1))
    with DistributedGradients(data=tmp_path, max_queue=2) as second:
        with pytest.raises(QueueFull, match="2 gradients wait"):
            second.add_gradients(np.ones(1))
        second.start()
        added = Running(lambda: second.add_gradients(np.ones(1)))
        assert added.result() == 6
        second.flush(WAIT_S)
        assert second.get_model_parameters()[0] == -6
