"""The holder: one gradient at a time, whole or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad import executor, update
from distgrad.errors import ConfigError, GradientRefused, InvalidMode, LayoutError, NoParameters
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.rules import SGD, Adam, AdamW, Rule

RULES: list[Rule | None] = [
    None,
    SGD(lr=0.5),
    SGD(lr=0.5, weight_decay=0.1),
    SGD(lr=0.5, momentum=0.9, dampening=0.1),
    SGD(lr=0.5, momentum=0.9, nesterov=True),
    Adam(),
    AdamW(),
]
EXECUTORS = ["numba", "numpy"]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "kernel", "none"))
executors = pytest.mark.parametrize("kind", EXECUTORS)


@pytest.fixture(autouse=True)
def numba_if_asked_for(request: pytest.FixtureRequest) -> None:
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind") == "numba":
        pytest.importorskip("numba")


@pytest.fixture
def many_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every update large, so that small ones are split as large ones are."""
    monkeypatch.setattr(executor, "SPLIT_BYTES", 0)
    monkeypatch.setattr(update, "CHUNK_BYTES", 64)


def mixed(seed: int = 0) -> dict[str, Any]:
    """Parameters of every trainable dtype, with leaves that are carried, empty and 0-d."""
    rng = np.random.default_rng(seed)
    return {
        "half": rng.standard_normal((5, 3)).astype(np.float16),
        "single": [rng.standard_normal(200).astype(np.float32), np.array(rng.standard_normal(), np.float32)],
        "empty": np.ones((0, 4), np.float32),
        "double": (rng.standard_normal((7, 7)),),
        "count": np.arange(3),
        "mask": np.array([True, False]),
    }


def gradient_of(holder: ParameterHolder, seed: int = 1) -> list[np.ndarray[Any, Any]]:
    """Make a gradient for whatever the holder holds."""
    assert holder.layout is not None
    rng = np.random.default_rng(seed)
    trained = holder.layout.arenas[: holder.layout.n_trainable_arenas]
    return [rng.standard_normal(arena.size).astype(arena.dtype) for arena in trained]


def bits(holder: ParameterHolder) -> list[bytes]:
    """Everything that an update may change."""
    assert holder.storage is not None
    state = [array.tobytes() for arrays in holder.state.values() for array in arrays]
    return [array.tobytes() for array in holder.storage.leaves()] + state + [b"%d %d" % (holder.version, holder.steps)]


@executors
@pytest.mark.parametrize(("mode", "sign"), [("descent", -1), ("Ascent", 1)])
def test_without_a_rule_the_gradient_is_the_step(kind: str, mode: str, sign: int) -> None:
    holder = ParameterHolder(mode, executor=kind)
    start = mixed()
    holder.set_nest(start)
    gradient = gradient_of(holder)

    holder.apply(gradient)

    result = holder.nest()
    assert result["half"].tobytes() == (start["half"] + sign * gradient[0].reshape(5, 3)).tobytes()
    assert (result["single"][0] == start["single"][0] + sign * gradient[1][:200]).all()
    assert result["single"][1] == start["single"][1] + sign * gradient[1][200]
    assert (result["double"][0] == start["double"][0] + sign * gradient[2].reshape(7, 7)).all()
    assert (result["count"] == start["count"]).all()
    assert (result["mask"] == start["mask"]).all()
    assert holder.version == 1


@executors
@rules
def test_bits_do_not_depend_on_parts_threads_version_buffers_or_adoption(
    kind: str, rule: Rule | None, many_small_pieces: None
) -> None:
    results = set()

    for threads, cut, adopt in [(1, None, False), (1, 7, False), (2, None, False), (3, 7, False), (2, 13, True)]:
        for beside in (False, True) if not adopt else (False,):
            holder = ParameterHolder(rule=rule, threads=threads, executor=kind)
            holder.set_nest(mixed(), adopt=adopt)
            spare = holder.new_spare() if beside else None
            for seed in range(4):
                whole = gradient_of(holder, seed)
                step = cut or 10**6
                parts = [array[low : low + step] for array in whole for low in range(0, array.size, step)]
                spare = holder.apply(parts, spare=spare)
            results.add(tuple(bits(holder)))
            holder.close()

    assert len(results) == 1


