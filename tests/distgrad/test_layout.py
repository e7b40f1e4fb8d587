"""Layouts: where leaves lie, and how nests go in and come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distgrad.arrays import lasting_empty
from distgrad.errors import LayoutError
from distgrad.layout import TRAINABLE, Layout, aligned_empty
from support.random_nests import Pair, arrays, nests, same, without_namedtuples


def laid_out(nest: Any) -> Layout:
    """Lay out a random nest, or drop the example if it holds no array or equal paths."""
    try:
        return Layout.of(nest)
    except LayoutError as error:
        assume("no array" not in error.message and "same path" not in error.message)
        raise


@given(nests())
def test_a_nest_survives_its_arenas_with_its_namedtuples_if_they_are_known(nest: Any) -> None:
    layout = laid_out(nest)

    leaves = layout.views(layout.pack(nest))

    assert same(layout.nest(leaves, like=nest), nest)
    assert same(layout.nest(leaves), without_namedtuples(nest))


@given(nests())
def test_leaves_lie_in_dtype_order_without_gaps_and_trainable_arenas_come_first(nest: Any) -> None:
    layout = laid_out(nest)

    ends = [0] * len(layout.arenas)
    for leaf in layout.leaves:
        assert leaf.offset == ends[leaf.arena]
        assert leaf.dtype == layout.arenas[leaf.arena].dtype
        ends[leaf.arena] += leaf.size
    assert ends == [arena.size for arena in layout.arenas]
    trainable = [arena.dtype.name in TRAINABLE for arena in layout.arenas]
    assert trainable == sorted(trainable, reverse=True)
    assert layout.n_trainable_arenas == sum(trainable)
    assert layout.parameter_bytes == sum(np.asarray(leaf).nbytes for leaf in layout.flatten(nest))


@given(nests(), st.integers(8, 64))
def test_parts_cover_every_element_once_in_order_and_none_spans_arenas(nest: Any, part_bytes: int) -> None:
    layout = laid_out(nest)

    covered = [(arena, e) for arena, start, stop in layout.parts(None, part_bytes) for e in range(start, stop)]

    assert covered == [(number, e) for number, arena in enumerate(layout.arenas) for e in range(arena.size)]
    for arena, start, stop in layout.parts(None, part_bytes):
        assert 0 < (stop - start) * layout.arenas[arena].dtype.itemsize <= part_bytes
    trained = layout.parts(layout.n_trainable_arenas)
    assert sum((b - a) * layout.arenas[n].dtype.itemsize for n, a, b in trained) == layout.gradient_bytes


@given(nests())
def test_every_element_is_located_in_its_leaf(nest: Any) -> None:
    layout = laid_out(nest)

    for leaf in layout.leaves:
        for element in (leaf.offset, leaf.offset + leaf.size - 1):
            if leaf.size:
                assert layout.locate(leaf.arena, element) == leaf


@given(nests(arrays(TRAINABLE)))
def test_a_gradient_is_packed_by_path_whatever_its_containers_and_order(nest: Any) -> None:
    layout = laid_out(nest)
    flat = {leaf.name: value for leaf, value in zip(layout.leaves, layout.flatten(nest), strict=True)}
    if layout.leaves[0].name == "":
        flat_nest: Any = nest  # a bare array, or one under the key ""
    else:
        flat_nest = dict(reversed(flat.items()))

    packed, packed_flat = layout.pack_gradient(nest), layout.pack_gradient(flat_nest)

    for one, other, whole in zip(packed, packed_flat, layout.pack(nest), strict=False):
        assert one.tobytes() == other.tobytes() == whole.tobytes()


@given(nests(arrays(TRAINABLE)), st.integers(1, 100))
def test_a_lent_gradient_has_the_bytes_of_a_packed_one_in_pieces_that_span_no_arena(
    nest: Any, least_bytes: int
) -> None:
    layout = laid_out(nest)

    pieces = layout.lend_gradient(nest, least_bytes)

    left = [piece.view(np.uint8) for piece in pieces if piece.size]
    for arena in layout.pack_gradient(nest):
        found = np.empty(0, np.uint8)
        while found.size < arena.nbytes:
            found = np.concatenate([found, left.pop(0)])
        assert found.tobytes() == arena.tobytes()
    assert left == []


def test_only_large_contiguous_leaves_of_the_right_dtype_are_lent() -> None:
    nest: dict[str, Any] = {name: np.arange(100, dtype=np.float32) for name in "abcdefg"}
    layout = Layout.of(nest | {"small": np.zeros(3, np.float32), "half": np.zeros(200, np.float16)})
    gradient = nest | {
        "b": np.arange(200, dtype=np.float32)[::2],
        "c": np.arange(100.0),
        "d": np.frombuffer(nest["d"].tobytes(), np.float32),
        "e": nest["e"][::-1],
        "small": np.ones(3, np.float32),
        "half": np.arange(200, dtype=np.float16),
    }

    pieces = layout.lend_gradient(gradient, 400)

    lent = [name for name, value in gradient.items() if any(np.shares_memory(value, piece) for piece in pieces)]
    assert lent == ["a", "d", "f", "g", "half"]
    # Half precision's arena is the first; b and c are copied into one piece, e into one, the small one into the last.
    assert [piece.size for piece in pieces] == [200, 100, 200, 100, 100, 100, 100, 3]


def test_many_small_leaves_are_not_looked_at_one_by_one_to_be_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = [np.full(100, number, np.float32) for number in range(1000)]
    layout = Layout.of(nest)
    monkeypatch.setattr("distgrad.layout.put", None)

    (piece,) = layout.lend_gradient(nest, 256 * 1024)

    assert piece.tobytes() == np.concatenate(nest).tobytes()


def test_a_bare_array_is_one_leaf_with_an_empty_name() -> None:
    layout = Layout.of(np.float32(3))

    assert [leaf.name for leaf in layout.leaves] == [""]
    assert layout.nest(layout.views(layout.pack(np.float32(3)))) == np.float32(3)


def test_layouts_are_equal_by_their_leaves_and_not_by_their_containers() -> None:
    one, other = Layout.of(Pair(np.ones(2), np.ones(3))), Layout.of({"left": np.zeros(2), "right": np.zeros(3)})

    assert one == other
    assert hash(one) == hash(other)
    assert one != Layout.of({"left": np.zeros(2), "right": np.zeros((3, 1))})


@pytest.mark.parametrize(
    ("nest", "claim"),
    [
        ({}, "no array"),
        ({"a": [], "b": ()}, "no array"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, r"same path 'a\.b'"),
        ({1: np.ones(1), "1": np.ones(1)}, "same path '1'"),
        ({"a": None}, "'a' is a NoneType"),
        ({"a": "text"}, "'a' is a str"),
        ({"a": {1, 2}}, "'a' is a set"),
        ({"a": np.array([object()])}, "'a' has dtype object"),
        ({"a": np.ones(2, complex)}, "'a' has dtype complex128"),
        ({"a": np.ones(2, "U3")}, "'a' has dtype <U3"),
        ({"a": np.ma.masked_array([1.0, 2.0], [True, False])}, "'a' is a MaskedArray"),
        ({True: np.ones(1)}, "keys must be strings"),
        ({2.5: np.ones(1)}, "keys must be strings"),
        ({2**64: np.ones(1)}, "keys must be strings"),
        ({"\ud800": np.ones(1)}, "no valid Unicode"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_by_name(nest: Any, claim: str) -> None:
    with pytest.raises(LayoutError, match=claim):
        Layout.of(nest)


def test_a_list_that_contains_itself_is_refused() -> None:
    nest: list[Any] = [np.ones(1)]
    nest.append(nest)

    with pytest.raises(LayoutError, match="deeper than"):
        Layout.of(nest)


PARAMETERS = {"w": np.ones((2, 3), np.float32), "n": np.arange(4), "e": np.ones((0, 2)), "s": np.float64(2)}


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"w": None}, "'w' is missing"),
        ({"w": np.ones(6)}, r"'w' must have shape \(2, 3\), got \(6,\)"),
        ({"w": np.ones((2, 3), complex)}, "'w' must cast to float32"),
        ({"w": np.full((2, 3), "1")}, "'w' must cast to float32"),
        ({"w": np.full((2, 3), None)}, "'w' must cast to float32"),
        ({"w": [1.0, 2.0, 3.0]}, r"leaf 'w' must be one array, got a list of 3; pass numpy\.asarray of it"),
        ({"w": {"x": np.ones(3)}}, r"leaf 'w' must be one array, got a dict of 1; pass the array itself"),
        ({"v": np.ones(3)}, r"leaf 'v' is not one of the parameters: 'w', 'n', 'e', 's'"),
        ({"n": np.ones(4)}, "'n' is int64 and has no gradient"),
        ({"other": np.ones(1)}, "'other' is not one of the parameters"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_by_name(change: dict[str, Any], claim: str) -> None:
    gradient: dict[str, Any] = {"w": np.ones((2, 3)), "e": np.ones((0, 2)), "s": 1.0}

    layout = Layout.of(PARAMETERS)
    with pytest.raises(LayoutError, match=claim):
        layout.pack_gradient(gradient | change)
    with pytest.raises(LayoutError, match=claim):
        layout.lend_gradient(gradient | change, 1)


@pytest.mark.parametrize("integers", [{}, {"n": None}, {"n": np.ones(0)}])
def test_a_gradient_has_nothing_for_integer_leaves_and_is_cast_to_the_parameters_dtype(
    integers: dict[str, Any],
) -> None:
    layout = Layout.of(PARAMETERS)
    gradient = {"s": 0.5, "e": np.ones((0, 2), np.int8), "w": np.arange(6).reshape(2, 3)[::-1] * 0.25} | integers

    packed = layout.pack_gradient(gradient)

    assert [array.dtype.name for array in packed] == ["float32", "float64"]
    assert packed[0].tolist() == [0.75, 1.0, 1.25, 0, 0.25, 0.5]
    assert packed[1].tolist() == [0.5]


def test_a_gradient_too_large_for_the_parameters_dtype_becomes_infinite_without_a_warning() -> None:
    packed = Layout.of(np.ones(2, np.float32)).pack_gradient(np.array([1e300, -1e300]))

    assert packed[0].tolist() == [np.inf, -np.inf]


def test_a_gradient_can_be_packed_into_arenas_that_are_there() -> None:
    layout = Layout.of(PARAMETERS)
    out = layout.new_gradient()

    packed = layout.pack_gradient({"w": np.ones((2, 3)), "e": np.ones((0, 2)), "s": 1.0}, out)

    assert all(one is other for one, other in zip(packed, out, strict=True))


def test_flatten_wants_the_exact_dtype() -> None:
    with pytest.raises(LayoutError, match="must be float32, got float64"):
        Layout.of({"a": np.ones(2, np.float32)}).flatten({"a": np.ones(2)})


def test_arrays_in_foreign_byte_order_are_carried_in_native_order() -> None:
    layout = Layout.of(np.arange(3, dtype=">f4"))

    assert layout.leaves[0].dtype.isnative
    assert layout.pack(np.arange(3, dtype=">f4"))[0].tolist() == [0, 1, 2]


def test_anything_with_an_array_inside_is_an_array() -> None:
    class Tensor:
        def __init__(self, fails: bool = False) -> None:
            self.fails = fails

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
            if self.fails:
                raise RuntimeError("the tensor is on another device")
            return np.ones(3, np.float32)

    assert Layout.of([Tensor()]).leaves[0].shape == (3,)
    with pytest.raises(LayoutError, match="on another device"):
        Layout.of([Tensor(fails=True)])


def test_read_only_views_are_read_only_and_writeable_ones_write_through() -> None:
    layout = Layout.of(PARAMETERS)
    arenas = layout.pack(PARAMETERS)

    layout.views(arenas)[0][1, 2] = 7

    assert layout.views(arenas, writeable=False)[0][1, 2] == 7
    assert not any(view.flags.writeable for view in layout.views(arenas, writeable=False))
    assert all(arena.flags.writeable for arena in arenas)


@pytest.mark.parametrize("make", [aligned_empty, lasting_empty])
@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 18, (1 << 18) + 1])
def test_new_arrays_start_on_cache_lines_and_large_ones_on_pages(make: Any, size: int) -> None:
    array = make(size, np.float32)

    assert array.shape == (size,)
    assert array.dtype == np.float32
    assert array.flags.writeable
    assert not size or array.ctypes.data % (4096 if array.nbytes >= 1 << 20 else 64) == 0


def test_ten_thousand_leaves_are_one_arena() -> None:
    nest = {f"layer{i}": {"w": np.full((2, 2), i, np.float32), "b": np.float32(i)} for i in range(5_000)}
    layout = Layout.of(nest)

    assert len(layout.leaves) == 10_000
    assert len(layout.arenas) == 1
    assert Layout.from_frame(layout.to_frame()) == layout
    assert same(layout.nest(layout.views(layout.pack(nest))), nest)


def test_a_list_for_one_bare_array_is_called_so() -> None:
    layout = Layout.of(np.zeros(3))

    with pytest.raises(LayoutError, match=r"the nest must be one array, got a list of 3; pass numpy\.asarray of it"):
        layout.pack([1.0, 2.0, 3.0])


@pytest.mark.parametrize("bare", [np.ones(3), 3.0])
def test_one_array_for_named_ones_is_called_so(bare: Any) -> None:
    with pytest.raises(LayoutError, match=r"with the leaves 'w', got one array or number; pass it under its name"):
        Layout.of({"w": np.zeros(3)}).pack(bare)


def test_a_leaf_deep_in_a_nest_is_called_by_its_path() -> None:
    layout = Layout.of({"a": [{"w": np.zeros(2)}], "b": np.zeros(1)})

    with pytest.raises(LayoutError, match=r"leaf 'a\.0\.w' must be one array, got a tuple of 2") as caught:
        layout.pack({"a": [{"w": (1.0, 2.0)}], "b": np.zeros(1)})
    assert caught.value.leaf == "a.0.w.0"
