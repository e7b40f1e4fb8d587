"""Every command on the pages about running distgrad is run as it stands, on the usual ports of a host of its own."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from support.hosts import two_hosts
from support.processes import DISTGRAD, Process, clean_environment

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("configuration", "operations", "replay", "seeing", "howto")
# These need a terminal, or an extra; their own tests run them (tests/distgrad/seeing).
ELSEWHERE = {
    "distgrad top 127.0.0.1:5556",
    "distgrad dashboard 127.0.0.1:5556",
    "distgrad broker --hooks alerts:Alerts",
    # The environment and the folder of these tests.
    'pip install ".[fast,demo,top,dashboard]"',
    "cd examples",
}
PUSHES = """
import numpy as np
from distgrad_worker import Worker
with Worker("127.0.0.1") as worker:
    worker.initialize({"w": np.zeros(3)})
    for _ in range(1250):
        worker.push({"w": np.ones(3)})
"""


def commands() -> set[str]:
    found = set()
    for page in PAGES:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for block in re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            found |= set(block.splitlines())
    return found


class Shell:
    """Types the pages' commands on one host, and remembers which."""

    def __init__(self, prefix: tuple[str, ...], folder: Path, stack: ExitStack) -> None:
        self.typed: set[str] = set()
        self.prefix, self._folder, self._stack = prefix, folder, stack

    def words(self, line: str) -> list[str]:
        self.typed.add(line)
        program, *words = shlex.split(line)
        assert program == "distgrad"
        return ["127.0.0.1" if word == "boss" else word for word in words]

    def run(self, line: str) -> str:
        """Run a command to its end, which must be a good one."""
        return self.python(*DISTGRAD[1:], *self.words(line))

    def python(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.prefix, sys.executable, *arguments],
            capture_output=True, text=True, timeout=100, cwd=self._folder, env=clean_environment(), check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
        return done.stdout

    def begin(self, line: str, ready: str) -> Process:
        """Start a command that goes on until it is told to end."""
        words = self.words(line)
        process = self._stack.enter_context(Process(*words, program=(*self.prefix, *DISTGRAD), cwd=self._folder))
        process.wait_for_line(ready)
        return process


def end(process: Process) -> None:
    process.interrupt()
    assert process.wait() in (0, 130, 128 + signal.SIGINT), process.output()


@pytest.mark.timeout(240)
def test_every_command_of_the_pages_about_running_it_does_what_they_say(tmp_path: Path) -> None:
    shutil.copy(ROOT / "deploy" / "broker.toml", tmp_path)
    shutil.copy(ROOT / "examples" / "digits.py", tmp_path)

    with ExitStack() as stack:
        shell = Shell(stack.enter_context(two_hosts()).broker, tmp_path, stack)

        assert "# default" in shell.run("distgrad broker --config broker.toml --check-config")
        assert "fault" not in shell.run("distgrad doctor --data run")

        broker = shell.begin("distgrad broker --data run --optimizer adam", r"control=\S+:5556")
        shell.python("-c", PUSHES)
        assert shell.run("distgrad admin 127.0.0.1 --timeout 5 health").startswith("healthy: version 1250")
        assert shell.run("distgrad admin 127.0.0.1 --timeout 5 health --ready").startswith("ready: version 1250")
        metrics = shell.begin("distgrad metrics 127.0.0.1:5556 --listen 127.0.0.1:9469", r"9469")
        asked = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9469/metrics').read().decode())"
        assert re.search(r"^distgrad_\w*version\S* 1250(\.0)?$", shell.python("-c", asked), re.MULTILINE)
        end(metrics)
        shell.run("distgrad replay run --out newest.safetensors")
        shell.run("distgrad replay run --until 1200 --out then.npz")
        shell.run("distgrad journal run")
        assert len(shell.run("distgrad journal run --records 50").splitlines()) == 50
        shell.run("distgrad journal run --verify --json")
        end(broker)

        shell.run("distgrad journal run --verify")
        back = shell.begin("distgrad broker --data run --recover-until 90", r"control=\S+")
        assert "version 90" in shell.python("-m", "distgrad", "admin", "127.0.0.1", "get", "--out", "then.safetensors")
        end(back)

        seen = shell.begin("distgrad broker --optimizer adam --lr 0.0005", r"control=\S+:5556")
        assert "step 1000 of 1000" in shell.run("distgrad worker 127.0.0.1 digits:train --processes 4")
        end(seen)

        shell.run("distgrad keys new serving --role read --dir keys")
        closed = stack.enter_context(
            Process("broker", "--data", "run", "--keys", "keys", program=(*shell.prefix, *DISTGRAD), cwd=tmp_path)
        )
        closed.wait_for_line(r"control=\S+")
        follow = "distgrad admin boss --keys serving.key get --out model.safetensors --follow --every 10"
        end(shell.begin(follow, r"wrote model\.safetensors: version 90"))
        shell.run("distgrad keys new trainer --role worker --dir keys")
        assert "trainer" in shell.run("distgrad keys list --dir keys")
        shell.run("distgrad keys revoke trainer --dir keys")
        assert not (tmp_path / "keys" / "trainer.pub").exists()
        end(closed)

    assert shell.typed == commands() - ELSEWHERE
    assert load_file(tmp_path / "model.safetensors")["w"].shape == (3,)
