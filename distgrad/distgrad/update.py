"""How one gradient is laid over the parameters, tested, and applied by kernels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .arrays import largest, lasting_empty
from .blocked import Kernel, bits_dtype, sign_mask
from .errors import GradientRefused
from .executor import CHUNK_BYTES, Executor
from .layout import Layout
from .rules import Rule, plain_numbers, state_dtype
from .storage import Storage

Array: TypeAlias = NDArray[Any]

Cover: TypeAlias = list[list[tuple[int, Array]]]
"""For each trainable arena, its parts: first element and the part that starts there."""

_SCAN = 1 << 18  # elements looked at together when a bad one is searched


class Plan(NamedTuple):
    """All that an update of one arena needs, looked up beforehand.

    `numbers` is rewritten before each update if the rule's constants vary; `limit` is the largest bits of a good
    element, and `is_open` says that these are all finite ones; a segment is (first element, the one behind the last,
    buffer); `split` says that threads share the work, in pieces of `piece` elements.
    """

    kernel: Kernel
    numbers: Array
    word: Array
    limit: int
    is_open: bool
    state: list[Array]
    dtype: np.dtype[Any]
    size: int
    segments: list[tuple[int, int, int]]
    starts: list[int]
    split: bool
    piece: int


def make_plans(
    storage: Storage, state: Sequence[Sequence[Array]], rule: Rule | None, sign: float, step: int, executor: Executor
) -> list[Plan]:
    """Bind kernels and constants to every trainable arena.

    Parameters
    ----------
    storage : Storage
        The parameters; plans hold for every version of the same layout.
    state : sequence of sequence of ndarray
        For each slot of the rule an array per trainable arena.
    rule : Rule or None
        The rule.
    sign : float
        1 for descent, -1 for ascent.
    step : int
        Number of the next update.
    executor : Executor
        Compiles the kernels.

    Returns
    -------
    list of Plan
        One per trainable arena.
    """
    layout = storage.layout
    numbers = plain_numbers(sign) if rule is None else rule.numbers(sign, step)
    plans = []
    for arena, spec in enumerate(layout.arenas[: layout.n_trainable_arenas]):
        finite = largest(spec.dtype)
        limit = finite if rule is None else rule.limit(spec.dtype)
        segments = _segments(storage, arena)
        kernel = executor.kernel("step" if rule is None else rule.kernel, spec.dtype)
        split = executor.splits(kernel, layout.gradient_bytes)
        plans.append(
            Plan(
                kernel=kernel,
                numbers=np.array(numbers, state_dtype(spec.dtype)),
                word=sign_mask(spec.dtype),
                limit=int(np.array(limit, spec.dtype).view(bits_dtype(spec.dtype))),
                is_open=limit == finite,
                state=[arrays[arena] for arrays in state],
                dtype=spec.dtype,
                size=spec.size,
                segments=segments,
                starts=[start for start, _, _ in segments],
                split=split,
                piece=CHUNK_BYTES // spec.dtype.itemsize if split else max(spec.size, 1),
            )
        )
    return plans


def slots_of(rule: Rule | None) -> tuple[str, ...]:
    """Name what a rule remembers of each parameter.

    Parameters
    ----------
    rule : Rule or None
        The rule.

    Returns
    -------
    tuple of str
        The names of its slots; none without a rule.
    """
    return () if rule is None else rule.slots


def make_state(layout: Layout, rule: Rule | None) -> dict[str, list[Array]]:
    """Make the state that a rule begins with.

    Parameters
    ----------
    layout : Layout
        Of the parameters.
    rule : Rule or None
        The rule.

    Returns
    -------
    dict of str to list of ndarray
        For each slot zeros for each trainable arena, float32 for 16 bits.
    """
    specs = layout.arenas[: layout.n_trainable_arenas]
    return {slot: [_zeros(spec.size, state_dtype(spec.dtype)) for spec in specs] for slot in slots_of(rule)}


def renew_numbers(plans: Sequence[Plan], rule: Rule, sign: float, step: int) -> None:
    """Give the kernels a rule's constants for an update.

    Parameters
    ----------
    plans : sequence of Plan
        One per trainable arena.
    rule : Rule
        The rule.
    sign : float
        1 for descent, -1 for ascent.
    step : int
        Number of the update.
    """
    numbers = rule.numbers(sign, step)
    for plan in plans:
        plan.numbers[:] = numbers


def is_whole(g: Array, plan: Plan) -> bool:
    """Tell whether an array is a gradient of one arena in one piece.

    Parameters
    ----------
    g : ndarray
        A part.
    plan : Plan
        Of the arena.

    Returns
    -------
    bool
        True if a kernel can take it as it is.
    """
    return g.shape == (plan.size,) and g.dtype == plan.dtype and g.flags.c_contiguous


def cover(plans: Sequence[Plan], gradient: Sequence[Array]) -> Cover:
    """Lay the parts over the trainable arenas, which they must cover exactly.

    Parameters
    ----------
    plans : sequence of Plan
        One per trainable arena.
    gradient : sequence of ndarray
        The parts.

    Returns
    -------
    Cover
        The parts by arena.

    Raises
    ------
    GradientRefused
        If they do not fit.
    """
    covered: Cover = [[] for _ in plans]
    arena = filled = got = 0
    for part in gradient:
        if part.size == 0:
            continue
        while arena < len(plans) and filled == plans[arena].size:
            arena, filled = arena + 1, 0
        if arena == len(plans):
            raise GradientRefused("too_large", "the gradient has more elements than the parameters that are trained")
        plan = plans[arena]
        if part.dtype != plan.dtype or part.ndim != 1:
            raise GradientRefused("malformed", f"expected a part of {plan.dtype}, got {part.ndim}-D {part.dtype}")
        if filled + part.size > plan.size:
            reason = "too_large" if arena == len(plans) - 1 else "malformed"
            raise GradientRefused(reason, "a part of the gradient reaches beyond the end of its arena")
        covered[arena].append((filled, np.ascontiguousarray(part)))
        filled += part.size
        got += part.nbytes
    wanted = sum(plan.size * plan.dtype.itemsize for plan in plans)
    if got != wanted:
        raise GradientRefused("truncated", f"the gradient has {got} bytes, expected {wanted}")
    return covered


def apply_single(plan: Plan, g: Array, storage: Storage, spare: Storage | None) -> bool:
    """Apply a gradient that is the whole of the only trainable arena.

    Parameters
    ----------
    plan : Plan
        Of the arena.
    g : ndarray
        The gradient; `is_whole`.
    storage : Storage
        The current version.
    spare : Storage or None
        Where the next version is written; in place without.

    Returns
    -------
    bool
        Whether it was good. If not, nothing was written but the spare.
    """
    kernel, numbers, word, p = plan.kernel, plan.numbers, plan.word, storage.arenas[0]
    if spare is not None and not plan.state:
        return kernel.beside(spare.arenas[0], p, g, numbers, word) <= plan.limit
    if kernel.check(g, word) > plan.limit:
        return False
    if spare is None:
        kernel.in_place(p, g, *plan.state, numbers, word)
    else:
        kernel.beside(spare.arenas[0], p, g, *plan.state, numbers, word)
    return True


def apply_parts(
    plans: Sequence[Plan], covered: Cover, storage: Storage, spare: Storage | None, executor: Executor
) -> bool:
    """Apply a gradient in parts.

    Parameters
    ----------
    plans : sequence of Plan
        One per trainable arena.
    covered : Cover
        The gradient.
    storage : Storage
        The current version.
    spare : Storage or None
        Where the next version is written; in place without.
    executor : Executor
        Runs the kernels.

    Returns
    -------
    bool
        Whether it was good. If not, nothing was written but the spare.
    """
    tests_itself = spare is not None and not any(plan.state for plan in plans)
    if not tests_itself and not passes(plans, covered, executor):
        return False
    storage.load()
    for plan, parts in zip(plans, covered, strict=True):
        function = plan.kernel.in_place if spare is None else plan.kernel.beside
        if executor.run(function, _calls(plan, parts, storage, spare), split=plan.split) > plan.limit:
            return False
    storage.store()
    return True


def passes(plans: Sequence[Plan], covered: Cover, executor: Executor) -> bool:
    """Tell whether every element of a gradient is finite and small enough for the rule.

    Parameters
    ----------
    plans : sequence of Plan
        One per trainable arena.
    covered : Cover
        The gradient.
    executor : Executor
        Runs the kernels.

    Returns
    -------
    bool
        If not, `refusal` tells why.
    """
    for plan, parts in zip(plans, covered, strict=True):
        step = plan.piece
        tests = [(part[low : low + step], plan.word) for _, part in parts for low in range(0, part.size, step)]
        if executor.run(plan.kernel.check, tests, split=plan.split) > plan.limit:
            return False
    return True


def refusal(layout: Layout, plans: Sequence[Plan], covered: Cover) -> GradientRefused:
    """Name the first bad element's leaf, and what is bad about it.

    Parameters
    ----------
    layout : Layout
        The parameters' layout.
    plans : sequence of Plan
        One per trainable arena.
    covered : Cover
        A gradient with a bad element.

    Returns
    -------
    GradientRefused
        The error to raise.
    """
    for arena, (plan, parts) in enumerate(zip(plans, covered, strict=True)):
        for start, part in parts:
            for low in range(0, part.size, _SCAN):
                piece = part[low : low + _SCAN]
                bad = (piece.view(plan.word.dtype) & plan.word) > plan.limit
                if bad.any():
                    first = int(bad.argmax())
                    leaf, value = layout.locate(arena, start + low + first), float(piece[first])
                    where = f"gradient of {leaf.name!r}" if leaf.name else "gradient"
                    if not np.isfinite(value):
                        return GradientRefused("not_finite", f"{where} holds {value}", leaf=leaf.name)
                    most = float(np.array(plan.limit, plan.word.dtype).view(plan.dtype))
                    text = f"{where} holds {value:.3g}; the rule's state can take {most:.3g} at most"
                    return GradientRefused("overflow", text, leaf=leaf.name)
    raise AssertionError("a refused gradient has a bad element")


def _zeros(size: int, dtype: np.dtype[Any]) -> Array:
    array = lasting_empty(size, dtype)
    array.fill(0)
    return array


def _segments(storage: Storage, arena: int) -> list[tuple[int, int, int]]:
    """Tell which buffer of the storage holds which elements of an arena."""
    if storage.adopted is None:
        return [(0, storage.layout.arenas[arena].size, arena)]
    return [
        (leaf.offset, leaf.offset + leaf.size, number)
        for number, leaf in enumerate(storage.layout.leaves)
        if leaf.arena == arena and leaf.size
    ]


def _calls(
    plan: Plan, parts: list[tuple[int, Array]], storage: Storage, spare: Storage | None
) -> Iterator[tuple[Array, ...]]:
    """Cut an update at the ends of parts, buffers and pieces, into arguments for the kernel."""
    for start, part in parts:
        low, stop = start, start + part.size
        number = bisect_right(plan.starts, low) - 1
        while low < stop:
            base, end, buffer = plan.segments[number]
            high = min(stop, end, low + plan.piece)
            old = storage.arenas[buffer][low - base : high - base]
            state = [array[low:high] for array in plan.state]
            update = (old, part[low - start : high - start], *state, plan.numbers, plan.word)
            yield update if spare is None else (spare.arenas[buffer][low - base : high - base], *update)
            low = high
            number += low == end
