from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest

from distgrad import command, errors
from distgrad.version import __version__
from support.processes import DISTGRAD, Process, clean_environment, run

FAKE = """
import click

@click.command()
def fine():
    \"\"\"Do a fine thing.\"\"\"
    click.echo("done it")

@click.command()
def bug():
    raise ZeroDivisionError("ours")

not_a_command = 7
"""
BROKEN = '''
import a_module_that_is_missing

def broken():
    """Do a thing that is missing."""
'''


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make commands that are fine, broken, buggy and nonsense."""
    (tmp_path / "fake_commands.py").write_text(FAKE)
    (tmp_path / "broken_commands.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        "fine": "fake_commands:fine",
        "bug": "fake_commands:bug",
        "nonsense": "fake_commands:not_a_command",
        "broken": "broken_commands:broken",
        "absent": "absent_package.commands:absent",
    }
    entries = [EntryPoint(name, value, command.GROUP) for name, value in values.items()]
    monkeypatch.setattr(command, "entry_points", lambda group: entries if group == command.GROUP else [])


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Run a command that raises."""

    def run_it(error: BaseException) -> int:
        @click.command()
        def fails() -> None:
            raise error

        monkeypatch.setattr(command.LazyGroup, "get_command", lambda *_: fails)
        return command.main(["fails"])

    return run_it


@pytest.mark.usefixtures("fakes")
def test_help_lists_every_command_with_its_first_sentence_and_imports_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["--help"]) == command.DONE

    shown = capsys.readouterr().out
    assert "fine" in shown
    assert "Do a fine thing." in shown
    assert "Do a thing that is missing." in shown
    assert "absent" in shown
    assert "fake_commands" not in sys.modules
    assert "broken_commands" not in sys.modules


@pytest.mark.usefixtures("fakes")
def test_only_the_command_that_is_used_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["fine"]) == command.DONE

    assert capsys.readouterr().out == "done it\n"
    assert "broken_commands" not in sys.modules
    del sys.modules["fake_commands"]


@pytest.mark.usefixtures("fakes")
def test_a_command_that_lacks_a_module_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["broken"]) == command.USAGE

    assert capsys.readouterr().err == "error: 'broken' needs the module 'a_module_that_is_missing', which is missing\n"


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", ["bug", "nonsense"])
def test_a_bug_shows_its_traceback(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([name]) == command.BUG

    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "this is a bug in distgrad" in told
    del sys.modules["fake_commands"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ControlError("failed", "it failed"), command.REFUSED),
        (errors.Forbidden("forbidden", "it failed"), command.REFUSED),
        (errors.MalformedMessage("it failed"), command.REFUSED),
        (errors.GradientRefused("layout", "it failed"), command.REFUSED),
        (errors.NoParameters("it failed"), command.REFUSED),
        (errors.QueueFull("it failed"), command.REFUSED),
        (errors.ConfigError("it failed"), command.USAGE),
        (errors.KeyFileError("it failed"), command.USAGE),
        (errors.CheckpointError("it failed"), command.USAGE),
        (errors.BrokerUnreachable("it failed"), command.UNREACHABLE),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    raising: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
    error: errors.DistgradError,
    code: int,
) -> None:
    assert raising(error) == code

    assert capsys.readouterr() == ("", "error: it failed\n")


def test_a_hint_is_a_line_of_its_own(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    raising(errors.ConfigError("it failed", hint="try again"))

    assert capsys.readouterr().err == "error: it failed\nhint: try again\n"


def test_a_peers_words_cannot_steer_the_terminal(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    raising(errors.ControlError("failed", "no\n\x1b[2J", hint="a\nb"))

    assert capsys.readouterr().err == "error: no\\n\\x1b[2J\nhint: a\\nb\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_130(raising: Callable[[BaseException], int], error: BaseException) -> None:
    assert raising(error) == command.INTERRUPTED


def test_an_exit_code_of_a_command_is_kept(raising: Callable[[BaseException], int]) -> None:
    assert raising(click.exceptions.Exit(5)) == 5


@pytest.mark.parametrize("arguments", [["no-such-command"], ["--no-such-flag"], []])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == command.USAGE

    assert "Usage: distgrad" in capsys.readouterr().err


def test_the_module_runs_as_the_command() -> None:
    done = run("--version")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"distgrad {__version__}\n", "")


def test_the_installed_commands_are_listed() -> None:
    shown = run("--help").stdout

    for name in ("admin", "broker", "demo", "keys", "worker"):
        assert f"\n  {name} " in shown


def test_a_reader_that_goes_away_is_no_error_of_ours() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        # Buffered, as a pipe is by default: the output then meets the closed pipe only when it is flushed.
        done = subprocess.run(
            [*DISTGRAD, "--help"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**clean_environment(), "PYTHONUNBUFFERED": ""},
            check=False,
        )
    finally:
        os.close(write)

    assert (done.returncode, done.stderr) == (1, "")


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from distgrad.command import main; main(['--help']);"
        "heavy = {'numpy', 'zmq', 'rich', 'numba', 'safetensors', 'msgpack'} & set(sys.modules);"
        "assert not heavy, heavy"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr


def test_a_process_is_read_line_by_line_and_ended_with_its_block() -> None:
    program = (sys.executable, "-c", "import sys, time; print('ready 7'); print('x', file=sys.stderr); time.sleep(600)")
    with Process(program=program) as process:
        assert process.wait_for_line(r"ready (\d)")[1] == "7"
        assert process.pid > 0

    assert process.wait() != 0
    assert sorted(process.lines)[0] == "ready 7"
