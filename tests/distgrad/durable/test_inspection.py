"""A data folder is told apart as it is: what is there, what of it is damaged, and what only looked so for a moment."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from distgrad import SGD, DistributedGradients
from distgrad.durable import described
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import OsDisk
from distgrad.durable.inspection import Survey, steadily, survey
from distgrad.durable.journal import resume
from distgrad.errors import CheckpointError, ConfigError, GradientRefused
from support.gates import WAIT_S


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three segments and more of twelve gradients, of which one was refused and two were cleared; one checkpoint."""
    monkeypatch.setattr("distgrad.local_data.resume", partial(resume, segment_bytes=4096))
    with DistributedGradients(optimizer=SGD(lr=0.5), data=tmp_path) as shared:
        shared.set_model_parameters(np.zeros(100))
        shared.start()
        for number in range(9):
            shared.add_gradients(np.ones(100), cursor=str(number))
            shared.flush(WAIT_S)
        shared.add_gradients(np.full(100, np.nan))
        with pytest.raises(GradientRefused):
            shared.flush(WAIT_S)
        shared.stop()
        for _ in range(2):
            shared.add_gradients(np.ones(100))
        shared.clear_gradients()
        shared.flush(WAIT_S)
    return tmp_path


def look(folder: Path, *, verify: bool = False, keep_last: int = 0) -> Survey:
    disk = OsDisk()
    return survey(disk, DataFolder(disk, str(folder), read_only=True), verify=verify, keep_last=keep_last)


def segment_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("journal-*"))


def spoil(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_what_is_there_is_counted(folder: Path) -> None:
    found = look(folder, verify=True, keep_last=2)

    assert len(found.segments) >= 3
    assert found.segments[0].segment.first == 1
    for content, following in zip(found.segments, found.segments[1:], strict=False):
        assert content.last == following.segment.first - 1
        assert content.end == content.segment.size
    assert found.kinds["gradient"] == 12
    assert found.workers == {"local": 12}
    assert found.outcomes == {"applied": 9, "refused": 1, "cleared": 2}
    assert found.versions == (0, 9)
    assert found.segments[0].versions is not None
    assert found.payload_bytes == 12 * 800
    assert [begun["distgrad"] != "" for begun in found.incarnations] == [True]
    assert [record.told.kind for record in found.last] == ["gradient", "decided"]
    assert [(name.version, size > 800) for name, size in found.checkpoints] == [(9, True)]
    assert (found.damages, found.torn) == ([], None)


def test_nothing_is_locked_or_changed(folder: Path) -> None:
    def state() -> object:
        paths = [folder, *folder.iterdir()]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

    with DistributedGradients(optimizer=SGD(lr=0.5), data=folder) as shared:
        shared.flush(WAIT_S)
        before = state()
        while_in_use = look(folder, verify=True)
        assert while_in_use.damages == []
        assert len(while_in_use.incarnations) == 2
        assert state() == before
    before = state()
    look(folder, verify=True)
    assert state() == before


def test_every_damaged_file_is_named_and_the_rest_is_counted(folder: Path) -> None:
    first, second, *_ = segment_files(folder)
    records = look(folder).kinds.total()
    spoil(first, first.stat().st_size - 100)
    [checkpoint] = folder.glob("checkpoint-*")
    spoil(checkpoint, checkpoint.stat().st_size - 8)
    third = segment_files(folder)[2]
    spoil(third, 80)

    found = look(folder, verify=True)

    assert [Path(damage.path) for damage in found.damages] == [first, third, checkpoint]
    assert [damage.offset is not None for damage in found.damages] == [True, True, True]
    assert 0 < found.kinds.total() < records
    contents = {Path(content.segment.path): content for content in found.segments}
    assert contents[third].last is None
    assert contents[second].last is not None
    assert look(folder).damages == found.damages[:2], "checkpoints are read only if that is asked for"


def test_a_segment_that_is_missing_is_damage_and_a_torn_end_is_not(folder: Path) -> None:
    second = segment_files(folder)[1]
    second.unlink()
    last = segment_files(folder)[-1]
    last.write_bytes(last.read_bytes()[:-20])

    found = look(folder)

    assert len(found.damages) == 1
    assert "was on the disk" in found.damages[0].message
    assert found.torn is not None
    assert Path(found.torn.path) == last


def test_a_renamed_checkpoint_is_damage(folder: Path) -> None:
    [checkpoint] = folder.glob("checkpoint-*")
    checkpoint.rename(checkpoint.with_name(f"checkpoint-{99:020d}-50.safetensors"))

    [damage] = look(folder, verify=True).damages

    assert "was renamed" in damage.message


def test_damage_that_is_gone_when_one_looks_again_was_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place may be read before it is written, and what is behind it afterwards."""
    first = segment_files(folder)[0]
    real = OsDisk.read
    n_looks = 0

    def read(self: OsDisk, path: str, offset: int = 0, size: int | None = None) -> memoryview:
        nonlocal n_looks
        memory = real(self, path, offset, size)
        if path == str(first):
            n_looks += 1
            if n_looks == 1:
                memory[200] ^= 1
        return memory

    monkeypatch.setattr(OsDisk, "read", read)

    assert look(folder).damages == []
    assert n_looks > 1


def test_a_file_that_was_removed_since_it_was_listed_is_looked_for_once_more() -> None:
    errors = [OSError(errno.ENOENT, "gone", "a"), OSError(errno.ENOENT, "gone", "b")]

    def look_at() -> str:
        if errors:
            raise errors.pop()
        return "found"

    assert steadily(look_at) == "found"


def test_what_goes_wrong_twice_in_the_same_way_is_raised_and_so_is_what_never_goes_well() -> None:
    n_looks = 0

    def broken() -> None:
        nonlocal n_looks
        n_looks += 1
        raise CheckpointError("always the same")

    def moving() -> None:
        nonlocal n_looks
        n_looks += 1
        raise OSError(errno.ENOENT, "gone", f"file {n_looks}")

    with pytest.raises(CheckpointError, match="always the same"):
        steadily(broken)
    assert n_looks == 2
    with pytest.raises(CheckpointError, match="cannot read file 7: gone"):
        steadily(moving)


def test_what_is_no_data_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the data folder"):
        look(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is no data folder"):
        look(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("header", [b"\xc1", b"\x92\xa1x", b"\x81\xa1v\x01", b"\x92\x01\x02", b"\x93\x01\x02\x03"])
def test_records_of_another_version_are_counted_as_unreadable(header: bytes) -> None:
    assert described.read_header(header).kind == described.UNREADABLE
