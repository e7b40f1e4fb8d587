"""What torch.optim computed, and what a holder computes from the same gradients."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from distgrad.holder import ParameterHolder
from distgrad.rules import rule_from_settings

_FILE = Path(__file__).parents[1] / "data" / "torch_reference.npz"
LEAVES = ("weight", "bias", "scale")
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


@cache
def _arrays() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(_FILE) as file:
        return dict(file)


def cases() -> dict[str, dict[str, Any]]:
    """List the cases: the rule's name up to the first dash, and its settings."""
    listed: dict[str, dict[str, Any]] = json.loads(str(_arrays()["cases"]))
    return listed


def gradients() -> list[dict[str, np.ndarray[Any, Any]]]:
    """List the gradients, one nest per step."""
    steps = len(_arrays()["gradient/scale"])
    return [{leaf: _arrays()[f"gradient/{leaf}"][step] for leaf in LEAVES} for step in range(steps)]


def start(dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    """Give the parameters before the first step."""
    return {leaf: _arrays()[f"start/{leaf}"].astype(dtype) for leaf in LEAVES}


def farthest(case: str, dtype: str, mode: str, *, executor: str, in_place: bool) -> float:
    """Apply all gradients and measure how far the worst leaf is from torch's, relative to its norm."""
    rule = rule_from_settings(case.split("-")[0], cases()[case])
    holder = ParameterHolder(mode, rule, executor=executor)
    holder.set_nest(start(dtype))
    assert holder.layout is not None
    spare = None if in_place else holder.new_spare()
    for gradient in gradients():
        spare = holder.apply(holder.layout.pack_gradient(gradient), spare=spare)
    mine, torchs = holder.nest(), {leaf: _arrays()[f"{dtype}/{case}/{mode}/{leaf}"] for leaf in LEAVES}
    return max(float(np.linalg.norm(mine[leaf] - torchs[leaf]) / np.linalg.norm(torchs[leaf])) for leaf in LEAVES)
