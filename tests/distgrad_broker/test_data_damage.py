"""Starts on a journal that is damaged where a checkpoint covers it: nothing of that is needed."""

from __future__ import annotations

import logging

import pytest

from distgrad.durable.journal_reader import read
from distgrad.errors import DataDamaged
from support.durable_kit import DATA, DurableKit


def run(*numbers: int) -> DurableKit:
    """Make a broker that has applied these, with its journal in one segment."""
    kit = DurableKit()
    kit.greet()
    for number in numbers:
        kit.push(number, cursor=f"c{number}")
        kit.work()
        kit.write()
    return kit


def flip(kit: DurableKit, sequence: int) -> tuple[str, int]:
    """Damage one record; give where."""
    place = next(record for record in read(kit.disk, DATA, 1) if record.sequence == sequence)
    kit.disk.flip(place.path, place.offset + 60)
    return place.path, place.offset


def test_it_starts_with_a_warning_goes_on_and_starts_again(caplog: pytest.LogCaptureFixture) -> None:
    kit = run(1, 2, 3)
    kit.checkpoint()
    kit.push(4)
    kit.work()
    kit.write()
    path, offset = flip(kit, 5)

    with caplog.at_level(logging.WARNING, logger="distgrad_broker"):
        again = kit.crash()

    assert again.total == -32.0
    (line,) = [record.getMessage() for record in caplog.records]
    assert "journal is damaged where a checkpoint covers it" in line
    assert path in line
    assert f"offset={offset}" in line
    again.greet(session=kit.sessions["w"], lowest=5)
    again.push(5)
    again.work()
    again.write()
    last = again.crash("three", machine=True)
    assert (last.total, last.member().settled) == (-40.0, 5)


@pytest.mark.parametrize("behind", [False, True])
def test_what_waits_behind_the_damage_is_not_cut_off(behind: bool) -> None:
    """Its record is before the checkpoint, too, and no other record shows that it was on the disk."""
    kit = run(1, 2)
    kit.send("stop")
    kit.write()
    waiting = kit.gradient(3, cursor="c3")
    kit.handle(waiting)
    kit.write()
    kit.send("start" if behind else "stop")
    kit.checkpoint()
    flip(kit, waiting.sequence - 1)

    again = kit.crash("two", machine=True)
    last = again.crash("three", machine=True)

    assert [len(each.state.queue) for each in (again, last)] == [1, 1]


def test_a_gradient_that_waits_and_is_damaged_stops_the_start() -> None:
    kit = run(1, 2)
    kit.written("stop")
    waiting = kit.gradient(3)
    kit.handle(waiting)
    kit.written("start")
    kit.written("stop")
    kit.checkpoint()
    flip(kit, waiting.sequence)

    with pytest.raises(DataDamaged, match="gradient 3 of 'w' was in the queue, and is not in the journal"):
        kit.crash()


def test_damage_to_all_that_a_checkpoint_covers_is_none() -> None:
    kit = run(1, 2, 3)
    assert kit.stop()
    (path,) = [path for path in kit.disk.paths() if "journal" in path]
    for offset in range(0, kit.disk.size(path), 64):
        kit.disk.flip(path, offset)

    again = kit.crash()

    assert again.total == -24.0
    again.greet(session=kit.sessions["w"], lowest=4)
    again.push(4)
    again.work()
    again.write()
    assert again.crash("three").total == -32.0
