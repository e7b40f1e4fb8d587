"""Strangers open connections until a broker may have no more: its files do not suffer, and nor do those it knows."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from distgrad.errors import DistgradError
from distgrad.keys import Role, revoke_client
from distgrad_worker import Worker
from support.gates import WAIT_S
from support.key_folders import make_key_folder
from support.processes import Process

if not Path("/proc/self/fd").exists():
    pytest.skip("descriptors are counted in /proc", allow_module_level=True)

CROWDED = (
    "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (50, 100)); "
    "os.execv(sys.executable, [sys.executable, '-m', 'distgrad', *sys.argv[1:]])"
)
ONES = {"w": np.ones(5_000, np.float32)}


@contextmanager
def strangers(ports: list[int], count: int) -> Iterator[None]:
    """Keep so many connections open, or asked for, that never say a word."""
    is_over = threading.Event()
    sockets: list[socket.socket] = []

    def connect(port: int) -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        made.connect_ex(("127.0.0.1", port))
        return made

    def press() -> None:
        while not is_over.wait(0.01):
            for place, known in enumerate(sockets):
                with suppress(BlockingIOError):
                    try:
                        is_closed = not known.recv(1000)
                    except ConnectionError:
                        is_closed = True
                    if is_closed:
                        known.close()
                        sockets[place] = connect(ports[place % 2])

    sockets += [connect(ports[place % 2]) for place in range(count)]
    pressing = threading.Thread(target=press, daemon=True)
    pressing.start()
    try:
        yield
    finally:
        is_over.set()
        pressing.join()
        for known in sockets:
            known.close()


def test_a_broker_whose_connections_are_all_taken_settles_and_reads_its_keys(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    ends = ("--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0")
    # A segment holds thirteen gradients: now and then there is a file to open.
    options = ("--keys", keys.folder, "--data", tmp_path / "data", "--segment-bytes", "256KiB")
    with Process("broker", *ends, *options, program=(sys.executable, "-c", CROWDED)) as broker:
        line = broker.wait_for_line(r"^distgrad broker control=(\S+) gradients=(\S+)")
        ports = [int(address.rpartition(":")[2]) for address in line.groups()]
        worker = Worker(line[1], keys=keys.worker, timeout=WAIT_S)
        try:
            worker.initialize({"w": np.zeros(5_000, np.float32)})
            worker.push(ONES)
            worker.flush(WAIT_S)
            with strangers(ports, 300):
                limit = int(Path(f"/proc/{broker.pid}/limits").read_text().split("Max open files")[1].split()[0])
                while len(os.listdir(f"/proc/{broker.pid}/fd")) < limit:
                    pass
                for _ in range(40):
                    worker.push(ONES)
                worker.flush(WAIT_S)
                assert worker.settled == 41

                revoke_client(keys.folder, Role.WORKER)
                broker.wait_for_line("key revoked")
        finally:
            with suppress(DistgradError, TimeoutError):
                worker.close(timeout=0)
