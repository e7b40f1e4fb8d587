"""Whatever stops a journal, and however often: what is read is what was appended, and has all that was promised."""

from __future__ import annotations

import errno
from contextlib import suppress
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad.durable.journal import Journal, resume
from distgrad.durable.journal_reader import Place, cut, read, segments
from support.sim_disk import Crash, SimDisk, Stage

FOLDER = "data"
SEGMENT_BYTES = 1024
Record = tuple[bytes, bytes]


class Life:
    """One journal through the lives of many processes, and what its readers rely on.

    Attributes
    ----------
    history : dict of int to Record
        What was appended, by its sequence; forgotten where a process went on without it.
    next_sequence : int
        What comes after the last record, as the present process knows it.
    promised : int
        Up to here records were reported durable.
    written : int
        Up to here they outlive the process, if no sync fails.
    needed : int
        What is before was given up.
    """

    def __init__(self, seed: int, *, capacity: int | None = None) -> None:
        self.random = Random(seed)
        self.disk = SimDisk(seed, capacity=capacity)
        self.disk.make_folder(FOLDER)
        self.history: dict[int, Record] = {}
        self.promised = self.written = 0
        self.needed = self.next_sequence = 1
        self.lives = 0

    def go_on(self, segment_bytes: int) -> Journal:
        self.lives += 1
        journal = resume(
            self.disk, FOLDER, next_sequence=self.next_sequence, segment_bytes=segment_bytes, salt=self.lives
        )
        assert journal.next_sequence == self.next_sequence
        assert journal.durable == self.next_sequence - 1
        assert journal.unsynced_bytes == 0
        self.promised = self.written = journal.durable
        # What was not found has no second chance, now that others may come in its place.
        self.history = {sequence: record for sequence, record in self.history.items() if sequence < self.next_sequence}
        return journal

    def append(self, journal: Journal, count: int, largest: int) -> None:
        for _ in range(count):
            parts = [self.random.randbytes(self.random.randrange(largest + 1)) for _ in range(self.random.randrange(3))]
            header = b"life %d" % self.lives
            sequence = journal.append(header, parts)
            assert sequence == self.next_sequence
            self.history[sequence] = (header, b"".join(parts))
            self.next_sequence += 1

    def write(self, journal: Journal) -> None:
        try:
            journal.write()
            self.written = journal.next_sequence - 1
        finally:
            self.promised = journal.durable

    def sync(self, journal: Journal) -> None:
        try:
            assert journal.sync() == journal.durable
            assert journal.durable == journal.next_sequence - 1
            assert journal.unsynced_bytes == 0
            self.written = journal.durable
        finally:
            self.promised = journal.durable

    def crash(self, *, machine: bool, keeps_written: bool = False) -> None:
        """Stop, and read what is there."""
        self.disk = self.disk.crash(self.random, machine=machine)
        reading = read(self.disk, FOLDER, self.needed)
        found = {record.sequence: (record.header.tobytes(), record.payload.tobytes()) for record in reading}

        assert list(found) == list(range(self.needed, reading.next_sequence))
        assert reading.next_sequence > self.promised
        if keeps_written and not machine:
            assert reading.next_sequence > self.written
        assert all(self.history[sequence] == record for sequence, record in found.items())
        self.next_sequence = reading.next_sequence


def script(life: Life, journal: Journal) -> None:
    """Do a bit of everything: fill segments, write without a sync, a large record, remove the oldest."""
    for _ in range(3):
        life.append(journal, 3, 700)
        life.sync(journal)
        life.append(journal, 4, 700)
        life.write(journal)
    life.append(journal, 2, 3000)
    life.sync(journal)
    life.needed = journal.durable - 2
    journal.remove_before(life.needed)
    life.append(journal, 2, 100)
    life.write(journal)


def length_of_script(seed: int) -> int:
    life = Life(seed)
    script(life, life.go_on(SEGMENT_BYTES))
    return len(life.disk.calls)


