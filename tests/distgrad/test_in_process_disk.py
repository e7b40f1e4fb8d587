"""The in-process class on disks that are slow, fill up, fail, or forget what was not synced."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import pytest

from distgrad import SGD, DistributedGradients
from distgrad.durable.disk_writer import DiskWriter
from distgrad.errors import CheckpointError, Destroyed, QueueFull
from support.gates import WAIT_S, Gate, Running
from support.sim_disk import SimDisk

FOLDER = "data"


class SharedDisk(SimDisk):
    """A `SimDisk` that a test may let crash while the file thread uses it."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._one_at_a_time = threading.RLock()

    def crash(self, random: Random, *, machine: bool = True) -> SimDisk:
        with self._one_at_a_time:
            return super().crash(random, machine=machine)

    def _change(self, name: str, whole: Callable[[], None], **more: Any) -> None:
        with self._one_at_a_time:
            super()._change(name, whole, **more)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimDisk], None]:
    """Put a disk in the place of this machine's."""
    return lambda disk: monkeypatch.setattr("distgrad.local_keeper.OsDisk", lambda: disk)


def opened(**more: Any) -> DistributedGradients:
    shared = DistributedGradients(data=FOLDER, **more)
    if shared.get_model_parameters() is None:
        shared.set_model_parameters(np.zeros(4))
    shared.start()
    return shared


def test_a_full_disk_is_told_and_goes_on_by_itself(
    use: Callable[[SimDisk], None], caplog: pytest.LogCaptureFixture
) -> None:
    disk = SharedDisk(capacity=20_000)
    use(disk)
    n_added = 0

    def add_until_it_is_full() -> None:
        nonlocal n_added
        while True:
            shared.add_gradients(np.ones(4), timeout=0.6, cursor=str(n_added))
            n_added += 1

    with opened(max_queue=8) as shared:
        with pytest.raises(QueueFull, match=r"8 gradients are not on the disk \(No space left on device"):
            add_until_it_is_full()
        with pytest.raises(TimeoutError, match="not on the disk yet: No space left on device"):
            shared.flush(0.05)
        assert str(shared.disk_trouble).startswith("No space left on device")
        assert n_added > 20
        assert (shared.version, shared.cursor) == (n_added, str(n_added - 9))
        assert 0 < shared.settled <= n_added - 8, "that they were applied may not be on the disk"

        disk.capacity = None
        shared.flush(WAIT_S)

        assert shared.disk_trouble is None
        assert (shared.settled, shared.cursor) == (n_added, str(n_added - 1))
    said = [record.getMessage().partition(" reason")[0] for record in caplog.records]
    assert said == ["journal cannot be written", "journal can be written again"]
    with opened() as again:
        assert (again.version, again.get_model_parameters()[0]) == (n_added, -n_added)


def test_a_sync_that_fails_is_made_up_for(use: Callable[[SimDisk], None]) -> None:
    disk = SharedDisk(3)
    use(disk)
    with opened() as shared:
        for number in range(1, 6):
            disk.fail_next("sync", errno.EIO)
            shared.add_gradients(np.ones(4))
            shared.flush(WAIT_S)
            assert shared.settled == number
        use(disk.crash(Random(1)))
        with opened() as again:
            assert (again.version, again.settled, again.get_model_parameters()[0]) == (5, 5, -5)


def test_what_the_disk_never_takes_is_told_by_destroy(use: Callable[[SimDisk], None]) -> None:
    disk = SharedDisk()
    use(disk)
    shared = opened()
    shared.add_gradients(np.ones(4))
    shared.flush(WAIT_S)
    disk.fail_next("write", errno.ENOSPC, times=10**6)
    shared.add_gradients(np.ones(4))
    waiting = Running(shared.flush)
    with suppress(TimeoutError):
        shared.flush(0.3)

    with pytest.raises(CheckpointError, match=r"what came after gradient 1 is lost.*No space left"):
        shared.destroy()

    with pytest.raises(Destroyed):
        waiting.result()
    disk.mend()
    with opened() as again:
        assert (again.version, again.settled, again.get_model_parameters()[0]) == (1, 1, -1)


