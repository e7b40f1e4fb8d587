"""Policies combined, weighed and made by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from distgrad.errors import ConfigError
from distgrad.policies import (
    APPLY,
    HOLD,
    SUPERSEDE,
    Bounded,
    Buffered,
    Chain,
    Held,
    Policy,
    Situation,
    Staleness,
    Weighing,
    build,
    names,
)
from support.policy_world import Gradient, World


def test_a_chain_multiplies_factors_and_stops_at_the_first_no() -> None:
    bounded = Bounded(1)
    chain = Chain([bounded, Staleness(3, "inverse"), Staleness(staleness_decay=0.5), Buffered(2)])
    chain.joined("a", Situation(9, {"a", "b"}, 0.0))
    chain.joined("b", Situation(9, {"a", "b"}, 0.0))

    assert chain.offer(Gradient("a"), 1, Situation(9, {"a"}, 0.0)) == HOLD._replace(factor=0.25)
    assert chain.offer(Gradient("b"), 4, Situation(9, {"a"}, 0.0)) == SUPERSEDE
    assert chain.complete(Situation(9, {"a"}, 0.0)) is None
    assert (chain.name, chain.gates_pulls, chain.holds, chain.must_hold(5)) == ("buffered", True, True, 2)


def test_only_the_last_link_may_hold() -> None:
    with pytest.raises(ConfigError, match="must be the last"):
        Chain([Buffered(2), Staleness()])


@pytest.mark.parametrize(
    ("weighing", "weights"),
    [
        (Weighing(), [0.25, 0.5]),
        (Weighing("sum"), [0.5, 1.0]),
        (Weighing("mean", weigh_by_examples=True), [0.375, 0.25]),
        (Weighing("sum", weigh_by_examples=True), [1.5, 1.0]),
    ],
)
def test_weights_are_factor_times_share(weighing: Weighing, weights: list[float]) -> None:
    step = [Held(Gradient("a", examples=3), 0.5), Held(Gradient("b", examples=1), 1.0)]

    assert weighing.weights(step) == weights


def test_gradients_without_examples_count_the_same_in_a_mean() -> None:
    step = [Held(Gradient(worker, examples=0)) for worker in "ab"]

    assert Weighing("mean", weigh_by_examples=True).weights(step) == [0.5, 0.5]


@pytest.mark.parametrize("name", ["async", "sync", "bounded", "buffered"])
def test_every_built_in_policy_is_made_by_its_name_and_copies(name: str) -> None:
    policy = build(name)

    assert name in names()
    assert policy.name == name
    assert copy.deepcopy(policy).settings() == policy.settings()
    assert build(name, {k: v for k, v in policy.settings().items() if v is not None}).settings() == policy.settings()


def test_staleness_and_bound_combine_with_other_policies() -> None:
    policy = build("buffered", {"buffer_size": 4, "bound": 2, "staleness_scaling": "sqrt"})

    assert policy.settings() == {
        "bound": 2,
        "max_staleness": None,
        "staleness_scaling": "sqrt",
        "staleness_decay": None,
        "buffer_size": 4,
        "grace": 1.0,
    }
    assert policy.offer(Gradient("a"), 3, Situation(3, {"a"}, 0.0)).factor == 0.5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("asink", {}, "must be one of async, sync, bounded, buffered"),
        ("async", {"quorum": 3}, "quorum belongs to sync"),
        ("sync", {"buffer_size": 3}, "buffer_size belongs to buffered"),
        ("bounded", {"bound": 0}, "bound must be at least 1"),
        ("sync", {"bound": 2}, "bound does not go with sync"),
        ("sync", {"quorum": 5, "workers": 4}, "quorum must be at most workers, 4"),
        ("sync", {"grace": 1.0}, "give quorum as well"),
        ("buffered", {"buffer_size": 0}, "at least 1"),
        ("async", {"staleness_scaling": "linear"}, "none, inverse, sqrt"),
        ("async", {"staleness_decay": 1.5}, "at most 1"),
        ("async", {"staleness_decay": 0.5, "staleness_scaling": "sqrt"}, "not both"),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, settings)


def test_a_quorum_beyond_the_workers_allowed_is_refused() -> None:
    with pytest.raises(ConfigError, match="quorum must be at most max_workers, 8"):
        build("sync", {"quorum": 9}).check(8)


def test_the_interface_itself_has_no_opinion() -> None:
    world = World(Policy(), "a")

    assert world.policy.offer(Gradient("a"), 5, world.situation) == APPLY
    assert world.may("a")
    assert (world.policy.next_deadline(), world.policy.must_hold(9), world.waits_for()) == (None, 1, ())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("their_policies:Nothing", r"policy 'theirs' \(their_policies:Nothing\) cannot be loaded: .*Nothing"),
        ("no_such_module:Policy", "cannot be loaded: No module named 'no_such_module'"),
        ("their_policies:lie", r"must make a distgrad.policies.Policy, got str"),
    ],
)
def test_an_installed_policy_that_does_not_work_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    folder = tmp_path / "theirs-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[distgrad.policies]\ntheirs = {entry}\nasync = {entry}\n")
    (tmp_path / "their_policies.py").write_text("def lie():\n    return 'a policy'\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ConfigError, match=message):
        build("theirs")
    assert build("async").is_immediate, "a built-in name cannot be taken"
    assert names() == ["async", "sync", "bounded", "buffered", "theirs"]
