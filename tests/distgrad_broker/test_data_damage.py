"""Starts on a journal that is damaged where a checkpoint covers it, and on a full disk; going back counts once."""

from __future__ import annotations

import logging
from pathlib import Path
from random import Random

import pytest

from distgrad.durable.journal_reader import read
from distgrad.errors import DataDamaged
from distgrad.holder import ParameterHolder
from distgrad_broker.config import BrokerConfig
from distgrad_broker.data import open_data
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


def test_a_version_that_was_gone_back_to_is_not_gone_back_to_again_by_the_same_option(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kit = run(1, 2, 3).crash("two", recover_until=2)
    kit.greet(nonce=b"successor")
    kit.push(3, value=5.0)
    kit.work()
    kit.write()

    with caplog.at_level(logging.WARNING, logger="distgrad_broker"):
        again = kit.crash("three", recover_until=2, machine=True)

    assert (again.total, again.holder.version) == (-56.0, 3)
    assert "went back to this version already" in caplog.text
    assert again.crash("four", recover_until=2).holder.version == 3


def test_another_version_can_be_gone_back_to_and_the_same_one_after_a_start_without() -> None:
    kit = run(1, 2, 3).crash("two", recover_until=2)

    earlier = kit.crash("three", recover_until=0)
    assert earlier.total == 0.0
    earlier.greet(nonce=b"successor")
    for number in (1, 2):
        earlier.push(number, value=2.0)
        earlier.work()
    earlier.write()

    without = earlier.crash("four")
    assert without.total == -32.0
    assert without.crash("five", recover_until=0).total == 0.0


def test_damage_after_going_back_says_how_to_go_back_again() -> None:
    kit = run(1, 2, 3).crash("two", recover_until=2)
    kit.greet(nonce=b"successor")
    for number in (3, 4, 5):
        kit.push(number, cursor=f"c{number}")
        kit.work()
        kit.write()
    (path,) = [path for path in kit.disk.paths() if path.startswith("/data/journal")]
    kit.disk.flip(path, bytes(kit.disk.read(path)).find(b"c3"))

    with pytest.raises(DataDamaged) as caught:
        kit.crash("three", recover_until=2)

    assert "--recover-until 2 " in str(caught.value.hint)
    assert "counts once, and again after a start without it" in str(caught.value.hint)
    disk = kit.disk.crash(Random(0), machine=False)
    with pytest.raises(DataDamaged):
        DurableKit(disk, incarnation="three")
    assert DurableKit(disk, incarnation="four", recover_until=2).total == -16.0


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


def test_a_start_on_a_full_disk_waits_for_room_says_so_once_and_leaves_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = run(1, 2, 3).disk.crash(Random(0), machine=False)
    disk.capacity = 0
    files: list[list[str]] = []

    def pause(seconds: float) -> None:
        files.append(disk.paths())
        if len(files) == 3:
            disk.capacity = None

    config = BrokerConfig(data=Path(DATA))
    holder = ParameterHolder(executor="numpy")
    with caplog.at_level(logging.INFO, logger="distgrad_broker"):
        data = open_data(config, disk, holder, config.consistency(), pause=pause)
    data.writer.close()

    assert holder.version == 3
    assert files[0] == files[1] == files[2]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" data=")[0] for line in lines] == [
        "the disk is full, the broker starts as soon as there is room for the journal",
        "the disk takes the journal again",
    ]