def test_adding_and_applying_do_not_wait_for_the_disk(
    use: Callable[[SimDisk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(SharedDisk())
    with opened(max_queue=5) as shared:
        shared.flush(WAIT_S)
        gate = Gate(DiskWriter.step)
        monkeypatch.setattr(DiskWriter, "step", lambda *args: gate(*args))
        for number in range(5):
            shared.add_gradients(np.ones(4), cursor=str(number))
        shared._queue.join(WAIT_S)  # as flush, but without the disk
        assert (shared.version, shared.settled, shared.cursor) == (5, 0, None)
        with pytest.raises(QueueFull, match="5 gradients are not on the disk"):
            shared.add_gradients(np.ones(4), block=False)
        more = Running(lambda: shared.add_gradients(np.ones(4)))

        gate.open()

        assert more.result() == 6
        shared.flush(WAIT_S)
        assert shared.settled == 6


def test_the_disk_makes_room_while_the_updater_is_stopped(
    use: Callable[[SimDisk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(SharedDisk())
    with opened(max_queue=2) as shared:
        shared.flush(WAIT_S)
        gate = Gate(DiskWriter.step)
        monkeypatch.setattr(DiskWriter, "step", lambda *args: gate(*args))
        shared.add_gradients(np.ones(4))
        shared.add_gradients(np.ones(4))
        shared.stop()
        more = Running(lambda: shared.add_gradients(np.ones(4)))
        gate.open()
        assert more.result() == 3


def test_a_checkpoint_that_fails_costs_nothing(
    use: Callable[[SimDisk], None], caplog: pytest.LogCaptureFixture
) -> None:
    disk = SharedDisk()
    use(disk)
    shared = opened()
    shared.add_gradients(np.ones(4))
    disk.fail_next("rename", errno.EIO)
    with caplog.at_level(logging.ERROR):
        shared.destroy()
    assert "checkpoint failed" in caplog.text
    assert not [path for path in disk.paths() if "checkpoint" in path]
    with opened() as again:
        again.flush(WAIT_S)
        assert again.get_model_parameters()[0] == -1


def test_a_bug_in_the_file_thread_is_told_to_whoever_waits(
    use: Callable[[SimDisk], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: DiskWriter, now: float) -> Any:
        raise ZeroDivisionError("a bug")

    use(SharedDisk())
    shared = opened(max_queue=1)
    shared.flush(WAIT_S)
    monkeypatch.setattr(DiskWriter, "step", broken)
    shared.add_gradients(np.ones(4))
    with pytest.raises(CheckpointError, match=r"the file thread failed: .*a bug"):
        shared.flush(WAIT_S)
    with pytest.raises(CheckpointError, match="the file thread failed"):
        shared.add_gradients(np.ones(4), timeout=WAIT_S)
    with pytest.raises(CheckpointError, match="the file thread failed"):
        shared.destroy()
    assert "the file thread failed" in caplog.text


@pytest.mark.parametrize("machine", [False, True], ids=["process", "machine"])
def test_after_a_crash_at_any_moment_everything_settled_is_there_and_counts_once(
    use: Callable[[SimDisk], None], monkeypatch: pytest.MonkeyPatch, machine: bool
) -> None:
    monkeypatch.setattr("distgrad.local_journal.CHECKPOINT_S", 0.05)
    random = Random(machine)
    disk: SimDisk = SharedDisk(1)
    n_batches = 0
    for _ in range(25):
        use(disk)
        shared = opened(optimizer=SGD(lr=1.0, momentum=0.5), max_queue=8)
        begin = 0 if shared.cursor is None else int(str(shared.cursor)) + 1
        assert begin >= n_batches, "what was told to be on the disk is lost"
        after: SimDisk | None = None
        crash_at = begin + random.randrange(40)
        for batch in range(begin, begin + 40):
            shared.add_gradients(np.full(4, float(batch % 5)), cursor=str(batch))
            if random.random() < 0.1:
                shared.flush(WAIT_S)
            if batch == crash_at:
                n_batches = 0 if shared.cursor is None else int(str(shared.cursor)) + 1
                settled = shared.settled
                after = disk.crash(random, machine=machine)
        assert after is not None
        shared.destroy()
        disk = _shared(after)
        use(disk)
        with DistributedGradients(optimizer=SGD(lr=1.0, momentum=0.5), data=FOLDER) as again:
            assert again.settled >= settled
            last = again.settled + again.queued
            assert last >= n_batches
            assert again.cursor == (str(last - 1) if last else None), "each batch has one number"
            if again.get_model_parameters() is not None:
                again.start()
                again.flush(WAIT_S)
                assert again.version == last
                assert again.get_model_parameters().tolist() == expected(last)
            n_batches = last


def expected(n_batches: int) -> list[float]:
    parameter = step = 0.0
    for batch in range(n_batches):
        step = 0.5 * step + batch % 5
        parameter -= step
    return [parameter] * 4


def _shared(disk: SimDisk) -> SharedDisk:
    made = SharedDisk()
    made.__dict__.update(disk.__dict__)
    made.__dict__["_one_at_a_time"] = threading.RLock()
    return made
