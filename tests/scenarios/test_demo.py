"""The demo as a user runs it: real processes learn real digits, and none of them is left behind."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import sys
from pathlib import Path

import pytest

from support.processes import Process, run

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and sessions are POSIX")


def is_listening(address: str) -> bool:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_demo_learns_to_read_digits_and_draws_it(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"

    done = run("demo", "--workers", "2", "--out", picture.name, cwd=tmp_path, timeout=110)

    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"^test accuracy: (\d+\.\d)%$", done.stdout, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) >= 95
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    for worker in ("worker-0", "worker-1"):
        assert [worker, "2,000", "2,000", "0"] in [row[:4] for row in rows], "applied, settled, refused"
    assert f"picture: {picture}" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    address = re.search(r"broker at (tcp://\S+),", done.stdout)
    assert address is not None
    assert not is_listening(address[1])
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_interrupted_leaves_no_process_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with Process("demo", "--workers", "2", cwd=tmp_path) as process:
        address = process.wait_for_line(r"broker at (tcp://\S+),")[1]
        process.wait_for_line("gradients")  # the training has begun

        os.kill(process.pid, number)

        assert process.wait() == code
    assert not is_listening(address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody can end a process for one that was killed")
def test_a_demo_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    """A process of the demo's is started as the demo does it, in a program that then gets SIGKILL."""
    code = (
        "import pathlib, signal; from distgrad_worker.demo import _process\n"
        "ports = ('--control=127.0.0.1:0', '--gradients=127.0.0.1:0')\n"
        "with _process('broker', *ports, log=pathlib.Path('log')) as broker:\n"
        "    print('broker', broker.pid, flush=True)\n"
        "    signal.pause()"
    )
    with Process(cwd=tmp_path, program=(sys.executable, "-c", code)) as process:
        broker = os.pidfd_open(int(process.wait_for_line(r"broker (\d+)")[1]))
        try:
            process.kill()

            ended, _, _ = select.select([broker], [], [], 60)
        finally:
            os.close(broker)
    assert ended
