"""Checkpoints: what goes in comes out bit for bit, plain safetensors opens it, and writing goes in small steps."""

from __future__ import annotations

import json
import re
import runpy
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from distgrad import parameter_files
from distgrad.arrays import TRAINABLE, dtype_of
from distgrad.durable.checkpoint_file import read_checkpoint
from distgrad.durable.checkpoint_header import Checkpoint, stored_names
from distgrad.durable.disk import OsDisk
from distgrad.holder import ParameterHolder
from distgrad.layout import DTYPES, Layout
from distgrad.rules import Adam, state_dtype
from support import random_nests
from support.checkpoints import checkpoint_of, content, random_bits, write

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "tests" / "data"
DISK = OsDisk()
Point = namedtuple("Point", ["x", "y"])

MIXED = {
    **{dtype: np.arange(7).reshape(7, 1).astype(dtype_of(dtype)) for dtype in DTYPES},
    "zero-d": np.array(2.5, np.float32),
    "empty": np.zeros((3, 0, 2), np.float32),
    "no half": np.zeros(0, np.uint16),
    "layer": [{"w": np.ones((2, 3)), "b": np.zeros(3, np.float16)}, Point(np.ones(1), np.full(2, True))],
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "c.safetensors")


def leaves_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Give the parameters' leaves by the names that they have in a file."""
    assert checkpoint.layout is not None
    views = checkpoint.layout.views(checkpoint.arenas)
    return dict(zip(stored_names(checkpoint.layout), views, strict=True))


def header_of(path: str) -> dict[str, Any]:
    data = Path(path).read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def assert_same(found: Any, expected: Any) -> None:
    assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


# What comes out


def test_safetensors_opens_it_and_finds_every_leaf_under_its_own_name(path: str) -> None:
    checkpoint = checkpoint_of(MIXED, ("exp_avg",))

    write(DISK, path, checkpoint)

    leaves = leaves_of(checkpoint)
    stored = load_file(path)
    assert {"layer.0.w", "layer.1.x", "zero-d", "bool"} <= leaves.keys()
    for name, leaf in leaves.items():
        assert_same(stored[name], leaf)
    trained = [name for name, leaf in leaves.items() if leaf.dtype.name in TRAINABLE]
    assert stored.keys() == leaves.keys() | {f"optimizer:exp_avg:{name}" for name in trained}
    for name in trained:
        state = stored[f"optimizer:exp_avg:{name}"]
        assert state.shape == leaves[name].shape
        assert state.dtype == state_dtype(leaves[name].dtype)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nest=random_nests.nests(), seed=st.integers(0, 2**32 - 1), n_slots=st.integers(0, 3), state=st.binary())
def test_any_parameters_and_state_come_back_bit_for_bit(
    path: str, nest: Any, seed: int, n_slots: int, state: bytes
) -> None:
    nest = {"here": np.ones(1, np.float16), "there": nest}
    slots = tuple(f"slot{number}" for number in range(n_slots))
    checkpoint = checkpoint_of(nest, slots, state=state, seed=seed, sequence=2**64 - 1, version=seed)

    write(DISK, path, checkpoint)
    found = read_checkpoint(DISK, path)

    assert content(found) == content(checkpoint)
    assert found.layout is not None
    assert found.layout.structure == Layout.of(nest).structure
    assert load_file(path).keys() >= leaves_of(checkpoint).keys()


def test_numbers_that_are_none_keep_their_bits(path: str) -> None:
    checkpoint = checkpoint_of({"a": np.zeros(50, np.float16), "b": np.zeros(50, np.float32), "c": np.zeros(50)})
    rng = np.random.default_rng(3)
    assert checkpoint.layout is not None
    arenas = [random_bits(rng, arena.size, arena.dtype) for arena in checkpoint.layout.arenas]
    for arena in arenas:
        arena[:10] = np.nan
        arena.view(np.uint8)[: 10 * arena.itemsize : arena.itemsize] = np.arange(10)  # the lowest bits of each
    checkpoint = Checkpoint(1, 1, b"", checkpoint.layout, arenas)

    write(DISK, path, checkpoint)

    assert content(read_checkpoint(DISK, path)) == content(checkpoint)


def test_ten_thousand_leaves_come_back(path: str) -> None:
    checkpoint = checkpoint_of({f"layer{n}.weight": np.full(3, n, np.float32) for n in range(10_000)}, ("m",))

    write(DISK, path, checkpoint)

    stored = load_file(path)
    assert len(stored) == 20_000
    assert stored["layer9876.weight"].tolist() == [9876.0] * 3
    assert content(read_checkpoint(DISK, path)) == content(checkpoint)


def test_one_bare_array_is_called_as_in_other_files(path: str) -> None:
    checkpoint = checkpoint_of(np.arange(3.0), ("m",))

    write(DISK, path, checkpoint)

    assert load_file(path).keys() == {parameter_files.BARE_NAME, f"optimizer:m:{parameter_files.BARE_NAME}"}
    found = read_checkpoint(DISK, path)
    assert found.layout is not None
    assert found.layout.nest(["leaf"]) == "leaf"


