"""The disk is waited for on another thread: what is told, kept and tried again while more is written."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import OsDisk
from distgrad.durable.disk_events import DiskTroubled, RecordsWritten
from distgrad.durable.disk_writer import PIECE_BYTES, RETRY_S, DiskWriter
from distgrad.durable.journal import resume
from distgrad.durable.journal_reader import read
from distgrad.durable.records import Record
from distgrad_broker.files import FileThread
from support.gates import WAIT_S
from support.journals import after_crash
from support.sim_disk import SimDisk

FOLDER = "data"


class Sync(Future[None]):
    """A sync that is done when the test says so, or somebody waits for it."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()
        self._call: Callable[[], None] | None = call

    def go(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            try:
                call()
            except OSError as error:
                self.set_exception(error)
            else:
                self.set_result(None)

    def result(self, timeout: float | None = None) -> None:
        self.go()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.go()
        return super().exception(timeout)


class Desk:
    """A writer whose syncs take as long as the test likes."""

    def __init__(self, *, segment_bytes: int = 2048, **settings: Any) -> None:
        self.disk = SimDisk()
        folder = DataFolder(self.disk, FOLDER)
        journal = resume(self.disk, FOLDER, next_sequence=1, segment_bytes=segment_bytes, salt=3)
        self.writer = DiskWriter(self.disk, folder, journal, **settings)
        self.writer.sync_beside(self.submit)
        self.syncs: list[Sync] = []
        self.now = 100.0
        self.given = self.told = 0
        self.troubles: list[str | None] = []

    def submit(self, call: Callable[[], None]) -> Sync:
        self.syncs.append(Sync(call))
        return self.syncs[-1]

    def record(self, count: int, size: int = 50) -> None:
        self.given += count
        self.writer.records([Record(b"\x92", [bytes(size)]) for _ in range(count)])

    def take(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, RecordsWritten):
                assert event.sequence > self.told
                self.told = event.sequence
            elif isinstance(event, DiskTroubled):
                self.troubles.append(event.reason)

    def step(self) -> None:
        self.take(self.writer.step(self.now))
        assert self.told <= len(self.outlive())

    def outlive(self) -> list[int]:
        """Give what a crash of the machine leaves, at least."""
        found = [record.sequence for record in read(after_crash(self.disk), FOLDER, 1)]
        assert found == list(range(1, len(found) + 1))
        return found


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("record"), st.integers(1, 30)),
        st.tuples(st.just("step"), st.just(0)),
        st.tuples(st.just("go"), st.just(0)),
        st.tuples(st.sampled_from(["fail sync", "fail write", "fail sync_folder"]), st.integers(1, 3)),
        st.tuples(st.just("later"), st.just(0)),
    ),
    max_size=40,
)


@given(actions=ACTIONS, sync_s=st.sampled_from([0.0, 0.1]))
def test_what_is_told_outlives_the_machine_and_everything_is_told_in_the_end(
    actions: list[tuple[str, int]], sync_s: float
) -> None:
    desk = Desk(sync_s=sync_s)
    for action, number in actions:
        if action == "record":
            desk.record(number)
        elif action == "step":
            desk.step()
        elif action == "go" and desk.syncs:
            desk.syncs[-1].go()
        elif action == "later":
            desk.now += RETRY_S
        elif action.startswith("fail"):
            desk.disk.fail_next(action.split()[1], errno.EIO, times=number)

    for _ in range(100):
        desk.now += RETRY_S
        desk.step()
        for sync in desk.syncs:
            sync.go()
    assert desk.told == desk.given
    assert not desk.troubles or desk.troubles[-1] is None


def test_more_is_written_while_the_disk_is_waited_for() -> None:
    desk = Desk()
    desk.record(3)
    desk.step()
    assert (len(desk.syncs), desk.told) == (1, 0)
    desk.record(4)
    assert desk.writer.wait_s(desk.now) == 0.0
    writes = desk.disk.calls.count("write")

    desk.step()

    assert (len(desk.syncs), desk.told, desk.disk.calls.count("write")) == (1, 0, writes + 1)
    assert desk.writer.wait_s(desk.now) is None  # until the sync has ended
    desk.syncs[0].go()
    desk.step()
    assert (len(desk.syncs), desk.told) == (2, 3)
    desk.syncs[1].go()
    desk.step()
    assert desk.told == 7


def test_no_more_than_a_piece_is_written_ahead() -> None:
    desk = Desk(segment_bytes=4 * PIECE_BYTES)
    desk.record(1)
    desk.step()
    desk.record(3, PIECE_BYTES // 2 + 1000)

    desk.step()
    assert desk.writer.wait_s(desk.now) is None
    desk.step()

    assert len(desk.writer._waiting) == 1


def test_the_end_waits_for_the_disk_and_then_for_the_rest() -> None:
    desk = Desk()
    desk.record(3)
    desk.step()
    desk.record(4)

    desk.take(desk.writer.finish(desk.now))

    assert desk.told == 7
    desk.writer.close()


def test_closing_waits_for_whoever_uses_the_file() -> None:
    desk = Desk()
    desk.record(3)
    desk.step()

    desk.writer.close()

    assert desk.syncs[0].done()


@pytest.mark.parametrize("count", [1, 300])
def test_a_real_thread_waits_for_a_real_disk(tmp_path: Path, count: int) -> None:
    disk, folder = OsDisk(), str(tmp_path / "data")
    data = DataFolder(disk, folder)
    journal = resume(disk, folder, next_sequence=1, segment_bytes=1 << 16)
    is_told, told = threading.Event(), []

    def hear(event: Any) -> None:
        told.append(event)
        if isinstance(event, RecordsWritten) and event.sequence == count:
            is_told.set()

    writer = DiskWriter(disk, data, journal)
    files = FileThread(None, hear, writer)
    for _ in range(count):
        files.write([Record(b"\x92", [bytes(1000)])])
    assert is_told.wait(WAIT_S)
    files.close()
    writer.close()

    assert [record.sequence for record in read(disk, folder, 1)] == list(range(1, count + 1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("distgrad-sync")]
