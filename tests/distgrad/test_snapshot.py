"""Tests of `distgrad.snapshot`."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from distgrad.layout import Layout
from distgrad.snapshot import Snapshot
from distgrad.wire import State

Pair = namedtuple("Pair", ["first", "second"])
NEST = {"layers": [np.ones(3, np.float32), np.arange(4).reshape(2, 2)], "pair": Pair(np.zeros(1), np.ones(2))}


def snapshot_of(nest: object) -> Snapshot:
    layout = Layout.from_frame(Layout.of(nest).to_frame())
    return Snapshot(layout, layout.pack(nest), State("incarnation", 2, 7))


def test_parameters_come_in_the_nest_that_was_set_with_a_dict_for_a_namedtuple() -> None:
    parameters = snapshot_of(NEST).parameters

    assert list(parameters) == ["layers", "pair"]
    assert parameters["layers"][1].tolist() == [[0, 1], [2, 3]]
    assert {name: array.tolist() for name, array in parameters["pair"].items()} == {"first": [0], "second": [1, 1]}


def test_shaped_like_brings_the_namedtuples_back_and_shares_the_memory() -> None:
    snapshot = snapshot_of(NEST)

    shaped = snapshot.shaped_like(NEST)

    assert isinstance(shaped.parameters["pair"], Pair)
    assert np.shares_memory(shaped.parameters["pair"].second, snapshot.parameters["pair"]["second"])
    assert shaped.state == snapshot.state


def test_parameters_are_views_of_the_arenas_and_writable() -> None:
    snapshot = snapshot_of({"w": np.zeros(3)})

    snapshot.parameters["w"][1] = 5

    assert snapshot.arenas[0].tolist() == [0, 5, 0]
    assert snapshot.parameters is snapshot.parameters


def test_version_and_repr_name_the_state() -> None:
    snapshot = snapshot_of(NEST)

    assert snapshot.version == 7
    assert repr(snapshot) == "Snapshot(version=7, generation=2, leaves=4)"
