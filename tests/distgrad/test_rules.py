"""Rules as values: what they accept, and which constants they hand to the kernels."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

from distgrad.arrays import TRAINABLE, dtype_of
from distgrad.errors import ConfigError
from distgrad.rules import RULES, SGD, Adam, AdamW, Rule, rule_from_settings, state_dtype


@pytest.mark.parametrize(
    ("kind", "settings", "claim"),
    [
        (SGD, {"lr": -0.1}, r"sgd: lr must be from 0 to 1e\+30, got -0.1"),
        (SGD, {"lr": math.nan}, "lr must be from 0"),
        (SGD, {"lr": math.inf}, "lr must be from 0"),
        (SGD, {"lr": 10**400}, "lr must be from 0"),
        (SGD, {"lr": "0.1"}, "lr must be a number"),
        (SGD, {"lr": True}, "lr must be a number"),
        (SGD, {"lr": None}, "lr must be a number"),
        (SGD, {"lr": 1, "momentum": 1.0}, "momentum must be at least 0 and less than 1, got 1.0"),
        (SGD, {"lr": 1, "momentum": 0.5, "dampening": 1.5}, "dampening must be from 0 to 1"),
        (SGD, {"lr": 1, "weight_decay": -1}, "weight_decay must be from 0"),
        (SGD, {"lr": 1, "nesterov": 1}, "nesterov must be true or false"),
        (SGD, {"lr": 1, "nesterov": True}, "nesterov needs a momentum above 0"),
        (SGD, {"lr": 1, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, "a dampening of 0"),
        (Adam, {"beta1": 1}, "adam: beta1 must be at least 0 and less than 1"),
        (AdamW, {"beta2": -0.1}, "adamw: beta2 must be"),
        (Adam, {"eps": 0}, "eps must be from 1e-30"),
    ],
)
def test_impossible_numbers_are_refused_with_the_allowed_range(
    kind: type[Rule], settings: dict[str, Any], claim: str
) -> None:
    with pytest.raises(ConfigError, match=claim):
        kind(**settings)


def test_rules_are_values() -> None:
    rule = SGD(lr=np.float32(0.5), momentum=0)  # type: ignore[arg-type]  # any number will do

    assert rule == SGD(lr=0.5)
    assert hash(rule) == hash(SGD(lr=0.5))
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert type(rule.momentum) is float
    with pytest.raises(AttributeError):
        rule.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.9, nesterov=True), Adam(eps=1e-6), AdamW(lr=1)])
def test_a_rule_comes_back_from_its_name_and_settings(rule: Rule) -> None:
    assert rule_from_settings(rule.name, rule.settings()) == rule
    assert RULES[rule.name] is type(rule)


@pytest.mark.parametrize(
    ("name", "settings", "claim"),
    [
        ("adagrad", {}, "one of sgd, adam, adamw, got 'adagrad'"),
        ("sgd", {}, "sgd needs lr"),
        ("sgd", {"lr": 1, "beta1": 0.5}, "sgd has no setting 'beta1'; it has lr, momentum"),
        ("adam", {"lr": -1}, "adam: lr must be"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(name: str, settings: dict[str, Any], claim: str) -> None:
    with pytest.raises(ConfigError, match=claim):
        rule_from_settings(name, settings)


def test_replace_changes_known_numbers_only() -> None:
    assert Adam().replace(lr=0.5) == Adam(lr=0.5)
    with pytest.raises(ConfigError, match="adam has no setting 'momentum'; it has lr, beta1"):
        Adam().replace(momentum=0.5)
    with pytest.raises(ConfigError, match="lr must be"):
        Adam().replace(lr=-1)


@pytest.mark.parametrize(
    ("rule", "kernel", "slots", "varies"),
    [
        (SGD(lr=1), "step", (), False),
        (SGD(lr=1, weight_decay=0.1), "decay", (), False),
        (SGD(lr=1, momentum=0.9), "momentum", ("momentum_buffer",), False),
        (SGD(lr=1, momentum=0.9, dampening=0.5), "momentum", ("momentum_buffer",), True),
        (SGD(lr=1, momentum=0.9, nesterov=True), "nesterov", ("momentum_buffer",), False),
        (Adam(), "adam", ("exp_avg", "exp_avg_sq"), True),
        (AdamW(), "adam", ("exp_avg", "exp_avg_sq"), True),
    ],
)
def test_numbers_choose_the_kernel_and_the_state(rule: Rule, kernel: str, slots: tuple[str, ...], varies: bool) -> None:
    assert (rule.kernel, rule.slots, rule.varies) == (kernel, slots, varies)
    assert rule.varies == (rule.numbers(1.0, 1) != rule.numbers(1.0, 2))
    assert len(rule.numbers(1.0, 1)) == len(rule.numbers(-1.0, 10**9))


def test_adams_corrections_tend_to_one() -> None:
    step_size, root, *_ = Adam(lr=0.5).numbers(1.0, 10**6)

    assert (step_size, root) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("rule", "dtype", "limit"),
    [
        (SGD(lr=1), "float32", np.finfo("f4").max),
        (SGD(lr=0.01), "float16", 65504.0),
        (SGD(lr=4), "float64", np.finfo("f8").max / 8),
        (SGD(lr=0.1, momentum=0.9), "float32", float(np.finfo("f4").max) * 0.05),
        (SGD(lr=0, momentum=0.75), "float32", float(np.finfo("f4").max) * 0.125),
        (SGD(lr=0.001, momentum=0.9), "float16", 65504.0),
        (Adam(), "float32", 0.5 * float(np.finfo("f4").max) ** 0.5),
        (AdamW(), "float64", 0.5 * float(np.finfo("f8").max) ** 0.5),
        (Adam(), "float16", 65504.0),
        (SGD(lr=0.01), dtype_of("bfloat16"), 255 * 2.0**120),
    ],
)
def test_the_limit_is_what_the_state_can_hold(rule: Rule, dtype: Any, limit: float) -> None:
    assert rule.limit(dtype) == pytest.approx(limit, rel=1e-6)


def test_sixteen_bits_keep_float32_state() -> None:
    assert [state_dtype(dtype_of(name)).name for name in TRAINABLE] == ["float32", "float32", "float32", "float64"]
