"""Tests of `distgrad_broker.config`."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from distgrad import SGD, Adam, AdamW
from distgrad.config import fields, load
from distgrad.errors import ConfigError
from distgrad_broker.config import RULE_NUMBERS, BrokerConfig


def config_with(**settings: Any) -> BrokerConfig:
    return BrokerConfig(**settings)


def test_the_defaults_bind_to_this_machine_alone_and_apply_gradients_as_they_are() -> None:
    config = BrokerConfig()

    assert config.control == "tcp://127.0.0.1:5556"
    assert config.gradients == "tcp://127.0.0.1:5555"
    assert config.mode == "descent"
    assert config.rule() is None


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ({"optimizer": "sgd", "lr": 0.1}, SGD(lr=0.1)),
        ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}, SGD(lr=0.1, momentum=0.9, nesterov=True)),
        ({"optimizer": "adam"}, Adam()),
        ({"optimizer": "adam", "lr": 0.01, "beta1": 0.5, "eps": 1e-6}, Adam(lr=0.01, beta1=0.5, eps=1e-6)),
        ({"optimizer": "adamw", "weight_decay": 0.5}, AdamW(weight_decay=0.5)),
    ],
)
def test_numbers_make_the_rule_that_they_would_make_in_python(numbers: dict[str, Any], rule: object) -> None:
    assert BrokerConfig(**numbers).rule() == rule


@pytest.mark.parametrize("name", RULE_NUMBERS)
def test_a_number_without_an_optimizer_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} needs --optimizer"):
        config_with(**{name: True if name == "nesterov" else 0.5})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "sgd"}, "lr"),
        ({"optimizer": "sgd", "lr": 0.1, "beta1": 0.9}, "beta1"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum"),
        ({"optimizer": "adam", "beta1": 1.5}, "beta1"),
        ({"optimizer": "newton", "lr": 1.0}, "sgd, adam, adamw"),
        ({"mode": "sideways"}, "descent"),
        ({"control": "ipc://x"}, "tcp"),
        ({"control": "host:0x50"}, "port"),
    ],
)
def test_what_cannot_work_is_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BrokerConfig(**settings)


@pytest.mark.parametrize("name", ["control", "gradients"])
@pytest.mark.parametrize("address", ["tcp://0.0.0.0:1", "*:1", "[::]:1", "192.168.1.5:1", "broker.example.org"])
def test_without_keys_only_this_machine_is_bound_unless_told_so(name: str, address: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .* there are no keys") as caught:
        config_with(**{name: address})
    assert caught.value.hint is not None
    assert "--insecure" in caught.value.hint

    config_with(**{name: address, "insecure": True})
    config_with(**{name: address, "keys": Path("keys")})


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.5.5.5:1", "[::1]:1"])
def test_loopback_needs_no_keys(address: str) -> None:
    BrokerConfig(control=address, gradients=address)


def test_every_setting_has_a_flag_a_variable_and_a_sentence() -> None:
    for field in fields(BrokerConfig):
        assert field.flag == "--" + field.name.replace("_", "-")
        assert field.variable == "DISTGRAD_" + field.name.upper()
        assert field.setting.help.endswith(".")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("queue_bytes", "2GiB", 2 << 30),
        ("workers_silent_after", "2m", 120.0),
        ("stopped", "yes", True),
        ("max_workers", "7", 7),
        ("keys", "/somewhere", Path("/somewhere")),
        ("mode", "ASCENT", "ascent"),
    ],
)
def test_variables_are_read_as_people_write_them(name: str, text: str, value: object) -> None:
    loaded = load(BrokerConfig, {}, None, {f"DISTGRAD_{name.upper()}": text})

    assert getattr(loaded.config, name) == value


def test_a_configuration_is_a_value() -> None:
    config = BrokerConfig(max_workers=5)

    with pytest.raises(FrozenInstanceError):
        config.max_workers = 6  # type: ignore[misc]
    assert config == BrokerConfig(max_workers=5)
