"""``distgrad completion``: the scripts are read by real shells where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distgrad.completion_command import SHELLS
from support.processes import clean_environment, run

PROGRAMS = str(Path(sys.executable).parent)
# What bash does when Tab is pressed behind these words: call the function that the script registered.
PRESS_TAB = """
eval "$(distgrad completion bash)"
read -ra COMP_WORDS <<< "$1"
[ -z "$2" ] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
complete -p distgrad | grep -q '_distgrad_completion distgrad$' || exit 9
_distgrad_completion distgrad
printf '%s\\n' "${COMPREPLY[@]}"
"""


def environment() -> dict[str, str]:
    return clean_environment(PATH=f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_that_asks_distgrad(shell: str) -> None:
    done = run("completion", shell)

    assert done.returncode == 0, done.stderr
    assert f"_DISTGRAD_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_accepts_its_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(run("completion", shell).stdout)

    checked = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=30, check=False)

    assert (checked.returncode, checked.stderr) == (0, "")


def completed(line: str, *, word_is_begun: bool = True) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", PRESS_TAB, "bash", line, "begun" if word_is_begun else ""],
        capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_values() -> None:
    assert completed("distgrad ad") == {"admin"}
    assert completed("distgrad broker --checkpoint-u") == {"--checkpoint-updates"}
    assert completed("distgrad keys new me --role", word_is_begun=False) == {"worker", "admin", "read"}
    assert completed("distgrad admin 127.0.0.1 he") == {"health"}


def test_another_shell_is_refused() -> None:
    done = run("completion", "tcsh")

    assert done.returncode == 2
    assert "'bash', 'zsh', 'fish'" in done.stderr