@given(st.lists(st.integers(0, 300), max_size=12), st.booleans())
def test_bits_do_not_depend_on_how_a_gradient_is_cut(cuts: list[int], beside: bool) -> None:
    whole, cut = (ParameterHolder(rule=Adam(), executor="numpy") for _ in range(2))
    for holder in (whole, cut):
        holder.set_nest(mixed())
    gradient = gradient_of(whole)
    parts = []
    for array in gradient:
        ends = sorted({0, array.size, *(min(place, array.size) for place in cuts)})
        parts += [array[low:high] for low, high in zip([0, *ends], ends, strict=False)]

    whole.apply(gradient)
    cut.apply(parts, spare=cut.new_spare() if beside else None)

    assert bits(whole) == bits(cut)


@executors
@rules
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_a_bad_gradient_changes_nothing_and_names_the_leaf(
    kind: str, rule: Rule | None, beside: bool, single: bool
) -> None:
    holder = ParameterHolder(rule=rule, executor=kind)
    holder.set_nest({"a": np.ones(100, np.float32), "b": [np.ones((3, 4), np.float32)]} if single else mixed())
    name, arena, index = ("b.0", 0, 105) if single else ("double.0", 2, 40)
    spare = holder.apply(gradient_of(holder), spare=holder.new_spare() if beside else None)
    before = bits(holder)

    for bad in (np.nan, np.inf, -np.inf):
        gradient = gradient_of(holder, 2)
        gradient[arena][index] = bad
        parts = gradient if single else [array[low : low + 9] for array in gradient for low in range(0, array.size, 9)]
        with pytest.raises(GradientRefused, match=f"gradient of '{name}' holds {bad}") as refused:
            holder.apply(parts, spare=spare)
        assert (refused.value.reason, refused.value.leaf) == ("not_finite", name)
        assert bits(holder) == before

    holder.apply(gradient_of(holder, 3), spare=spare)
    assert holder.version == 2


@executors
@pytest.mark.parametrize("rule", [Adam(), SGD(lr=2.0, momentum=0.9), SGD(lr=100.0)], ids=lambda rule: rule.kernel)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gradient_at_the_limit_keeps_the_state_finite_and_one_beyond_it_is_an_overflow(
    kind: str, rule: Rule, dtype: str
) -> None:
    holder = ParameterHolder(rule=rule, executor=kind)
    holder.set_nest({"w": np.ones(4, dtype)})
    largest = np.array(rule.limit(dtype), dtype)
    beyond = np.nextafter(largest, np.array(np.inf, dtype))

    for _ in range(50):  # parameters may become infinite by then, the state must not
        holder.apply([np.array([1, 0, largest, -largest], dtype)])
        assert all(np.isfinite(array).all() for arrays in holder.state.values() for array in arrays)
    before = bits(holder)
    with pytest.raises(GradientRefused, match="the rule's state can take") as refused:
        holder.apply([np.array([0, beyond, 0, 0], dtype)])

    assert (refused.value.reason, refused.value.leaf) == ("overflow", "w")
    assert bits(holder) == before


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "truncated"),
        ([np.ones(5, "f4")], "truncated"),
        ([np.ones(5, "f4"), np.ones(2)], "truncated"),
        ([np.ones(5, "f4"), np.ones(4)], "too_large"),
        ([np.ones(5, "f4"), np.ones(3), np.ones(1)], "too_large"),
        ([np.ones(6, "f4"), np.ones(3)], "malformed"),
        ([np.ones(5, "f4"), np.ones(3, "f4")], "malformed"),
        ([np.ones(5, "f4"), np.ones((1, 3))], "malformed"),
        ([np.ones(3), np.ones(5, "f4")], "malformed"),
    ],
)
def test_parts_that_do_not_cover_the_arenas_are_refused(parts: list[np.ndarray[Any, Any]], reason: str) -> None:
    holder = ParameterHolder(executor="numpy")
    holder.set_nest([np.zeros(5, "f4"), np.zeros(3), np.zeros(7, int)])
    before = bits(holder)

    with pytest.raises(GradientRefused) as refused:
        holder.apply(parts)

    assert refused.value.reason == reason
    assert bits(holder) == before


