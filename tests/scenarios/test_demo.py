"""The demo as a user runs it: real processes learn real digits, and none of them is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and sessions are POSIX")

DEMO = [sys.executable, "-P", "-m", "distgrad", "demo"]


def is_listening(address: str) -> bool:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def address_in(line: str) -> str:
    match = re.search(r"broker at (tcp://\S+),", line)
    assert match is not None, line
    return match[1]


def test_the_demo_learns_to_read_digits_and_draws_it(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"

    done = subprocess.run(
        [*DEMO, "--workers", "2", "--out", picture.name], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )

    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"^test accuracy: (\d+\.\d)%$", done.stdout, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) >= 95
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    for worker in ("worker-0", "worker-1"):
        assert [worker, "2,000", "2,000", "0"] in [row[:4] for row in rows], "applied, settled, refused"
    assert f"picture: {picture}" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not is_listening(address_in(done.stdout))
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_interrupted_leaves_no_process_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with subprocess.Popen(DEMO, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = address_in(process.stdout.readline())
        assert "gradients" in process.stdout.readline(), "the training has begun"

        process.send_signal(number)

        assert process.wait(60) == code
    assert not is_listening(address)
    assert list(tmp_path.iterdir()) == []
