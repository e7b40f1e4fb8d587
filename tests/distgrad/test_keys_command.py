from __future__ import annotations

from pathlib import Path

import pytest

from distgrad import command
from distgrad.keys import BrokerKeys, ClientKeys, Role


def keys(*arguments: object) -> int:
    return command.main(["keys", *map(str, arguments)])


def test_new_makes_the_folder_and_the_clients_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys("new", "w1", "--role", "worker", "--dir", tmp_path / "keys") == command.DONE

    assert str(tmp_path / "w1.key") in capsys.readouterr().out
    assert ClientKeys.load(tmp_path / "w1.key").public in BrokerKeys.load(tmp_path / "keys").clients


def test_new_writes_where_it_is_told(tmp_path: Path) -> None:
    assert keys("new", "a1", "--role", "admin", "--dir", tmp_path / "keys", "--out", tmp_path / "mine") == command.DONE

    assert ClientKeys.load(tmp_path / "mine").role is Role.ADMIN


def test_list_shows_names_and_roles_and_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, role in (("w1", "worker"), ("a1", "admin"), ("r1", "read")):
        keys("new", name, "--role", role, "--dir", tmp_path / "keys")
    capsys.readouterr()

    assert keys("list", "--dir", tmp_path / "keys") == command.DONE

    shown = capsys.readouterr().out
    assert [line.split()[:2] for line in shown.splitlines()] == [["a1", "admin"], ["r1", "read"], ["w1", "worker"]]
    assert ClientKeys.load(tmp_path / "w1.key").secret.decode() not in shown
    assert BrokerKeys.load(tmp_path / "keys").secret.decode() not in shown


def test_revoke_takes_a_key_away(tmp_path: Path) -> None:
    keys("new", "w1", "--role", "worker", "--dir", tmp_path / "keys")

    assert keys("revoke", "w1", "--dir", tmp_path / "keys") == command.DONE

    assert BrokerKeys.load(tmp_path / "keys").clients == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["new", "w1", "--role", "king", "--dir", "keys"],
        ["new", "w1", "--dir", "keys"],
        ["new", "a/b", "--role", "worker", "--dir", "keys"],
        ["revoke", "w1", "--dir", "keys"],
        ["list", "--dir", "keys"],
        ["list"],
        ["fly"],
    ],
)
def test_wrong_usage_is_said_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert keys(*arguments) == command.USAGE

    told = capsys.readouterr()
    assert told.err
    assert "Traceback" not in told.err
    assert told.out == ""
