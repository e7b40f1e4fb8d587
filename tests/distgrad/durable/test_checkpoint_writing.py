"""Writing a checkpoint: in small steps, without copies, and whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad.durable import checkpoint_file, checkpoint_header
from distgrad.durable.checkpoint_file import CheckpointWriter, read_checkpoint
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.disk import OsDisk
from distgrad.errors import CheckpointError, ConfigError, StateError
from distgrad.layout import Layout
from support.checkpoints import Gate, checkpoint_of, content, write

DISK = OsDisk()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "c.safetensors")


# Steps


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, "PIECE_BYTES", 1000)
    monkeypatch.setattr(checkpoint_file, "SYNC_BYTES", 4000)


def test_a_step_writes_one_piece_or_syncs_once(path: str, small_steps: None) -> None:
    gate = Gate.watch()
    writer = CheckpointWriter(gate.disk(DISK), path, checkpoint_of({"w": np.ones(5000)}, ("m",)))
    unsynced = total = 0

    done = False
    while not done:
        before = len(gate.calls)
        done = writer.step()
        steps = [name for name, _ in gate.calls[before:]]
        written = sum(len(buffer) for name, args in gate.calls[before:] if name == "write" for buffer in args[1])
        assert written <= 1000
        assert steps.count("sync") + (written > 16) <= 1
        total += written
        unsynced = 0 if "sync" in steps else unsynced + written
        assert unsynced < 4000 + 1000

    assert total == writer.size + 16, "the checksum is written over zeros"
    assert writer.size == Path(path).stat().st_size
    assert [name for name, _ in gate.calls[-5:]] == ["write", "sync", "close", "rename", "sync_folder"]
    assert writer.step(), "it stays done"
    assert len(gate.calls) == before + len(steps)


def test_arenas_are_written_as_they_lie_without_a_copy(path: str) -> None:
    gate = Gate.watch()
    checkpoint = checkpoint_of({"w": np.ones(5000)}, ("m",))

    write(gate.disk(DISK), path, checkpoint)

    buffers = [np.frombuffer(args[1][0], np.uint8) for name, args in gate.calls if name == "write"]
    for array in (checkpoint.arenas[0], checkpoint.slots["m"][0]):
        assert any(np.shares_memory(buffer, array) for buffer in buffers)


def test_until_the_last_step_the_former_file_stands(path: str, small_steps: None) -> None:
    former = checkpoint_of({"w": np.zeros(5)})
    write(DISK, path, former)
    writer = CheckpointWriter(DISK, path, checkpoint_of({"w": np.ones(5000)}))

    while content(read_checkpoint(DISK, path)) == content(former):
        done = writer.step()

    assert done
    assert [each.name for each in Path(path).parent.iterdir()] == ["c.safetensors"]


def test_what_a_killed_writer_left_is_written_anew(path: str) -> None:
    Path(path).with_name(".c.safetensors.tmp").write_bytes(b"x" * 100_000)
    checkpoint = checkpoint_of({"w": np.ones(5)})

    write(DISK, path, checkpoint)

    assert content(read_checkpoint(DISK, path)) == content(checkpoint)


def test_giving_up_leaves_nothing_behind(path: str) -> None:
    writer = CheckpointWriter(DISK, path, checkpoint_of({"w": np.ones(5)}))
    writer.step()
    assert Path(path).with_name(".c.safetensors.tmp").exists()

    writer.abandon()
    writer.abandon()

    assert list(Path(path).parent.iterdir()) == []
    with pytest.raises(StateError, match="given up"):
        writer.step()


def test_giving_up_after_the_end_changes_nothing(path: str) -> None:
    writer = CheckpointWriter(DISK, path, checkpoint_of({"w": np.ones(5)}))
    while not writer.step():
        pass

    writer.abandon()

    assert writer.step()
    assert read_checkpoint(DISK, path).version == 5


def test_a_path_without_a_folder_is_in_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    write(DISK, "c.safetensors", checkpoint_of({"w": np.ones(5)}))

    assert read_checkpoint(DISK, "c.safetensors").version == 5


def test_an_error_anywhere_leaves_the_former_file_and_nothing_else(path: str, small_steps: None) -> None:
    former, new = checkpoint_of({"w": np.zeros(5)}), checkpoint_of({"w": np.ones(700)}, ("m",))
    gate = Gate.watch()
    write(gate.disk(DISK), path, new)
    names = [name for name, _ in gate.calls]

    for at, name in enumerate(names):
        write(DISK, path, former)
        gate = Gate.fail(at, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            write(gate.disk(DISK), path, new)
        gate.end()

        expected = new if name == "sync_folder" else former  # it is there, and only may be gone after a crash
        assert content(read_checkpoint(DISK, path)) == content(expected), (at, name)
        assert [each.name for each in Path(path).parent.iterdir()] == ["c.safetensors"], (at, name)


# Our own mistakes


@pytest.mark.parametrize(
    "arenas", [[], [np.zeros(3)], [np.zeros(2, np.float32)], [np.zeros(4)[::2]], [np.zeros((2, 1))]]
)
def test_arenas_that_do_not_fit_the_layout_are_refused(path: str, arenas: list[Any]) -> None:
    with pytest.raises(ConfigError, match="must be 2 contiguous elements of float64"):
        CheckpointWriter(DISK, path, Checkpoint(1, 1, b"", Layout.of({"w": np.zeros(2)}), arenas))


def test_a_slot_with_a_colon_in_its_name_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="colon"):
        CheckpointWriter(DISK, path, checkpoint_of({"w": np.zeros(2)}, ("a:b",)))


def test_a_header_that_safetensors_would_refuse_is_not_written(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_header, "MAX_HEADER_BYTES", 1000)

    with pytest.raises(CheckpointError, match="safetensors opens at most 1000"):
        CheckpointWriter(DISK, path, checkpoint_of({"w": np.zeros(2)}, state=bytes(1000)))
    assert list(Path(path).parent.iterdir()) == []
