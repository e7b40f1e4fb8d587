"""What ``--json`` prints is JSON for every reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distgrad.json_line import json_line


def test_numbers_that_are_none_are_null_wherever_they_stand() -> None:
    value = {"loss": float("nan"), "rows": [{"high": float("inf")}, (float("-inf"), 1.5)]}

    found = json.loads(json_line(value), parse_constant=pytest.fail)

    assert found == {"loss": None, "rows": [{"high": None}, [None, 1.5]]}


def test_bytes_are_hexadecimal_and_other_things_their_text() -> None:
    assert json_line({"cursor": b"\x00\xff", "folder": Path("run")}) == '{"cursor": "00ff", "folder": "run"}'


def test_it_is_one_line() -> None:
    assert "\n" not in json_line({"text": "a\nb"})
