"""The tutorial, command by command, on two hosts that share nothing but a cable."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from support.hosts import BROKER_IP, two_hosts
from support.processes import DISTGRAD, Process, clean_environment

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


class Stage:
    """Two hosts with a folder each, and the broker that runs on one of them."""

    def __init__(self, tmp_path: Path, stack: ExitStack) -> None:
        hosts = stack.enter_context(two_hosts())
        self.prefixes = {"boss": hosts.broker, "other": hosts.worker}
        self.folders = {name: tmp_path / name for name in self.prefixes}
        for folder in self.folders.values():
            folder.mkdir()
        self.stack = stack
        self.broker: Process | None = None
        self.printed = ""

    def type(self, host: str, line: str) -> None:
        """Do what a line of the page says; only the name of the broker's host is put into an address."""
        program, *words = (BROKER_IP if word == "boss" else word for word in shlex.split(line))
        if program == "scp":
            shutil.copy(self.folders["boss"] / words[0].removeprefix("boss:"), self.folders[host] / words[1])
        elif program == "kill":
            assert line == 'kill -9 $(pgrep -n -f "distgrad broker --control 0.0.0.0")'
            assert self.broker is not None
            self.broker.kill()
        elif program == "distgrad" and words[0] == "broker":
            begun = Process(*words, program=(*self.prefixes[host], *DISTGRAD), cwd=self.folders[host])
            self.broker = self.stack.enter_context(begun)
            self.broker.wait_for_line(r"control=\S+")
        else:
            assert program in ("distgrad", "python"), f"how is {program} to be run?"
            if words[0] == "doctor" and "--data" in words and self.broker is not None:
                self.broker.wait()  # it was told to end, and has its ports for some seconds more
            command = [*(DISTGRAD if program == "distgrad" else (sys.executable,)), *words]
            done = subprocess.run(
                [*self.prefixes[host], *command],
                capture_output=True,
                text=True,
                timeout=100,
                cwd=self.folders[host],
                env=clean_environment(),
                check=False,
            )
            self.printed = done.stdout
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            if words[-1:] == ["status"]:
                assert re.search(r"version\W+400\b", done.stdout), done.stdout


def test_every_block_of_the_tutorial_is_run_as_it_stands(tmp_path: Path) -> None:
    install, *blocks = BLOCKS
    assert install[1].splitlines()[-1] == 'pip install ".[fast]"', "tests/test_package.py makes such environments"

    with ExitStack() as stack:
        stage = Stage(tmp_path, stack)
        for language, block in blocks:
            first, *lines = block.splitlines()
            if language == "python":
                for folder in stage.folders.values():
                    (folder / first.removeprefix("# ")).write_text(block)
                continue
            assert language == "sh"
            for line in lines:
                stage.type(first.removeprefix("# on "), line)
                if line == "python one.py":
                    w0, w1, b = map(float, re.findall(r"-?\d+\.\d*", stage.printed))
                    assert (w0, w1, b) == pytest.approx((2.0, -1.0, 0.5), abs=0.1)
        assert stage.broker is not None
        stage.broker.terminate()
        assert stage.broker.wait() == 0

    learned = load_file(tmp_path / "boss" / "model.safetensors")
    assert [*learned["w"], *learned["b"]] == pytest.approx([2.0, -1.0, 0.5], abs=0.2)
