"""``distgrad admin``: the address comes first, and who forgets it is told."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from distgrad.admin_command import admin


@pytest.mark.parametrize("words", [["status"], ["status", "127.0.0.1:5556"], ["--timeout", "5", "status"]])
def test_a_forgotten_address_is_said(words: list[str]) -> None:
    result = CliRunner().invoke(admin, words)

    assert result.exit_code == 2
    assert "address comes before the command" in result.output
    assert "distgrad admin 127.0.0.1 status" in result.output


def test_the_help_of_a_command_needs_no_address() -> None:
    result = CliRunner().invoke(admin, ["status", "--help"])

    assert result.exit_code == 0
    assert "ADDRESS status" in result.output
    assert "--watch" in result.output


def test_a_host_may_have_the_name_of_a_command() -> None:
    assert "--watch" in CliRunner().invoke(admin, ["save", "status", "--help"]).output