@executors
def test_parts_may_be_read_only_unaligned_strided_or_empty(kind: str) -> None:
    holder = ParameterHolder(executor=kind)
    holder.set_nest(np.zeros(30, np.float32))
    raw = b"\0" + np.arange(10, dtype=np.float32).tobytes()
    unaligned = np.frombuffer(raw, np.float32, offset=1)

    holder.apply([unaligned, np.ones(0, np.float32), np.arange(20, dtype=np.float32)[::2], unaligned])

    assert (-holder.nest()).tolist() == [*range(10), *range(0, 20, 2), *range(10)]


@executors
def test_a_version_stays_as_it_was_while_later_ones_are_written(kind: str) -> None:
    holder = ParameterHolder(executor=kind)
    holder.set_nest(mixed())
    kept = holder.storage
    assert kept is not None
    before = [array.tobytes() for array in kept.leaves()]

    first = holder.apply(gradient_of(holder), spare=holder.new_spare())
    second = holder.apply(gradient_of(holder), spare=holder.new_spare())

    assert first is kept
    assert second is not kept
    assert holder.storage not in (first, second)
    assert [array.tobytes() for array in kept.leaves()] == before
    assert holder.storage is not None
    assert holder.storage.arenas[-1] is kept.arenas[-1], "integer arenas are shared"


def test_a_spare_must_be_another_version_of_the_same_parameters() -> None:
    holder = ParameterHolder(executor="numpy")
    holder.set_nest(np.ones(3))
    old = holder.new_spare()
    holder.set_nest(np.ones(3))

    for wrong in (old, holder.storage):
        with pytest.raises(ConfigError, match="new_spare"):
            holder.apply([np.ones(3)], spare=wrong)
    array = np.ones(3)
    holder.set_nest(array, adopt=True)
    with pytest.raises(ConfigError, match="updated in place"):
        holder.new_spare()


def test_setting_parameters_resets_the_state_and_keeps_the_version() -> None:
    holder = ParameterHolder(rule=Adam(), executor="numpy")
    holder.set_nest(np.ones(3))
    holder.apply([np.ones(3)])
    first = holder.nest()

    holder.set_nest(np.ones(3))
    assert (holder.version, holder.steps) == (1, 0)
    holder.apply([np.ones(3)])

    assert (holder.nest() == first).all()
    assert holder.version == 2


def test_impossible_parameters_leave_the_former_ones() -> None:
    holder = ParameterHolder(executor="numpy")
    holder.set_nest([np.ones(3)])

    with pytest.raises(LayoutError):
        holder.set_nest({})
    with pytest.raises(LayoutError):
        holder.set_nest([1.0], adopt=True)

    assert holder.nest()[0].tolist() == [1, 1, 1]


def test_arenas_become_the_holders_own_and_must_fit_the_layout() -> None:
    holder = ParameterHolder(executor="numpy")
    layout = Layout.of([np.ones(3), np.arange(2)])
    arenas = layout.pack([np.ones(3), np.arange(2)])

    holder.set_arenas(layout, arenas)
    holder.apply([np.ones(3)])

    assert arenas[0].tolist() == [0, 0, 0]
    read_only = np.frombuffer(bytes(24))
    for wrong in ([], [arenas[0]], [arenas[0][:2], arenas[1]], [arenas[1], arenas[0]], [read_only, arenas[1]]):
        with pytest.raises(ConfigError, match="arena"):
            holder.set_arenas(layout, wrong)


