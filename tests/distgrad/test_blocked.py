"""The NumPy executor: equal to torch, block by block, and float16 in float32."""

from __future__ import annotations

import numpy as np
import pytest

from distgrad import blocked
from distgrad.arrays import TRAINABLE, dtype_of
from distgrad.arrays import largest as largest_of
from distgrad.blocked import bits_dtype, kernel, sign_mask
from support import torch_reference


@pytest.mark.parametrize("mode", ["descent", "ascent"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", torch_reference.cases())
def test_rules_equal_torch_over_100_steps_in_place_and_beside_and_ascent_is_maximize(
    case: str, dtype: str, mode: str
) -> None:
    for in_place in (True, False):
        farthest = torch_reference.farthest(case, dtype, mode, executor="numpy", in_place=in_place)

        assert farthest <= torch_reference.TOLERANCE[dtype]


@pytest.mark.parametrize("name", blocked.SLOTS)
@pytest.mark.parametrize("dtype", TRAINABLE)
def test_bits_do_not_depend_on_where_blocks_end(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    wide = "float64" if dtype == "float64" else "float32"
    p, g = rng.standard_normal((2, 1000)).astype(dtype_of(dtype))
    state = [np.abs(rng.standard_normal(1000)).astype(wide) for _ in range(blocked.SLOTS[name])]
    numbers = np.linspace(0.1, 0.9, 9).astype(wide)
    results = []

    for block in (1 << 15, 1000, 17):
        monkeypatch.setattr(blocked, "BLOCK", block)
        out, copies = np.empty_like(p), [array.copy() for array in state]
        worst = kernel(name, p.dtype).beside(out, p, g, *copies, numbers, sign_mask(p.dtype))
        again, again_copies = p.copy(), [array.copy() for array in state]
        assert kernel(name, p.dtype).in_place(again, g, *again_copies, numbers, sign_mask(p.dtype)) == worst
        assert again.tobytes() == out.tobytes()
        results.append((worst, out.tobytes(), [array.tobytes() for array in copies]))

    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", TRAINABLE)
def test_check_returns_the_bits_of_the_largest_absolute_value(name: str) -> None:
    dtype = dtype_of(name)
    check, word = kernel("step", dtype).check, sign_mask(dtype)

    largest = largest_of(dtype)

    def bits(value: float) -> int:
        return int(np.array(value, dtype).view(bits_dtype(dtype)))

    assert check(np.array([], dtype), word) == 0
    assert check(np.array([-0.0], dtype), word) == 0
    assert check(np.array([1, -3, 2], dtype), word) == bits(3)
    assert check(np.array([largest] * 3, dtype), word) == bits(largest)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        assert check(np.array([1, bad, 2], dtype), word) > bits(largest)


def test_float16_is_computed_in_float32() -> None:
    p, g = np.array([1.0], np.float16), np.array([3.0], np.float16)

    kernel("step", p.dtype).in_place(p, g, np.array([0.1], np.float32), sign_mask(p.dtype))

    assert p[0] == np.float16(np.float32(1) - np.float32(0.1) * np.float32(3))


def test_an_unaligned_gradient_is_taken() -> None:
    raw = bytearray(4 * 100 + 1)
    g = np.frombuffer(raw, np.float32, 100, offset=1)
    p = np.ones(100, np.float32)

    assert not g.flags.aligned
    assert kernel("step", p.dtype).in_place(p, g, np.ones(1, np.float32), sign_mask(p.dtype)) == 0
    assert (p == 1).all()
