"""A disk whose process is killed at one of its calls, and the program that a test runs on it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrad import Adam
from distgrad.durable.disk import File, OsDisk
from distgrad_broker import broker as broker_module
from distgrad_worker import Worker

BEFORE, MIDDLE, AFTER = "before", "middle", "after"


class KillingDisk(OsDisk):
    """Counts what changes the disk, and has this process killed at the call that was chosen.

    Parameters
    ----------
    at : int
        Which call, from 1; 0 for none.
    when : str
        Before it, after it, or (for a write) when half of the bytes are written.
    """

    def __init__(self, at: int, when: str) -> None:
        self.at = at
        self.when = when
        self.calls = 0

    def count(self, moment: str) -> None:
        """Take note of a call, or of its end."""
        self.calls += moment == BEFORE
        if self.calls == self.at and moment == self.when:
            os.kill(os.getpid(), signal.SIGKILL)

    def create(self, path: str) -> File:  # type: ignore[override]  # it is only written to
        self.count(BEFORE)
        file = super().create(path)
        self.count(AFTER)
        return KillingFile(self, file)

    def open(self, path: str) -> File:  # type: ignore[override]
        return KillingFile(self, super().open(path))

    def rename(self, source: str, target: str) -> None:
        self.count(BEFORE)
        super().rename(source, target)
        self.count(AFTER)

    def remove(self, path: str) -> None:
        self.count(BEFORE)
        super().remove(path)
        self.count(AFTER)

    def sync_folder(self, folder: str) -> None:
        self.count(BEFORE)
        super().sync_folder(folder)
        self.count(AFTER)


class KillingFile:
    """A file on such a disk."""

    def __init__(self, disk: KillingDisk, file: File) -> None:
        self._disk = disk
        self._file = file

    def write(self, offset: int, buffers: Sequence[Any]) -> int:
        self._disk.count(BEFORE)
        if self._disk.calls == self._disk.at and self._disk.when == MIDDLE:
            whole = b"".join(bytes(buffer) for buffer in buffers)
            self._file.write(offset, [whole[: len(whole) // 2]])
            self._disk.count(MIDDLE)
        written = self._file.write(offset, buffers)
        self._disk.count(AFTER)
        return written

    def allocate(self, size: int) -> None:
        self._disk.count(BEFORE)
        self._file.allocate(size)
        self._disk.count(AFTER)

    def truncate(self, size: int) -> None:
        self._disk.count(BEFORE)
        self._file.truncate(size)
        self._disk.count(AFTER)

    def sync(self) -> None:
        self._disk.count(BEFORE)
        self._file.sync()
        self._disk.count(AFTER)

    def close(self) -> None:
        self._file.close()


def main(folder: str, at: int, when: str, count: int) -> None:
    """Run a broker on such a disk, push, and print what is settled; at the end, how many calls there were."""
    disk = KillingDisk(at, when)
    # Shipped code has no place to put another disk in, and need not: here it is put in from outside.
    vars(broker_module)["OsDisk"] = lambda: disk
    with (
        broker_module.Broker(
            optimizer=Adam(lr=0.01), data=folder, segment_bytes=4096, checkpoint_updates=5, policy="async"
        ) as broker,
        Worker(broker.address, worker_id="w", timeout=60) as worker,
    ):
        snapshot = worker.initialize({"w": np.zeros(20), "b": np.zeros(3, np.float32)})
        first = 0 if worker.cursor is None else int(worker.cursor) + 1
        for step in range(first, count):
            chance = np.random.default_rng(step)
            worker.push({"w": chance.normal(size=20), "b": chance.normal(size=3).astype(np.float32)}, cursor=str(step))
            if step % 3 == 2:
                worker.flush()
                print("settled", worker.settled, flush=True)
        worker.flush()
        snapshot = worker.pull()
        print("settled", worker.settled, flush=True)
        print("bytes", snapshot.parameters["w"].tobytes().hex(), snapshot.parameters["b"].tobytes().hex(), flush=True)
    print("calls", disk.calls, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
