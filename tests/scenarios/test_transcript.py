"""The transcript types nothing that a new user is not told of, and its two hosts are what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOLD = ("README.md", "docs/seeing.md", "docs/tutorial.md")
# What is no step of distgrad's: to get there, and what the transcript explains beside it.
OWN = {
    "git clone … distgrad",
    "cd distgrad",
    "cp ~/boss/trainer.key .",
    "kill -9 …",
    "distgrad worker boss train:train",
}

# The machine keeps its own namespaces and hosts: these folders are the shell's alone, and end with it.
ALONE = """
set -e
mount --make-rprivate /
mkdir -p /run/netns /etc/netns
mount -t tmpfs nothing /run/netns
mount -t tmpfs nothing /etc/netns
"""
MEET = """
import socket, subprocess, sys

other = ("ip", "netns", "exec", "other", sys.executable, "-c")
with socket.create_server(("0.0.0.0", 0)) as server:
    server.settimeout(60)
    asks = f"import socket; socket.create_connection(('boss', {server.getsockname()[1]}), 60).close()"
    with subprocess.Popen([*other, asks]) as asking:
        print("from", server.accept()[1][0])
    assert asking.returncode == 0
"""


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def typed(prompt: str) -> list[str]:
    """List what was typed behind a prompt, in order."""
    text = "\n".join(blocks("docs/transcript.md", "console"))
    return re.findall(rf"^{prompt} (.*)$", text, flags=re.MULTILINE)


def test_every_step_is_written_down_on_a_page_for_new_users() -> None:
    told = {line for page in TOLD for block in blocks(page, "sh") for line in block.splitlines()}
    told |= {line for page in TOLD for line in re.findall(r"`(distgrad [^`]+)`", (ROOT / page).read_text())}

    steps = typed(r"\w*\$")

    assert len(steps) > 25
    assert [step for step in steps if step not in told | OWN] == []


def test_the_tutorial_was_gone_through_to_its_end() -> None:
    shown = {step for host in ("boss", "other") for step in typed(rf"{host}\$")}
    told = {line for block in blocks("docs/tutorial.md", "sh")[1:] for line in block.splitlines()[1:]}

    instead = {
        "scp boss:trainer.key .",
        'kill -9 $(pgrep -n -f "distgrad broker --control 0.0.0.0")',
    }  # the transcript says what, and why
    assert told - shown == instead


def test_its_namespaces_are_two_hosts_that_reach_each_other_by_name() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs root, `ip` and `unshare`")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespace of mounts can be made here")
    lines = typed("#")
    meet = 'ip netns exec boss "$1" -c "$2"; ip netns delete boss; ip netns delete other'

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "\n".join([ALONE, *lines, meet]), "sh", sys.executable, MEET],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip

    assert len(lines) == 11
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("from 198.18.0.2\n")
