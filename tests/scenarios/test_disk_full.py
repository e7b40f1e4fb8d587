"""A data folder on a disk that is full for a while: nothing is settled, nothing is lost, it goes on by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from distgrad_worker import Worker
from support.broker_process import wait_until
from support.durable_broker import DurableBroker

WORKERS = 3
FLOATS = 1_000

PUSHER = f"""
import sys
import numpy as np
from distgrad_worker import Worker

control, seed = sys.argv[1], int(sys.argv[2])
with Worker(control, worker_id=f"worker-{{seed}}", timeout=60) as worker:
    worker.initialize({{"w": np.zeros({FLOATS}, np.float32)}})
    print("ready", flush=True)
    chance = np.random.default_rng(seed)
    total = np.zeros({FLOATS}, np.int64)
    pushed = 0
    while not (sys.stdin in __import__("select").select([sys.stdin], [], [], 0)[0]):
        gradient = chance.integers(-3, 4, {FLOATS})
        worker.push({{"w": gradient.astype(np.float32)}})
        total += gradient
        pushed += 1
    worker.flush(timeout=100)
    print("total", pushed, total.tobytes().hex(), flush=True)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    ) if sys.platform.startswith("linux") else None  # fmt: skip
    if made is None or made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr if made else sys.platform}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def pusher(address: str, place: int) -> subprocess.Popen[str]:
    """Start a worker that pushes until it is told to stop."""
    command = [sys.executable, "-c", PUSHER, address, str(place)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def fill_up(folder: Path) -> Path:
    """Take all the room that is left."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def limit_files(folder: Path, more: int) -> None:
    """Leave room for so many more files."""
    found = os.statvfs(folder)
    options = f"remount,size=48m,nr_inodes={found.f_files - found.f_ffree + more}"
    subprocess.run(["mount", "-o", options, str(folder)], check=True)


def run_while_full(folder: Path, seconds: float) -> None:
    with ExitStack() as stack:
        # Checkpoints let the journal be removed, so that the disk would do for ever.
        options = ("--segment-bytes", "1MiB", "--checkpoint-updates", "500", "--queue-bytes", "4MiB")
        broker = stack.enter_context(DurableBroker(folder / "data", *options))
        workers = [stack.enter_context(pusher(broker.address, place)) for place in range(WORKERS)]
        for worker in workers:
            stack.callback(worker.kill)  # or a test that fails would wait for them
        admin = stack.enter_context(broker.admin())
        broker.wait_for_version(200)

        # Again and again: what is removed by a checkpoint that was under way makes room once more.
        room = time.monotonic(), 0

        def is_full_for_good() -> bool:
            nonlocal room
            size = fill_up(folder).stat().st_size
            if size != room[1] or admin.status()["disk"]["trouble"] is None:
                room = time.monotonic(), size
            return time.monotonic() > room[0] + 0.6  # the journal tries again every quarter of a second

        wait_until(is_full_for_good)
        filler = fill_up(folder)
        trouble = str(admin.status()["disk"]["trouble"])
        settled = [worker["settled"] for worker in admin.workers()]
        threading.Event().wait(seconds)
        assert [worker["settled"] for worker in admin.workers()] == settled, "settled without a disk"
        filler.unlink()

        standing = admin.status()["version"]
        wait_until(lambda: admin.status()["disk"]["trouble"] is None and admin.status()["version"] > standing + 50)
        expected, pushed = np.zeros(FLOATS, np.int64), 0
        for worker in workers:
            printed, _ = worker.communicate("stop\n", timeout=100)
            assert worker.returncode == 0
            _, count, total = printed.splitlines()[-1].split()
            pushed += int(count)
            expected += np.frombuffer(bytes.fromhex(total), np.int64)
        assert "No space left" in trouble
        assert admin.status()["version"] == pushed
        np.testing.assert_array_equal(admin.get_model_parameters()["w"], -expected)
        broker.kill()
        broker.start()
        assert admin.status()["version"] == pushed
        np.testing.assert_array_equal(admin.get_model_parameters()["w"], -expected)


@pytest.mark.timeout(200)
def test_a_broker_that_is_started_on_a_full_disk_waits_for_room(small_disk: Path) -> None:
    with DurableBroker(small_disk / "data", "--segment-bytes", "1MiB") as broker:
        with Worker(broker.address, worker_id="w", timeout=60) as worker:
            worker.initialize({"w": np.zeros(FLOATS, np.float32)})
            worker.push({"w": np.ones(FLOATS, np.float32)})
            worker.flush()
            broker.kill()
            # Not its bytes: the start gives some back first, those that the last process had reserved.
            limit_files(small_disk, 0)

            broker.launch()
            broker.process.wait_for_line("the disk is full, the broker starts as soon as there is room")
            assert broker.process.returncode is None
            limit_files(small_disk, 1000)
            broker.wait_until_ready()

            worker.push({"w": np.ones(FLOATS, np.float32)})
            worker.flush(timeout=100)
        with broker.admin() as admin:
            np.testing.assert_array_equal(admin.get_model_parameters()["w"], np.full(FLOATS, -2, np.float32))
        broker.stop()


@pytest.mark.timeout(200)
def test_a_disk_that_is_full_for_a_moment_stops_settling_and_loses_nothing(small_disk: Path) -> None:
    run_while_full(small_disk, 1.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_disk_that_is_full_for_twenty_seconds_stops_settling_and_loses_nothing(small_disk: Path) -> None:
    run_while_full(small_disk, 20.0)
