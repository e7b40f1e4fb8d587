"""The holder: state that is put back goes on as if nothing had happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad.errors import ConfigError
from distgrad.holder import ParameterHolder
from distgrad.rules import SGD, Adam, AdamW, Rule

RULES: list[Rule | None] = [
    None,
    SGD(lr=0.5),
    SGD(lr=0.5, weight_decay=0.1),
    SGD(lr=0.5, momentum=0.9, dampening=0.1),
    SGD(lr=0.5, momentum=0.9, nesterov=True),
    Adam(),
    AdamW(),
]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "kernel", "none"))


def mixed(seed: int = 0) -> dict[str, Any]:
    """Parameters of every trainable dtype, with leaves that are carried, empty and 0-d."""
    rng = np.random.default_rng(seed)
    return {
        "half": rng.standard_normal((5, 3)).astype(np.float16),
        "single": [rng.standard_normal(200).astype(np.float32), np.array(rng.standard_normal(), np.float32)],
        "empty": np.ones((0, 4), np.float32),
        "double": (rng.standard_normal((7, 7)),),
        "count": np.arange(3),
        "mask": np.array([True, False]),
    }


def gradient_of(holder: ParameterHolder, seed: int = 1) -> list[np.ndarray[Any, Any]]:
    """Make a gradient for whatever the holder holds."""
    assert holder.layout is not None
    rng = np.random.default_rng(seed)
    trained = holder.layout.arenas[: holder.layout.n_trainable_arenas]
    return [rng.standard_normal(arena.size).astype(arena.dtype) for arena in trained]


def bits(holder: ParameterHolder) -> list[bytes]:
    """Everything that an update may change."""
    assert holder.storage is not None
    state = [array.tobytes() for arrays in holder.state.values() for array in arrays]
    return [array.tobytes() for array in holder.storage.leaves()] + state + [b"%d %d" % (holder.version, holder.steps)]


def test_restored_state_makes_the_next_update_the_same() -> None:
    first, second = (ParameterHolder(rule=Adam(lr=0.5), executor="numpy") for _ in range(2))
    for holder in (first, second):
        holder.set_nest(mixed())
    for seed in (1, 2, 3):
        first.apply(gradient_of(first, seed))
    assert first.storage is not None
    assert first.layout is not None
    second.set_arenas(first.layout, [arena.copy() for arena in first.storage.arenas])

    second.restore_state({slot: [array.copy() for array in arrays] for slot, arrays in first.state.items()}, 3)
    second.version = 3
    for holder in (first, second):
        holder.apply(gradient_of(holder, 4))

    assert bits(first) == bits(second)
    assert second.steps == 4


@pytest.mark.parametrize("fault", ["missing slot", "other slot", "size", "dtype", "arrays"])
def test_state_that_does_not_fit_is_refused_and_nothing_changes(fault: str) -> None:
    holder = ParameterHolder(rule=Adam(lr=0.5), executor="numpy")
    holder.set_nest({"w": np.ones(4, np.float32)})
    state = {slot: [array.copy() for array in arrays] for slot, arrays in holder.state.items()}
    name = next(iter(state))
    if fault == "missing slot":
        del state[name]
    elif fault == "other slot":
        state["momentum"] = [np.zeros(4, np.float32)]
    elif fault == "size":
        state[name] = [np.zeros(5, np.float32)]
    elif fault == "dtype":
        state[name] = [np.zeros(4, np.float64)]
    else:
        state[name] = []
    before = bits(holder)

    with pytest.raises(ConfigError, match="state"):
        holder.restore_state(state, 7)

    assert (bits(holder), holder.steps) == (before, 0)


def test_a_rule_without_state_has_none_to_restore() -> None:
    holder = ParameterHolder(rule=SGD(lr=0.5), executor="numpy")
    holder.set_nest({"w": np.ones(4, np.float32)})

    holder.restore_state({}, 5)

    assert holder.steps == 5
    with pytest.raises(ConfigError):
        holder.restore_state({"exp_avg": [np.zeros(4, np.float32)]}, 5)
