"""A variable that looks like a setting and is none is refused; those of others are let be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distgrad.environment import check_variables
from distgrad.errors import ConfigError
from distgrad_broker.config import BrokerConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("DISTGRAD_LRR", "did you mean DISTGRAD_LR?"),
        ("DISTGRAD_QUEUE_BYTE", "did you mean DISTGRAD_QUEUE_BYTES?"),
        ("DISTGRAD_LOG_LEVELS", "did you mean DISTGRAD_LOG_LEVEL?"),
        ("DISTGRAD_XYZZY", "unset DISTGRAD_XYZZY"),
    ],
)
def test_a_slip_is_refused_with_what_was_meant(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        check_variables(BrokerConfig, {name: "3"})

    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    "name",
    [
        "DISTGRAD_LR",
        "DISTGRAD_ADMIN_KEYS",
        "DISTGRAD_RANK",
        "DISTGRAD_PORT",
        "DISTGRAD_SERVICE_HOST",
        "DISTGRAD_BROKER_SERVICE_PORT_CONTROL",
        "DISTGRAD_BROKER_PORT_5556_TCP_ADDR",
        "DISTGRAD_PORT_5556_TCP",
        "_DISTGRAD_COMPLETE",
        "PATH",
    ],
)
def test_settings_and_what_others_read_or_make_are_let_be(name: str) -> None:
    check_variables(BrokerConfig, {name: "tcp://10.0.0.1:5556"})


def test_an_empty_variable_counts_as_not_set() -> None:
    check_variables(BrokerConfig, {"DISTGRAD_LRR": ""})


def test_all_variables_of_the_code_and_of_what_is_deployed_are_known() -> None:
    folders = [ROOT / name for name in ("distgrad", "broker", "worker", "deploy", "examples", "benchmarks")]
    files = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".py", ".sh", ".md", ".yaml", ".toml") and path.is_file()
    ]
    found = {name for path in files for name in re.findall(r"\bDISTGRAD_[A-Z_]*[A-Z]\b", path.read_text())}

    assert "DISTGRAD_LOG_JSON" in found
    check_variables(BrokerConfig, dict.fromkeys(found - {"DISTGRAD_NAME"}, "1"))