@pytest.mark.parametrize("machine", [False, True], ids=["process", "machine"])
@pytest.mark.parametrize("stage", Stage)
def test_a_crash_at_any_call_loses_nothing_that_was_promised(stage: Stage, machine: bool) -> None:
    for seed in range(2):
        calls = length_of_script(seed)
        assert calls > 30
        for call in range(1, calls + 1):
            life = Life(seed)
            life.disk.crash_at(call, stage)
            with pytest.raises(Crash):
                script(life, life.go_on(SEGMENT_BYTES))
            life.crash(machine=machine, keeps_written=True)

            # And the next process goes on from there, through a crash of its own.
            life.disk.crash_at(1 + call % 7, stage)
            with pytest.raises(Crash):
                script(life, life.go_on(SEGMENT_BYTES))
            life.crash(machine=machine, keeps_written=True)
            script(life, life.go_on(SEGMENT_BYTES))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("stage", Stage)
def test_an_error_at_any_call_loses_nothing_and_is_tried_again(stage: Stage, code: int) -> None:
    for call in range(1, length_of_script(0) + 1):
        life = Life(0)
        journal = life.go_on(SEGMENT_BYTES)
        life.disk.fail_at(call, code, stage)
        for _ in range(2):  # reserving and trimming need not succeed, all else is raised and done by the second try
            with suppress(OSError):
                script(life, journal)
        life.sync(journal)
        life.crash(machine=True)
        assert life.next_sequence == journal.next_sequence


@settings(max_examples=250, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), capacity=st.sampled_from([None, None, 4000, 40_000]))
def test_any_run_of_crashes_and_errors_keeps_what_was_promised(seed: int, capacity: int | None) -> None:
    run_randomly(seed, capacity)


def run_randomly(seed: int, capacity: int | None) -> None:
    life = Life(seed, capacity=capacity)
    random = life.random
    for _ in range(random.randint(1, 6)):
        if random.random() < 0.8:
            life.disk.crash_at(random.randint(1, 40), random.choice(list(Stage)))
        for _ in range(random.choice([0, 0, 1, 3])):
            life.disk.fail_at(
                random.randint(1, 40), random.choice([errno.EIO, errno.ENOSPC]), random.choice(list(Stage))
            )
        with suppress(Crash, OSError):
            live(life)
        life.disk.mend()
        life.crash(machine=random.random() < 0.5)
        if random.random() < 0.1:
            end(life)
    life.disk.capacity = None
    journal = life.go_on(2048)
    life.append(journal, 3, 100)
    life.sync(journal)
    last = life.next_sequence
    life.crash(machine=True)
    assert life.next_sequence == last


def live(life: Life) -> None:
    random = life.random
    journal = life.go_on(random.choice([64, 500, 2000, 10_000]))
    for _ in range(random.randint(1, 12)):
        life.append(journal, random.randrange(4), random.choice([0, 20, 600, 3000]))
        try:
            if random.random() < 0.5:
                life.sync(journal)
            else:
                life.write(journal)
            if random.random() < 0.2 and journal.durable >= life.needed:
                life.needed = random.randint(life.needed, journal.durable + 1)
                journal.remove_before(life.needed)
        except OSError:
            if random.random() < 0.3:
                life.disk.capacity = None
    if random.random() < 0.3:
        journal.close()


def end(life: Life) -> None:
    """Give up the last records, as is done to go back to an earlier version."""
    records = list(read(life.disk, FOLDER, life.needed))
    if not records:
        return
    record = life.random.choice(records)
    cut(life.disk, Place(record.path, record.offset))
    life.disk.capacity = None
    life.next_sequence = record.sequence
    life.promised = life.written = min(life.promised, record.sequence - 1)
    life.go_on(2048)
    life.crash(machine=True)
    assert life.next_sequence == record.sequence


def test_many_failed_syncs_leave_no_files_behind() -> None:
    life = Life(1)
    journal = life.go_on(2048)
    life.append(journal, 3, 300)
    life.sync(journal)
    life.append(journal, 2, 300)
    life.disk.fail_next("sync", errno.EIO, times=20)

    for _ in range(20):
        with pytest.raises(OSError, match="Input/output error"):
            life.sync(journal)
    life.sync(journal)

    assert len(segments(life.disk, FOLDER)) == 2
    life.crash(machine=True)
    assert life.next_sequence == 6
