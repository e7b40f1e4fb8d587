"""Checkpoints that are not as they were written, or were written by somebody else: a clear error, never a crash."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from distgrad.durable import checkpoint_file
from distgrad.durable.checkpoint_file import read_checkpoint
from distgrad.durable.disk import OsDisk
from distgrad.errors import CheckpointError, DataDamaged
from support.checkpoints import checkpoint_of, content, write

DISK = OsDisk()
NEST = {"w": np.arange(6.0).reshape(2, 3), "half": np.ones(3, np.float16), "n": np.arange(4, dtype=np.uint8)}
CHECKPOINT = checkpoint_of(NEST, ("m",))
PLACE = len('{"__metadata__":{"format":"distgrad checkpoint 1","checksum":"')


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.safetensors"
    write(DISK, str(path), CHECKPOINT)
    return path


def parts(path: Path) -> tuple[bytes, bytes]:
    """Return header and data."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return whole[8:end], whole[end:]


def forge(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """Write a file whose checksum is right, as somebody would who means harm."""
    start = (len(header) if length is None else length).to_bytes(8, "little")
    found = re.match(rb'\{"__metadata__":\{"format":"[^"]*","checksum":"([0-9a-f]{16})"', header)
    if found is not None:
        before, behind = header[: found.start(1)], header[found.end(1) :]
        checksum = xxhash.xxh3_64_hexdigest(start + before + b"0" * 16 + behind + data).encode()
        header = before + checksum + behind
    path.write_bytes(start + header + data)


def changed(header: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Change what a header says, and keep how it is written."""
    content = json.loads(header)
    change(content)
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


# Damage


def test_every_flipped_byte_is_found(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)

    for position in range(len(whole)):
        flip = 1 << int(rng.integers(8))
        whole[position] ^= flip
        path.write_bytes(whole)
        with pytest.raises(DataDamaged) as caught:
            read_checkpoint(DISK, str(path))
        assert caught.value.path == str(path)
        assert 0 <= caught.value.offset <= len(whole)
        whole[position] ^= flip

    path.write_bytes(whole)
    assert content(read_checkpoint(DISK, str(path))) == content(CHECKPOINT)


def test_every_bit_of_the_beginning_counts(path: Path) -> None:
    """A version of the format that one flipped bit made is not taken for a newer one."""
    whole = bytearray(path.read_bytes())

    for position in range(8 + PLACE + 20):
        for bit in range(8):
            whole[position] ^= 1 << bit
            path.write_bytes(whole)
            with pytest.raises(DataDamaged):
                read_checkpoint(DISK, str(path))
            whole[position] ^= 1 << bit


def test_a_file_that_ends_too_early_is_found_wherever_it_ends(path: Path) -> None:
    whole = path.read_bytes()

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataDamaged, match=r"damaged|begin"):
            read_checkpoint(DISK, str(path))


def test_a_file_that_goes_on_too_long_is_found(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")

    with pytest.raises(DataDamaged, match="its header tells of"):
        read_checkpoint(DISK, str(path))


def test_two_pieces_that_changed_places_are_found(path: Path) -> None:
    _, data = parts(path)
    path.write_bytes(path.read_bytes()[: -len(data)] + data[8:16] + data[:8] + data[16:])

    with pytest.raises(DataDamaged, match="checksum"):
        read_checkpoint(DISK, str(path))


def test_a_file_that_shrinks_while_it_is_read_is_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = path.stat().st_size
    os.truncate(path, size - 9)
    monkeypatch.setattr(OsDisk, "size", lambda self, path: size)

    with pytest.raises(DataDamaged, match=f"ends after {size - 9} of {size} bytes") as caught:
        read_checkpoint(DISK, str(path))
    assert caught.value.offset == size - 9


def test_a_large_file_is_read_in_pieces_and_each_of_them_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, "PIECE_BYTES", 7)

    assert content(read_checkpoint(DISK, str(path))) == content(CHECKPOINT)


def test_a_file_that_is_not_there_or_no_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        read_checkpoint(DISK, str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="directory"):
        read_checkpoint(DISK, str(tmp_path))


# Other versions and other files


@pytest.mark.parametrize("version", [0, 2, 17])
def test_another_version_of_the_format_is_named_with_the_one_that_is_read(path: Path, version: int) -> None:
    header, data = parts(path)
    forge(path, header.replace(b"checkpoint 1", b"checkpoint %d" % version), data + b"and more")

    with pytest.raises(CheckpointError, match=f"format {version}; this distgrad reads format 1") as caught:
        read_checkpoint(DISK, str(path))
    assert not isinstance(caught.value, DataDamaged)
    assert caught.value.hint


def test_another_version_that_is_damaged_is_called_damaged(path: Path) -> None:
    header, data = parts(path)
    forge(path, header.replace(b"checkpoint 1", b"checkpoint 2"), data)
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    with pytest.raises(DataDamaged, match="checksum"):
        read_checkpoint(DISK, str(path))


def test_other_safetensors_files_are_no_checkpoints(path: Path) -> None:
    save_file({"w": np.ones(3)}, path)

    with pytest.raises(DataDamaged, match="does not begin as a checkpoint"):
        read_checkpoint(DISK, str(path))


# Harm


def test_what_the_forger_makes_is_read_if_nothing_is_wrong_with_it(path: Path) -> None:
    header, data = parts(path)
    forge(path, changed(header, lambda c: c["__metadata__"].update(later="a key of a later distgrad")) + b"   ", data)

    assert content(read_checkpoint(DISK, str(path))) == content(CHECKPOINT)


def set_metadata(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda c: c["__metadata__"].update(values)


def set_tensor(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda c: c[name].update(values)


def layout_frame(shape: list[int]) -> str:
    return base64.b64encode(
        msgpack.packb({"leaves": [["w", shape, "float64"]], "structure": ["dict", [["w", 0]]]})
    ).decode()


@pytest.mark.parametrize(
    "change",
    [
        set_tensor("w", data_offsets=[0, 40]),
        set_tensor("w", data_offsets=[8, 56]),
        set_tensor("w", data_offsets=[0, 2**63]),
        set_tensor("w", data_offsets=[-48, 0]),
        set_tensor("w", shape=[3, 2]),
        set_tensor("w", shape=[2**40, 2**40]),
        set_tensor("w", dtype="I64"),
        set_tensor("w", more=1),
        lambda c: c.pop("optimizer:m:w"),
        lambda c: c.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        lambda c: c.update(w=[]),
        lambda c: c["__metadata__"].pop("layout"),
        set_metadata(layout=layout_frame([2**40])),
        set_metadata(layout=layout_frame([2**59])),
        set_metadata(layout=layout_frame([-1])),
        set_metadata(layout=layout_frame([6])),
        set_metadata(layout=""),
        set_metadata(layout="!"),
        set_metadata(layout="é"),
        set_metadata(layout="AAAA"),
        set_metadata(layout=7),
        set_metadata(state="A"),
        set_metadata(state=None),
        set_metadata(slots="[]"),
        set_metadata(slots='["m","m"]'),
        set_metadata(slots='["m:"]'),
        set_metadata(slots='["v"]'),
        set_metadata(slots="[1]"),
        set_metadata(slots="{}"),
        set_metadata(slots="["),
        set_metadata(slots="[" * 100_000),
        set_metadata(slots=json.dumps([str(n) for n in range(20_000)])),
        set_metadata(slots=json.dumps(["m" * 1_000_000])),
        set_metadata(slot_prefix="x" * 1_000_000),
        set_metadata(slot_prefix=""),
        set_metadata(slot_prefix=1),
        set_metadata(sequence="-1"),
        set_metadata(sequence="9" * 5000),
        set_metadata(sequence="٣"),
        set_metadata(version=5),
        set_metadata(version=""),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = parts(path)
    forge(path, changed(header, change), data)

    with pytest.raises(DataDamaged, match="its header is wrong") as caught:
        read_checkpoint(DISK, str(path))
    assert len(str(caught.value)) < 1000


def test_a_layout_of_terabytes_asks_for_no_memory(path: Path) -> None:
    header, data = parts(path)

    def change(header: dict[str, Any]) -> None:
        for name in ("half", "n", "optimizer:m:half", "optimizer:m:w"):
            del header[name]
        header["w"] = {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}
        header["__metadata__"].update(layout=layout_frame([2**40]), slots="[]")

    forge(path, changed(header, change), data)

    with pytest.raises(DataDamaged, match=r"its header tells of 879609"):
        read_checkpoint(DISK, str(path))


@pytest.mark.parametrize("length", [0, 7, 10**6, 10**8 + 1, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_or_than_safetensors_takes_is_refused(path: Path, length: int) -> None:
    header, data = parts(path)
    forge(path, header, data, length)

    with pytest.raises(DataDamaged, match=r"damaged|begin"):
        read_checkpoint(DISK, str(path))


BEGINNING = b'{"__metadata__":{"format":"distgrad checkpoint 1","checksum":"0000000000000000"'


@pytest.mark.parametrize(
    "rest", [b"", b"}", b"}}", b',"a":' + b"[" * 10**6, b',"a":"\xff"}}', b',"a":' + b"9" * 10**5, b',"a":NaN}}', b"]"]
)
def test_what_is_no_json_or_not_a_checkpoints_is_refused(path: Path, rest: bytes) -> None:
    forge(path, BEGINNING + rest, b"")

    with pytest.raises(DataDamaged, match="its header is wrong"):
        read_checkpoint(DISK, str(path))


def test_memory_that_is_not_there_is_an_error_of_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int, dtype: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(checkpoint_file, "lasting_empty", refuse)

    with pytest.raises(CheckpointError, match=r"cannot read .*: not enough memory"):
        read_checkpoint(DISK, str(path))


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_header_changed_anywhere_is_refused_or_means_the_same(path: Path, data: st.DataObject) -> None:
    write(DISK, str(path), CHECKPOINT)
    header, body = parts(path)
    begin = data.draw(st.integers(0, len(header)))
    end = data.draw(st.integers(begin, min(begin + 20, len(header))))
    forge(path, header[:begin] + data.draw(st.binary(max_size=20)) + header[end:], body)

    found = None
    with contextlib.suppress(CheckpointError):
        found = read_checkpoint(DISK, str(path))

    # Whoever can compute the checksum can change what is only carried, as the state, but not how the arrays lie.
    assert found is None or content(found)[3:] == content(CHECKPOINT)[3:]
