"""Going on where a process stopped: which checkpoint is taken, what is read behind it, what cannot be used."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest

from distgrad.durable import recovery
from distgrad.durable.books import Books, MemberBook, Recovered
from distgrad.durable.checkpoint_file import CheckpointWriter
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.checkpoint_state import pack_state
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.journal import resume
from distgrad.durable.journal_reader import read
from distgrad.durable.recovery import recover
from distgrad.errors import CheckpointError, DataDamaged
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.rules import Adam
from support.player import LAYOUT, Player, payload_of
from support.sim_disk import SimDisk

FOLDER = "data"


class Life:
    """A data folder, and a process that writes to it what it carries out."""

    def __init__(self) -> None:
        self.disk = SimDisk()
        self.folder = DataFolder(self.disk, FOLDER)
        self.journal = resume(self.disk, FOLDER, next_sequence=1, segment_bytes=4096, salt=3)
        self.player = Player(rule=Adam(lr=0.5), layout=None, journal=self.journal)
        self.player.began("one")
        rule = ["adam", Adam(lr=0.5).settings()]
        self.player.record("configured", mode="descent", rule=rule, policy=["async", {}], weighing={})
        set_keys = {"layout": LAYOUT.to_frame(), "generation": 0, "version": 0}
        self.player.record("set", payload_of(LAYOUT, 1.0, trained_only=False), **set_keys)
        self.player.session()

    def push(self, *numbers: int) -> None:
        """Accept gradients and apply each."""
        for number in numbers:
            self.player.gradient(number, value=float(number), cursor=f"c{number}")
            self.player.apply(("w", number))
        self.journal.sync()

    def checkpoint(self, first_needed: int | None = None) -> str:
        """Write a checkpoint of what there is."""
        holder, sequence = self.player.holder, self.player.sequence
        content = pack_state(holder, self.player.books, first_needed or sequence + 1)
        arenas = [] if holder.storage is None else [arena.copy() for arena in holder.storage.arenas]
        slots = {slot: [array.copy() for array in arrays] for slot, arrays in holder.state.items()}
        path = self.folder.checkpoint_path(sequence, holder.version)
        writer = CheckpointWriter(
            self.disk, path, Checkpoint(sequence, holder.version, content, holder.layout, arenas, slots)
        )
        while not writer.step():
            pass
        return path

    def recover(self, *, until: int | None = None, **keys: Any) -> tuple[ParameterHolder, Recovered]:
        holder = ParameterHolder(rule=Adam(lr=0.5), executor="numpy")
        return holder, recover(self.disk, self.folder, holder, until=until, **keys)

    def damage(self, path: str) -> None:
        self.disk.flip(path, self.disk.size(path) - 1)


def offset_of(life: Life, sequence: int) -> int:
    return next(record.offset for record in read(life.disk, FOLDER, 1) if record.sequence == sequence)


@pytest.fixture
def life() -> Life:
    return Life()


def bits(holder: ParameterHolder) -> list[bytes]:
    assert holder.storage is not None
    state = [array for arrays in holder.state.values() for array in arrays]
    return [array.tobytes() for array in [*holder.storage.arenas, *state]]


def test_an_empty_folder_is_a_new_beginning() -> None:
    disk = SimDisk()
    holder = ParameterHolder(executor="numpy")

    found = recover(disk, DataFolder(disk, FOLDER), holder)

    assert (found.books.incarnation, found.pending, found.sequence, found.records) == ("", {}, 0, 0)
    assert (found.checkpoint, found.has_parameters, holder.layout) == (None, False, None)


def test_the_journal_alone_is_carried_out_from_its_first_record(life: Life) -> None:
    life.push(1, 2, 3)

    holder, found = life.recover()

    assert (holder.version, found.sequence, found.records) == (3, 10, 10)
    assert bits(holder) == bits(life.player.holder)
    assert found.books.members["w"].decided_cursor == "c3"
    assert (found.has_parameters, set(found.executors)) == (True, {"numpy"})


def test_a_checkpoint_spares_what_it_covers_and_gives_the_same_bits(life: Life) -> None:
    life.push(1, 2, 3)
    life.checkpoint()
    life.push(4, 5)

    holder, found = life.recover()

    assert (found.checkpoint, found.records, found.sequence) == ((10, 3), 4, 14)
    assert (holder.version, holder.steps) == (5, 5)
    assert bits(holder) == bits(life.player.holder)
    assert (found.books.members["w"].decided, found.books.incarnation) == (5, "one")


def test_a_checkpoint_that_the_journal_does_not_reach_is_enough(life: Life) -> None:
    life.push(1)
    life.checkpoint()
    life.journal.close()
    for path in life.disk.paths():
        if "journal" in path:
            life.disk.remove(path)

    holder, found = life.recover()

    assert (holder.version, found.sequence, found.records) == (1, 6, 0)
    assert bits(holder) == bits(life.player.holder)


def test_gradients_that_were_accepted_and_not_decided_come_back_in_order_with_the_places_of_their_records(
    life: Life,
) -> None:
    life.push(1)
    life.player.session("v")
    for worker, number in (("w", 2), ("v", 1), ("w", 3)):
        life.player.gradient(number, worker)
    life.player.apply(("v", 1))
    life.journal.sync()

    holder, found = life.recover()

    assert list(found.pending) == [("w", 2), ("w", 3)]
    assert [gradient.sequence for gradient in found.pending.values()] == [8, 10]
    assert (found.books.members["w"].accepted, found.books.members["w"].decided) == (3, 1)
    for gradient in found.pending.values():
        assert [type(part) for part in gradient.parts] == [bytes, bytes], "of their own, not views of a segment"
        assert [len(part) for part in gradient.parts] == [8, 24]
    assert holder.version == 2


def test_gradients_from_before_a_checkpoint_that_it_left_undecided_come_back_too(life: Life) -> None:
    life.push(1)
    life.player.gradient(2, cursor="c2")
    first_needed = life.player.sequence
    life.player.gradient(3, cursor="c3")
    life.player.decided([1, "w", 3])
    life.checkpoint(first_needed)
    life.push(4)

    _, found = life.recover()

    assert list(found.pending) == [("w", 2)]
    assert found.books.members["w"].ahead.keys() == {3, 4}
    assert found.records == 2, "only what is behind the checkpoint was carried out"


def test_the_newest_checkpoint_damaged_means_the_one_before_it_and_more_of_the_journal(life: Life) -> None:
    life.push(1)
    life.checkpoint()
    life.push(2)
    newest = life.checkpoint()
    life.push(3)
    life.damage(newest)

    holder, found = life.recover()

    assert found.checkpoint == (6, 1)
    ((path, why),) = found.damaged
    assert (path, isinstance(why, DataDamaged)) == (newest, True)
    assert holder.version == 3
    assert bits(holder) == bits(life.player.holder)


def test_with_all_checkpoints_damaged_a_journal_from_the_beginning_is_enough(life: Life) -> None:
    life.push(1)
    life.damage(life.checkpoint())
    life.push(2)

    holder, found = life.recover()

    assert (found.checkpoint, len(found.damaged), holder.version) == (None, 1, 2)
    assert bits(holder) == bits(life.player.holder)


def test_with_all_checkpoints_damaged_and_the_journals_beginning_gone_nothing_is_made_up(life: Life) -> None:
    life.push(*range(1, 60))
    life.journal.remove_before(life.player.sequence)
    life.damage(life.checkpoint())

    with pytest.raises(DataDamaged, match="record 1 is needed, but the journal begins with"):
        life.recover()


@pytest.mark.parametrize("until", [1, 2, 3])
def test_it_stops_at_the_version_that_is_asked_for(life: Life, until: int) -> None:
    wanted = []
    for number in (1, 2, 3, 4):
        life.push(number)
        wanted.append(bits(life.player.holder))
        if number == 3:
            life.checkpoint()

    holder, found = life.recover(until=until)

    assert (holder.version, found.checkpoint) == (until, (10, 3) if until == 3 else None)
    assert bits(holder) == wanted[until - 1]


def test_a_version_within_one_record_can_be_asked_for(life: Life) -> None:
    for number in (1, 2, 3):
        life.player.gradient(number)
    life.player.decided(*([0, [("w", number)], None] for number in (1, 2, 3)))
    life.journal.sync()

    holder, found = life.recover(until=2)

    assert (holder.version, found.books.members["w"].decided) == (2, 2)


def test_damage_before_the_journals_end_names_file_offset_and_both_choices(life: Life) -> None:
    life.push(1)
    life.push(2)
    life.push(3)  # whose records say that those of 2 were on the disk
    (journal,) = [path for path in life.disk.paths() if "journal" in path]
    offset = offset_of(life, 7)
    life.disk.flip(journal, offset + 60)

    with pytest.raises(DataDamaged) as caught:
        life.recover()

    damage = caught.value
    assert (damage.path, damage.offset) == (journal, offset)
    assert f"record 7 is damaged or missing in {journal} at byte {offset}" in str(damage)
    assert damage.hint is not None
    assert "--recover-until 1 " in damage.hint
    assert "older checkpoint" in damage.hint
    holder, _ = life.recover(until=1)
    assert holder.version == 1


@pytest.mark.parametrize("damaged", [5, 9])
def test_damage_before_a_checkpoint_is_passed_over_and_named(life: Life, damaged: int) -> None:
    life.push(1, 2)
    life.push(3)
    life.checkpoint()
    life.push(4, 5)
    (journal,) = [path for path in life.disk.paths() if "journal" in path]
    offset = offset_of(life, damaged)
    life.disk.flip(journal, offset + 60)

    holder, found = life.recover()

    assert (holder.version, found.records, found.skipped) == (5, 4, [(journal, offset)])
    assert bits(holder) == bits(life.player.holder)


def test_damage_behind_a_checkpoint_stops_although_there_is_more_before_it(life: Life) -> None:
    life.push(1, 2)
    life.checkpoint()
    life.push(3)
    life.push(4)
    (journal,) = [path for path in life.disk.paths() if "journal" in path]
    for sequence in (9, 5):
        life.disk.flip(journal, offset_of(life, sequence) + 60)

    with pytest.raises(DataDamaged, match="record 9 is damaged or missing"):
        life.recover()


def test_a_torn_end_is_no_damage(life: Life) -> None:
    life.push(1, 2)
    (journal,) = [path for path in life.disk.paths() if "journal" in path]
    life.disk.flip(journal, offset_of(life, 8) + 60)

    holder, found = life.recover()

    assert (holder.version, found.sequence) == (1, 7)
    assert list(found.pending) == [("w", 2)]


def _unknown_kind(life: Life) -> None:
    life.journal.append(b"\x92\xa7unheard\x80", [])


def _gradient_that_was_never_accepted(life: Life) -> None:
    decision = {"version": life.player.holder.version, "decisions": [[0, [["w", 99]], None]]}
    life.journal.append(msgpack.packb(["decided", decision]), [])


@pytest.mark.parametrize("write", [_unknown_kind, _gradient_that_was_never_accepted])
def test_a_record_that_cannot_be_carried_out_is_named_with_its_place(life: Life, write: Callable[[Life], None]) -> None:
    life.push(1)
    write(life)
    life.journal.sync()

    with pytest.raises(DataDamaged, match="record 7 cannot be carried out") as caught:
        life.recover()

    assert (caught.value.path, caught.value.offset) == (life.disk.paths()[-1], offset_of(life, 7))


def test_a_record_that_cannot_be_carried_out_names_both_choices_too(life: Life) -> None:
    life.push(1)
    _unknown_kind(life)
    life.journal.sync()

    with pytest.raises(DataDamaged) as caught:
        life.recover()

    assert caught.value.hint is not None
    assert "--recover-until 1" in caught.value.hint


def test_a_long_recovery_tells_how_far_it_is(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_REPORT_EVERY", 4)
    life.push(1, 2, 3)
    told: list[tuple[int, int]] = []

    life.recover(on_progress=lambda records, version: told.append((records, version)))

    assert told == [(4, 0), (8, 2)]


def test_a_disk_that_cannot_be_read_is_an_error_and_no_new_beginning(life: Life) -> None:
    life.push(1)
    life.disk.fail_next("read", errno.EIO)

    with pytest.raises(OSError, match="Input/output"):
        life.recover()


def test_a_checkpoint_of_a_rule_that_is_not_known_is_refused(life: Life) -> None:
    holder = ParameterHolder(executor="numpy")
    content = pack_state(holder, Books(), 1).replace(b"\xa4rule\xc0", b"\xa4rule\x92\xa4mine\x80")
    path = life.folder.checkpoint_path(50, 0)
    writer = CheckpointWriter(life.disk, path, Checkpoint(50, 0, content))
    while not writer.step():
        pass

    with pytest.raises(CheckpointError, match="mine"):
        life.recover()


def test_a_gradient_of_two_arenas_fits_parameters_that_are_set_again_later(life: Life) -> None:
    """In a run without a crash it would be applied: it has the layout of the parameters (PROTOCOL 16)."""
    life.player.gradient(1)
    life.player.record("absent", generation=1)
    life.journal.sync()

    _, found = life.recover()

    (gradient,) = found.pending.values()
    assert [len(part) for part in gradient.parts] == [8, 24]


def test_a_gradient_of_another_layout_comes_back_as_it_was() -> None:
    life = Life()
    other = Layout.of([np.zeros(5, np.float32)])
    life.player.gradient(1)
    set_keys = {"layout": other.to_frame(), "generation": 1, "version": 0}
    life.player.record("set", payload_of(other, 0.0, trained_only=False), **set_keys)
    life.journal.sync()

    _, found = life.recover()

    # Cut as its own layout has it, which does not fit the parameters any more: it will be refused.
    assert [[len(part) for part in gradient.parts] for gradient in found.pending.values()] == [[8, 24]]


def test_books_of_a_checkpoint_are_those_that_records_go_on_with(life: Life) -> None:
    life.push(1)
    life.player.books.members["x"] = MemberBook("x", accepted=3, decided=3)
    life.checkpoint()
    life.player.gradient(4, "x")
    life.journal.sync()

    _, found = life.recover()

    assert found.books.members["x"].accepted == 4
    assert list(found.pending) == [("x", 4)]
