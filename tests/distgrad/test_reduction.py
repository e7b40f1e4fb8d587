"""Weighted sums: the same bits whatever the cuts, the threads and the executor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad.arrays import TRAINABLE, dtype_of
from distgrad.errors import GradientRefused, NoParameters
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.reduction import BLOCK, Reduction
from distgrad.rules import SGD, Adam, Rule
from distgrad.storage import Storage
from distgrad.update import cover

DTYPES = tuple(map(dtype_of, TRAINABLE))


def reference(gradients: list[np.ndarray[Any, Any]], weights: list[float]) -> np.ndarray[Any, Any]:
    """Add up as the documentation says, one whole array after the other."""
    wide = np.float32 if gradients[0].dtype.itemsize == 2 else gradients[0].dtype.type
    total = gradients[0].astype(wide) * wide(weights[0])
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        total = total + gradient.astype(wide) * wide(weight)
    with np.errstate(over="ignore"):
        return total.astype(gradients[0].dtype)


def holder_of(*sizes: tuple[Any, int], threads: int = 1, executor: str = "numpy") -> ParameterHolder:
    holder = ParameterHolder(threads=threads, executor=executor)
    holder.set_nest([np.zeros(size, dtype) for dtype, size in sizes])
    return holder


def combine(
    holder: ParameterHolder, gradients: list[list[np.ndarray[Any, Any]]], weights: list[float]
) -> list[np.ndarray[Any, Any]]:
    assert holder.layout is not None
    reduction = Reduction(holder.layout, holder._executor)
    return reduction.combine([cover(holder._plans, gradient) for gradient in gradients], weights)


def storage_of(holder: ParameterHolder) -> Storage:
    assert holder.storage is not None
    return holder.storage


def cut(array: np.ndarray[Any, Any], places: list[int]) -> list[np.ndarray[Any, Any]]:
    return [part for part in np.split(array, sorted(place % (array.size + 1) for place in places)) if part.size]


@settings(max_examples=60)
@given(st.data(), st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_sum_does_not_depend_on_where_gradients_are_cut(data: st.DataObject, weights: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [(dtype, data.draw(st.sampled_from([0, 1, 7, BLOCK - 1, BLOCK + 3]))) for dtype in DTYPES]
    holder = holder_of(*sizes)
    layout = holder.layout
    assert layout is not None
    specs = layout.arenas[: layout.n_trainable_arenas]
    wholes = [[rng.normal(size=spec.size).astype(spec.dtype) for spec in specs] for _ in weights]
    places = st.lists(st.integers(0, 2**20), max_size=3)
    gradients = [[part for arena in whole for part in cut(arena, data.draw(places))] for whole in wholes]

    total = combine(holder, gradients, weights)

    for number, spec in enumerate(specs):
        expected = reference([whole[number] for whole in wholes], weights)
        assert total[number].dtype == spec.dtype
        assert total[number].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 1.0, 0.3], [1.0, 0.3], [0.3, 1.0]])
def test_gradients_that_are_added_as_they_are_give_the_documented_bits(dtype: Any, weights: list[float]) -> None:
    rng = np.random.default_rng(1)
    gradients = [rng.normal(size=1001).astype(dtype) for _ in weights]

    total = combine(holder_of((dtype, 1001)), [[gradient] for gradient in gradients], weights)[0]

    assert total.tobytes() == reference(gradients, weights).tobytes()


def test_a_sum_over_several_threads_has_the_same_bits() -> None:
    size = 5 << 20
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=size).astype(np.float32) for _ in range(3)]
    weights = [0.3, 1.0, -0.7]
    sums = []
    for threads in (1, 3):
        holder = holder_of((np.float32, size), threads=threads)
        sums.append(combine(holder, [cut(g, [1 << 18, 1 << 20]) for g in gradients], weights)[0].tobytes())
        holder.close()

    assert sums[0] == sums[1] == reference(gradients, weights).tobytes()


def test_order_matters_and_is_the_one_given() -> None:
    holder = holder_of((np.float32, 1))
    big, small = np.array([1e8], np.float32), np.array([1.0], np.float32)

    assert combine(holder, [[big], [small], [-big]], [1, 1, 1])[0] == 0
    assert combine(holder, [[big], [-big], [small]], [1, 1, 1])[0] == 1


def test_what_is_too_large_becomes_infinite_without_a_warning_and_is_refused_then() -> None:
    holder = holder_of((np.float32, 2))
    huge = np.full(2, 3e38, np.float32)

    total = combine(holder, [[huge], [huge]], [1, 1])

    assert np.isinf(total[0]).all()
    with pytest.raises(GradientRefused, match="inf"):
        holder.apply(total)


def test_read_only_gradients_are_left_as_they_are() -> None:
    holder = holder_of((np.float32, 3))
    gradient = np.frombuffer(np.arange(3, dtype=np.float32).tobytes(), np.float32)

    assert combine(holder, [[gradient]], [0.5])[0].tolist() == [0, 0.5, 1]
    assert gradient.tolist() == [0, 1, 2]


def test_the_memory_of_a_sum_is_used_again_until_the_layout_changes() -> None:
    holder = holder_of((np.float32, 3))
    ones = [np.ones(3, np.float32)]
    holder.apply_sum([ones], [1])
    assert holder._reduction is not None
    first = holder._reduction._sums[0]
    holder.apply_sum([ones, ones], [1, 1])
    assert holder._reduction._sums[0] is first

    holder.set_nest(np.zeros(5, np.float32))

    holder.apply_sum([[np.ones(5, np.float32)]], [1])
    assert holder._reduction._sums[0].size == 5


def test_a_gradient_of_another_size_is_refused() -> None:
    with pytest.raises(GradientRefused, match="bytes"):
        holder_of((np.float32, 3)).apply_sum([[np.ones(2, np.float32)]], [1])


def test_without_parameters_there_is_nothing_to_check_or_apply() -> None:
    holder = ParameterHolder()
    with pytest.raises(NoParameters):
        holder.check([])
    with pytest.raises(NoParameters):
        holder.apply_sum([], [])


@pytest.mark.parametrize("executor", ["numpy", "numba"])
@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not_finite"), (1e30, "overflow")])
def test_a_check_refuses_what_apply_would_and_changes_nothing(executor: str, value: float, reason: str) -> None:
    if executor == "numba":
        pytest.importorskip("numba")
    holder = ParameterHolder(rule=Adam(lr=0.1), executor=executor)
    holder.set_nest({"w": np.ones(4, np.float32)})
    good, bad = np.ones(4, np.float32), np.array([0, 0, value, 0], np.float32)
    holder.check([good])

    with pytest.raises(GradientRefused) as refused:
        holder.check([bad])

    assert (refused.value.reason, refused.value.leaf) == (reason, "w")
    assert holder.version == 0
    assert Layout.of({"w": good}).fingerprint == (holder.layout.fingerprint if holder.layout else None)


@pytest.mark.parametrize("executor", ["numpy", "numba"])
@pytest.mark.parametrize(
    "rule", [None, SGD(lr=0.3), SGD(lr=0.3, weight_decay=0.1), SGD(lr=0.3, momentum=0.9), Adam(lr=0.1)]
)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7], [1.0, 1.0, 0.5], [0.25, -2.0, 1.0, 1.0], [0.7]])
def test_a_sum_is_applied_as_if_it_were_a_gradient(executor: str, rule: Rule | None, weights: list[float]) -> None:
    if executor == "numba":
        pytest.importorskip("numba")
    rng = np.random.default_rng(len(weights))
    sizes = [(dtype, size) for dtype, size in zip(DTYPES, (3, BLOCK + 5, 7, 2 * BLOCK + 1), strict=False)]
    parameters = [rng.normal(size=size).astype(dtype) for dtype, size in sizes]
    gradients = [[rng.normal(size=size).astype(dtype) for dtype, size in sizes] for _ in weights]
    ours, theirs, in_place = (ParameterHolder(rule=rule, threads=2, executor=executor) for _ in range(3))
    for holder in (ours, theirs, in_place):
        holder.set_nest(parameters)
    spares = [holder.new_spare() for holder in (ours, theirs)]
    layout = ours.layout
    assert layout is not None
    packed = [layout.pack_gradient(gradient) for gradient in gradients]
    gradients = [[part for arena in arenas for part in cut(arena, [5, 900])] for arenas in packed]

    for _ in range(3):
        former = ours.apply_sum(gradients, weights, spare=spares[0])
        assert former is not None
        spares[0] = former
        former = theirs.apply(combine(theirs, gradients, weights), spare=spares[1])
        assert former is not None
        spares[1] = former
        assert in_place.apply_sum(gradients, weights) is None

    bits = [[arena.tobytes() for arena in storage_of(holder).arenas] for holder in (ours, theirs, in_place)]
    assert bits[0] == bits[1] == bits[2]
    assert ours.version == theirs.version == in_place.version == 3
    for holder in (ours, theirs, in_place):
        holder.close()


@pytest.mark.parametrize("executor", ["numpy", "numba"])
@pytest.mark.parametrize("rule", [None, SGD(lr=0.3), SGD(lr=0.3, weight_decay=0.1), Adam(lr=0.1)])
@pytest.mark.parametrize("weights", [[1, 1], [1, 0, 1]])
def test_a_sum_that_is_too_large_changes_nothing(executor: str, rule: Rule | None, weights: list[float]) -> None:
    if executor == "numba":
        pytest.importorskip("numba")
    holder = ParameterHolder(rule=rule, threads=1, executor=executor)
    holder.set_nest(np.ones(BLOCK + 2, np.float32))
    spare, before = holder.new_spare(), storage_of(holder)
    huge = np.zeros(BLOCK + 2, np.float32)
    huge[-1] = 3e38

    with pytest.raises(GradientRefused, match="gradient holds"):
        holder.apply_sum([[huge] for _ in weights], weights, spare=spare)

    assert holder.storage is before
    assert (holder.version, holder.steps) == (0, 0)
    assert (before.arenas[0] == 1).all()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    weights=st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0, 1e-45, 3e38]), min_size=1, max_size=4),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    place=st.integers(0, 2**16),
    executor=st.sampled_from(["numpy", "numba"]),
)
def test_a_sum_tells_of_what_is_not_finite_in_any_of_its_gradients(
    dtype: Any, weights: list[float], bad: float, place: int, executor: str
) -> None:
    if executor == "numba":
        pytest.importorskip("numba")
    holder = holder_of((dtype, 3_000), executor=executor)
    gradients = [np.zeros(3_000, dtype) for _ in weights]
    gradients[place % len(weights)][place % 3_000] = bad

    for gradient in gradients:
        holder.check([gradient], before_sum=True)
    with pytest.raises(GradientRefused, match=r"holds (nan|-?inf)"):
        holder.apply_sum([[gradient] for gradient in gradients], weights, spare=holder.new_spare())

    assert holder.version == 0


@pytest.mark.parametrize("rule", [Adam(), SGD(0.1, momentum=0.9), SGD(0.1, weight_decay=0.1)])
def test_before_a_sum_a_rule_that_does_not_take_all_finite_numbers_has_gradients_checked(rule: Rule) -> None:
    holder = ParameterHolder(rule=rule, executor="numpy")
    holder.set_nest(np.zeros(4, np.float32))

    with pytest.raises(GradientRefused, match="can take"):
        holder.check([np.full(4, 3.4e38, np.float32)], before_sum=True)


def test_before_a_sum_a_gradient_must_cover_the_parameters() -> None:
    holder = holder_of((np.float32, 4))

    with pytest.raises(GradientRefused, match="12 bytes"):
        holder.check([np.zeros(3, np.float32)], before_sum=True)