@pytest.mark.parametrize(
    "name", ["optimizer:m:w", "optimizer:", "a/b", 'é\n"\\', " ", "\0", "🙂", "data_offsets", "__metadata", "a" * 5000]
)
def test_any_name_can_be_stored(path: str, name: str) -> None:
    checkpoint = checkpoint_of({name: np.arange(2.0), "w": np.zeros(1)}, ("m",))

    write(DISK, path, checkpoint)

    stored = load_file(path)
    assert stored[name].tolist() == [0.0, 1.0]
    assert len(stored) == 4
    assert content(read_checkpoint(DISK, path)) == content(checkpoint)


def test_optimizer_state_makes_way_for_a_leaf_that_is_called_like_it(path: str) -> None:
    nest = {"optimizer:m:w": np.ones(1), "_optimizer:": np.ones(1), "w": np.zeros(1)}
    checkpoint = checkpoint_of(nest, ("m",))

    write(DISK, path, checkpoint)

    with safe_open(path, "np") as file:
        prefix = file.metadata()["slot_prefix"]
        assert prefix == "__optimizer:"
        assert_same(file.get_tensor(f"{prefix}m:w"), checkpoint.slots["m"][0][2:])


def test_only_names_that_cannot_be_are_replaced_and_by_one_that_is_free(path: str) -> None:
    nest = {"": np.full(1, 0), "parameters": np.full(1, 1), "__metadata__": np.full(1, 2), "parameters_": np.full(1, 3)}

    write(DISK, path, checkpoint_of(nest))

    found = {name: int(array[0]) for name, array in load_file(path).items()}
    assert found == {"parameters__": 0, "parameters": 1, "__metadata___": 2, "parameters_": 3}


def test_without_parameters_only_the_state_is_kept(path: str) -> None:
    checkpoint = Checkpoint(3, 0, b"members", slots={"m": []})

    write(DISK, path, checkpoint)

    assert load_file(path) == {}
    assert content(read_checkpoint(DISK, path)) == content(checkpoint)


def test_a_holder_goes_on_from_what_was_read(path: str) -> None:
    rng = np.random.default_rng(0)
    gradients = [[rng.standard_normal(400_000, np.float32)] for _ in range(2)]
    holder = ParameterHolder(rule=Adam(lr=0.1), executor="numpy")
    holder.set_nest({"w": np.ones((400, 1000), np.float32), "n": np.arange(3)})
    holder.apply(gradients[0])
    assert holder.layout is not None
    assert holder.storage is not None
    write(DISK, path, Checkpoint(1, holder.version, b"", holder.layout, holder.storage.arenas, holder.state))

    found = read_checkpoint(DISK, path)
    again = ParameterHolder(rule=Adam(lr=0.1), executor="numpy")
    assert found.layout is not None
    again.set_arenas(found.layout, found.arenas)
    for slot, arrays in found.slots.items():
        for array, stored in zip(again.state[slot], arrays, strict=True):
            assert stored.flags.writeable
            assert stored.flags.carray
            array[...] = stored
    again.steps = 1
    for each in (holder, again):
        each.apply(gradients[1])

    assert random_nests.same(again.nest(), holder.nest())


def test_the_file_of_format_1_can_be_read_for_ever() -> None:
    expected = runpy.run_path(str(DATA / "make_checkpoint_v1.py"))["checkpoint"]()

    found = read_checkpoint(DISK, str(DATA / "checkpoint_v1.safetensors"))

    assert content(found) == content(expected)


# How it lies in the file


def test_every_element_lies_at_a_multiple_of_its_size(path: str) -> None:
    nest = {"odd": np.zeros(3, bool), "half": np.zeros(1, np.float16), "single": np.zeros(1, np.float32), "d": 0.5}

    write(DISK, path, checkpoint_of(nest, ("m", "v")))

    header = header_of(path)
    header.pop("__metadata__")
    sizes = {"BOOL": 1, "F16": 2, "F32": 4, "F64": 8}
    assert {offsets % sizes[t["dtype"]] for t in header.values() for offsets in t["data_offsets"][:1]} == {0}
    length = int.from_bytes(Path(path).read_bytes()[:8], "little")
    assert (8 + length) % 64 == 0


def test_metadata_tells_what_plain_readers_want_to_know(path: str) -> None:
    checkpoint = checkpoint_of({"w": np.ones(2)}, ("exp_avg", "exp_avg_sq"), sequence=12, version=34)

    write(DISK, path, checkpoint)

    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "distgrad checkpoint 1"
    assert re.fullmatch("[0-9a-f]{16}", metadata["checksum"])
    assert (metadata["sequence"], metadata["version"]) == ("12", "34")
    assert json.loads(metadata["slots"]) == ["exp_avg", "exp_avg_sq"]


def test_the_example_in_the_documentation_runs(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "checkpoint.md").read_text(), re.M | re.S)
    [name] = re.findall(r'"(checkpoint-\d{20}-\d+\.safetensors)"', code)
    write(DISK, str(Path(path).with_name(name)), checkpoint_of({"w": np.arange(2.0)}, ("exp_avg",), version=1500))
    monkeypatch.chdir(Path(path).parent)

    exec(compile(code, "checkpoint.md", "exec"), {})

    assert capsys.readouterr().out.splitlines()[:2] == ["version 1500", "w [0. 1.]"]
