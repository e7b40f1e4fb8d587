"""What is in `deploy/` works as it lies there: the script without an installation, the sample settings."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from distgrad_broker.config import RULE_NUMBERS, BrokerConfig
from support import processes
from support.scripted_broker import ScriptedBroker

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FIELDS = {field.name: field for field in dataclasses.fields(BrokerConfig)}

# Runs a script in an interpreter where this project is not installed, but the libraries that it needs are.
WITHOUT_DISTGRAD = """
import runpy, sys
sys.path[:] = [entry for entry in sys.path if not entry.rstrip("/").endswith(("/distgrad", "/broker", "/worker"))]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def uncommented(text: str) -> dict[str, Any]:
    """Read a sample as if every setting in it were switched on."""
    return tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", text))


def run_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_DISTGRAD, str(DEPLOY / "admin"), *arguments]
    environment = processes.clean_environment()
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60, check=False)


@pytest.mark.skipif(os.name == "nt", reason="needs permissions of POSIX")
def test_the_admin_script_can_be_executed() -> None:
    script = DEPLOY / "admin"

    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env python3\n")


def test_the_admin_script_controls_a_broker_without_an_installation(tmp_path: Path) -> None:
    with ScriptedBroker(lambda request: request.answer(status={"version": 3})) as broker:
        ended = run_script(broker.address, "status", "--json", cwd=tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == '{"version": 3}\n'


def test_the_admin_script_is_not_misled_by_the_folder_it_is_run_in(tmp_path: Path) -> None:
    for name in ("distgrad.py", "broker.py", "worker.py", "admin.py"):
        (tmp_path / name).write_text("raise SystemExit('the user\\'s module was imported')\n")

    ended = run_script("--help", cwd=tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert "ADDRESS COMMAND" in ended.stdout


def test_the_admin_script_tells_refusal_and_absence_as_distgrad_does(tmp_path: Path) -> None:
    with ScriptedBroker(lambda request: request.fail("forbidden", "not with this key")) as broker:
        refused = run_script(broker.address, "status", cwd=tmp_path)
        absent = run_script("--timeout", "0.2", "127.0.0.1:1", "status", cwd=tmp_path)

    assert (refused.returncode, refused.stderr) == (1, "error: not with this key\n")
    assert absent.returncode == 3
    assert absent.stderr.startswith("error: no answer from tcp://127.0.0.1:1 ")


def test_the_admin_script_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('gone', name='click')\n")
    blocked = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {WITHOUT_DISTGRAD}"
    command = [sys.executable, "-c", blocked, str(DEPLOY / "admin"), "--help"]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode != 0
    assert "click is not installed" in ended.stderr
    assert "pip install" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_sample_names_every_setting_and_no_other() -> None:
    assert set(uncommented((DEPLOY / "broker.toml").read_text())) == set(FIELDS)


def test_the_sample_shows_the_defaults(tmp_path: Path) -> None:
    settings = uncommented((DEPLOY / "broker.toml").read_text())
    shown = {name: settings[name] for name, field in FIELDS.items() if field.default is not None}
    sample = tmp_path / "shown.toml"
    sample.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in shown.items()))

    checked = processes.run("broker", "--config", sample, "--check-config")

    assert checked.returncode == 0, checked.stderr
    effective = tomllib.loads("\n".join(line for line in checked.stdout.splitlines() if "(none)" not in line))
    assert {name: effective[name] for name in shown} == {name: FIELDS[name].default for name in shown}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_samples_numbers_are_right_for_the_rules_that_it_names(tmp_path: Path, optimizer: str) -> None:
    text = (DEPLOY / "broker.toml").read_text()
    wanted = {name for name in RULE_NUMBERS if re.search(rf"(?m)^# {name} = \S+ *(#.*\b({optimizer}|all)\b.*)?$", text)}
    settings = {name: value for name, value in uncommented(text).items() if name in wanted} | {"optimizer": optimizer}
    sample = tmp_path / "rule.toml"
    sample.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in settings.items()))

    checked = processes.run("broker", "--config", sample, "--check-config")

    assert checked.returncode == 0, checked.stderr


def test_the_sample_itself_is_accepted() -> None:
    checked = processes.run("broker", "--config", DEPLOY / "broker.toml", "--check-config")

    assert checked.returncode == 0, checked.stderr


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
