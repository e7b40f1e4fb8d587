"""Files of parameters: what goes in comes out, and a failed write leaves what was there."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from distgrad import parameter_files
from distgrad.arrays import BFLOAT16, dtype_of
from distgrad.errors import CheckpointError, ConfigError
from distgrad.layout import DTYPES, Layout

SUFFIXES = [".safetensors", ".npz"]
F8_HEADER = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'

Point = namedtuple("Point", ["x", "y"])


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"p{request.param}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back(path: Path, dtype: str) -> None:
    if dtype == BFLOAT16 and path.suffix == ".npz":
        pytest.skip("refused, see below")
    nest = {
        "scalar": np.ones((), dtype_of(dtype)),
        "empty": np.zeros((0, 3), dtype_of(dtype)),
        "grid": np.arange(6).reshape(2, 3).astype(dtype_of(dtype)),
    }

    parameter_files.write(path, nest)
    found = parameter_files.read(path)

    assert sorted(found) == sorted(nest)
    for name, array in nest.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_bfloat16_is_refused_for_npz_which_would_lose_its_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'w': \.npz has no bfloat16; write \.safetensors"):
        parameter_files.write(tmp_path / "p.npz", {"w": np.ones(2, dtype_of(BFLOAT16))})

    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_read_by_a_process_that_has_not_met_it_before(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    parameter_files.write(path, {"w": np.ones(2, dtype_of(BFLOAT16))})
    code = f"from distgrad import parameter_files; print(parameter_files.read({str(path)!r})['w'].dtype)"

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ended.stdout == "bfloat16\n"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=np_st.arrays(np_st.floating_dtypes(endianness="="), np_st.array_shapes(min_dims=0, min_side=0)))
def test_any_array_comes_back_bit_for_bit(path: Path, array: Any) -> None:
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)

    parameter_files.write(path, [array])

    assert parameter_files.read(path)["0"].tobytes() == array.tobytes()


def test_strided_arrays_are_stored_as_they_look(path: Path) -> None:
    """Safetensors by itself writes the memory behind a view."""
    array = np.arange(12.0).reshape(3, 4).T[::-1]

    parameter_files.write(path, {"a": array})

    np.testing.assert_array_equal(parameter_files.read(path)["a"], array)


def test_names_are_paths_joined_with_dots(path: Path) -> None:
    parameter_files.write(path, {"layer": [np.zeros(1), {"w": np.zeros(2)}], "p": Point(np.zeros(3), np.zeros(4))})

    assert list(parameter_files.read(path)) == ["layer.0", "layer.1.w", "p.x", "p.y"]


def test_a_bare_array_is_called_parameters_and_comes_back_bare(path: Path) -> None:
    parameter_files.write(path, np.arange(3.0))

    arrays = parameter_files.read(path)

    assert list(arrays) == ["parameters"]
    np.testing.assert_array_equal(parameter_files.as_nest(arrays), np.arange(3.0))


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a/b", "../up", "w.npy", "w", "é", " "])
def test_any_name_can_be_stored(path: Path, name: str) -> None:
    parameter_files.write(path, {name: np.ones(2), "w.npy.npy": np.zeros(1)})

    assert set(parameter_files.read(path)) == {name, "w.npy.npy"}


@pytest.mark.parametrize(
    "nest", [{"__metadata__": np.ones(1)}, {"a\0b": np.ones(1)}, {"": np.ones(1), "parameters": np.ones(2)}]
)
def test_a_name_that_a_file_cannot_hold_is_refused(path: Path, nest: Any) -> None:
    with pytest.raises(CheckpointError, match="rename"):
        parameter_files.write(path, nest)

    assert list(path.parent.iterdir()) == []


def test_the_structure_of_a_layout_with_the_same_names_is_kept(path: Path) -> None:
    nest = {"b": {"w": np.zeros(2)}, "a": (np.ones(1), [np.ones(3)])}
    parameter_files.write(path, nest)

    found = parameter_files.as_nest(parameter_files.read(path), like=Layout.of(nest))

    assert list(found) == ["b", "a"]
    assert isinstance(found["a"], tuple)
    assert Layout.of(found) == Layout.of(nest)


def test_shapes_and_dtypes_may_differ_from_the_layout_whose_structure_is_kept() -> None:
    like = Layout.of({"a": {"w": np.zeros(2, np.float32)}})

    found = parameter_files.as_nest({"a.w": np.ones((3, 3))}, like=like)

    assert found["a"]["w"].shape == (3, 3)


def test_other_names_become_a_flat_dict() -> None:
    arrays = {"a.w": np.zeros(1), "b": np.zeros(2)}

    assert parameter_files.as_nest(arrays, like=Layout.of({"a": {"w": np.zeros(1)}})) == arrays
    assert parameter_files.as_nest(arrays) == arrays


def test_big_endian_arrays_become_native(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", a=np.arange(3, dtype=">f4"))

    found = parameter_files.read(tmp_path / "b.npz")["a"]

    assert found.dtype == np.float32
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, [0, 1, 2])


def test_files_of_numpy_are_read_compressed_or_not(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "c.npz", a=np.ones(1000), b=np.zeros(()))

    assert set(parameter_files.read(tmp_path / "c.npz")) == {"a", "b"}


def test_an_npz_can_be_read_by_numpy(tmp_path: Path) -> None:
    parameter_files.write(tmp_path / "n.npz", {"a": {"w": np.arange(4.0)}})

    with np.load(tmp_path / "n.npz") as found:
        np.testing.assert_array_equal(found["a.w"], np.arange(4.0))


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(path: Path) -> None:
    parameter_files.write(path, {"a": np.zeros(100)})
    parameter_files.write(path, {"a": np.ones(2)})

    np.testing.assert_array_equal(parameter_files.read(path)["a"], [1, 1])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="needs permissions of POSIX")
def test_the_users_umask_decides_who_may_read_it(path: Path) -> None:
    former = os.umask(0o027)
    try:
        parameter_files.write(path, {"a": np.zeros(1)})
    finally:
        os.umask(former)

    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["_sync", "os.replace", "writer"])
def test_a_write_that_fails_leaves_the_former_file(path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter_files.write(path, {"a": np.zeros(3)})

    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "writer":
        monkeypatch.setitem(parameter_files._WRITERS, path.suffix, fail)
    elif step == "_sync":
        monkeypatch.setattr(parameter_files, "_sync", fail)
    else:
        monkeypatch.setattr("distgrad.parameter_files.os.replace", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        parameter_files.write(path, {"a": np.ones(3)})

    monkeypatch.undo()
    np.testing.assert_array_equal(parameter_files.read(path)["a"], [0, 0, 0])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_is_on_the_disk_before_it_takes_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace, sync = os.replace, parameter_files._sync

    def noted_replace(*args: Any) -> None:
        order.append("rename")
        replace(*args)

    def noted_sync(synced: Path) -> None:
        order.append("folder" if synced == path.parent else "file")
        sync(synced)

    monkeypatch.setattr("distgrad.parameter_files.os.replace", noted_replace)
    monkeypatch.setattr(parameter_files, "_sync", noted_sync)
    parameter_files.write(path, {"a": np.zeros(1)})

    assert order == ["file", "rename", "folder"]


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        parameter_files.write(tmp_path / "missing" / "p.npz", np.zeros(1))


@pytest.mark.parametrize("suffix", [".pt", "", ".pickle"])
def test_another_ending_is_refused_naming_those_that_are_known(tmp_path: Path, suffix: str) -> None:
    for call in (
        parameter_files.check_suffix,
        parameter_files.read,
        lambda path: parameter_files.write(path, np.ones(1)),
    ):
        with pytest.raises(ConfigError, match=r"\.safetensors or \.npz"):
            call(tmp_path / f"p{suffix}")


def test_a_missing_file_is_one_clear_line(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*no such file") as caught:
        parameter_files.read(path)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"x" * 100,
        b"\xff" * 8 + b"{}",
        len(F8_HEADER).to_bytes(8, "little") + F8_HEADER + bytes(4),
    ],
)
def test_a_damaged_file_is_one_clear_line(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="cannot read") as caught:
        parameter_files.read(path)

    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_never_ends_in_anything_but_arrays_or_a_clear_error(path: Path, data: st.DataObject) -> None:
    parameter_files.write(path, {"a": np.arange(8.0), "b": np.ones(2, np.int8)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)

    with contextlib.suppress(CheckpointError):
        parameter_files.read(path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", a=np.array([object()], dtype=object))

    with pytest.raises(CheckpointError, match="cannot read"):
        parameter_files.read(tmp_path / "p.npz")


def test_an_empty_file_of_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz")

    with pytest.raises(CheckpointError, match="no arrays"):
        parameter_files.read(tmp_path / "e.npz")