def test_without_parameters_there_is_nothing_to_apply_to() -> None:
    holder = ParameterHolder(executor="numpy")
    holder.set_nest(np.ones(3))
    holder.clear()

    assert (holder.layout, holder.storage) == (None, None)
    assert holder.nest() is None
    with pytest.raises(NoParameters):
        holder.apply([np.ones(3)])
    with pytest.raises(NoParameters):
        holder.new_spare()


@pytest.mark.parametrize("mode", ["up", "", None, 1])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(InvalidMode, match="'descent' or 'ascent'"):
        ParameterHolder(mode)
    with pytest.raises(ValueError, match="'descent' or 'ascent'"):
        ParameterHolder().set_mode(mode)


@executors
def test_mode_and_numbers_change_from_the_next_update_on_and_keep_the_state(kind: str) -> None:
    holder = ParameterHolder(rule=SGD(lr=1.0, momentum=0.5), executor=kind)
    holder.set_nest(np.zeros(2))
    holder.apply([np.ones(2)])

    holder.set_rule_numbers(lr=0.5)
    holder.set_mode("ASCENT")
    holder.apply([np.ones(2)])

    assert holder.rule == SGD(lr=0.5, momentum=0.5)
    assert holder.mode == "ascent"
    assert holder.nest().tolist() == [-1 + 0.25] * 2  # buffer: 1, then 0.5 - 1


def test_numbers_that_need_other_state_reset_it() -> None:
    holder = ParameterHolder(rule=SGD(lr=1.0), executor="numpy")
    holder.set_nest(np.zeros(2))
    holder.apply([np.ones(2)])

    holder.set_rule_numbers(momentum=0.5, dampening=0.5)
    holder.apply([np.ones(2)])

    assert holder.state["momentum_buffer"][0].tolist() == [1, 1], "the first gradient is taken whole"
    holder.replace_rule(Adam())
    assert list(holder.state) == ["exp_avg", "exp_avg_sq"]
    assert holder.steps == 0


def test_impossible_numbers_and_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is no optimizer whose lr"):
        ParameterHolder().set_rule_numbers(lr=1)
    with pytest.raises(ConfigError, match="has no setting 'beta1'"):
        ParameterHolder(rule=SGD(lr=1)).set_rule_numbers(beta1=1)
    with pytest.raises(ConfigError, match=r"a rule such as distgrad\.SGD"):
        ParameterHolder(rule="sgd")  # type: ignore[arg-type]


@pytest.mark.parametrize("nest", [np.ones(0), [np.arange(3)], {"a": np.ones((2, 0, 3), "f2"), "b": np.arange(1)}])
def test_parameters_with_nothing_to_train_have_an_empty_gradient(nest: Any) -> None:
    holder = ParameterHolder(rule=Adam(), executor="numpy")
    holder.set_nest(nest)
    assert holder.layout is not None

    holder.apply([])
    holder.apply(holder.layout.new_gradient())

    assert holder.version == 2


def test_float16_has_float32_state() -> None:
    holder = ParameterHolder(rule=Adam(lr=0.5))
    holder.set_nest(np.ones(3, np.float16))
    holder.apply([np.array([1e-4, 6e4, 0], np.float16)])

    assert [array.dtype.name for arrays in holder.state.values() for array in arrays] == ["float32", "float32"]
    assert holder.nest().dtype == np.float16
    assert holder.nest().tolist() == pytest.approx([0.5, 0.5, 1.0], abs=1e-3)


def test_copies_are_the_callers_and_views_are_live_and_read_only() -> None:
    holder = ParameterHolder(executor="numpy")
    holder.set_nest({"w": np.zeros(3)})
    copy, view = holder.nest(), holder.nest(copy=False)

    copy["w"][:] = 7
    holder.apply([np.ones(3)])

    assert view["w"].tolist() == [-1, -1, -1]
    assert not view["w"].flags.writeable


def test_an_executor_is_named() -> None:
    assert ParameterHolder(executor="numpy").executor == "numpy"
