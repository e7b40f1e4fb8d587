"""The compiled kernels: equal to torch and to NumPy's, vectorised, and cached where that is possible."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from distgrad import blocked, kernels
from distgrad.blocked import bits_dtype, sign_mask
from support import torch_reference

COMPILER = kernels.Compiler()
UNCACHED = kernels.Compiler(cache=False)  # numba shows the code only of what it compiled itself
DTYPES = ["float32", "float64"]


@pytest.mark.parametrize("mode", ["descent", "ascent"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", torch_reference.cases())
def test_rules_equal_torch_over_100_steps_in_place_and_beside_and_ascent_is_maximize(
    case: str, dtype: str, mode: str
) -> None:
    for in_place in (True, False):
        farthest = torch_reference.farthest(case, dtype, mode, executor="numba", in_place=in_place)

        assert farthest <= torch_reference.TOLERANCE[dtype]


@pytest.mark.parametrize("name", blocked.SLOTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_where_the_work_is_cut_or_whether_it_is_in_place(name: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 1000)).astype(dtype)
    state = [np.abs(rng.standard_normal(1000)).astype(dtype) for _ in range(blocked.SLOTS[name])]
    numbers, word = np.linspace(0.1, 0.9, 9).astype(dtype), sign_mask(p.dtype)
    kernel = COMPILER.kernel(name, p.dtype)
    results = []

    for size in (1000, 999, 17, 1):
        out, copies = np.empty_like(p), [array.copy() for array in state]
        again, again_copies = p.copy(), [array.copy() for array in state]
        for low in range(0, 1000, size):
            cut = slice(low, low + size)
            one = kernel.beside(out[cut], p[cut], g[cut], *[array[cut] for array in copies], numbers, word)
            two = kernel.in_place(again[cut], g[cut], *[array[cut] for array in again_copies], numbers, word)
            assert one == two
        assert again.tobytes() == out.tobytes()
        results.append((out.tobytes(), [array.tobytes() for array in copies]))

    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("name", blocked.SLOTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpys_kernels_compute_the_same_to_rounding(name: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    p, g = rng.standard_normal((2, 1000)).astype(dtype)
    state = [np.abs(rng.standard_normal(1000)).astype(dtype) for _ in range(blocked.SLOTS[name])]
    numbers, word = np.linspace(0.1, 0.9, 9).astype(dtype), sign_mask(p.dtype)
    outs = []

    for kernel in (COMPILER.kernel(name, p.dtype), blocked.kernel(name, p.dtype)):
        copies = [array.copy() for array in state]
        out = np.empty_like(p)
        worst = kernel.beside(out, p, g, *copies, numbers, word)
        outs.append((worst, np.array([out, *copies])))

    assert outs[0][0] == outs[1][0]
    rounding = 8 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(outs[0][1], outs[1][1], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 7, 64, 999])
def test_bad_elements_are_seen_wherever_they_are(dtype: str, position: int) -> None:
    kernel, word = COMPILER.kernel("step", np.dtype(dtype)), sign_mask(np.dtype(dtype))
    largest = int(np.array(np.finfo(dtype).max).view(bits_dtype(np.dtype(dtype))))
    p, out, numbers = np.ones(1000, dtype), np.empty(1000, dtype), np.ones(1, dtype)

    for bad in (np.nan, np.inf, -np.inf):
        g = np.full(1000, np.finfo(dtype).max)
        assert kernel.check(g, word) == kernel.beside(out, p, g, numbers, word) == largest
        g[position] = bad
        assert kernel.check(g, word) == kernel.beside(out, p, g, numbers, word) > largest


@pytest.mark.parametrize("name", blocked.SLOTS)
def test_loops_are_vectorised(name: str) -> None:
    """A scalar that widened to float64, or a loop that fell back, shows in the machine code only."""
    if platform.machine() != "x86_64":
        pytest.skip("reads x86 instructions")
    compiled = UNCACHED.kernel(name, np.dtype("float32"))

    for function in filter(callable, compiled):
        code = function.inspect_asm()  # type: ignore[attr-defined]  # a numba dispatcher
        (text,) = code.values()
        assert re.search(r"\b[yz]mm\d", text), "no wide registers"
        assert not re.search(r"\bv?cvtps2pd", text), "float32 widens to float64"


def test_a_read_only_unaligned_gradient_is_taken() -> None:
    g = np.frombuffer(b"\0" * 401, np.float32, 100, offset=1)
    p = np.ones(100, np.float32)

    COMPILER.kernel("step", p.dtype).in_place(p, g, np.ones(1, np.float32), sign_mask(p.dtype))

    assert not g.flags.aligned
    assert not g.flags.writeable
    assert (p == 1).all()


def test_another_dtype_is_an_error_and_not_compiled_for() -> None:
    kernel, word = COMPILER.kernel("step", np.dtype("float32")), sign_mask(np.dtype("float32"))

    with pytest.raises(TypeError):
        kernel.check(np.ones(3), word)


def test_a_kernel_is_compiled_once() -> None:
    assert COMPILER.kernel("step", np.dtype("float32")) is COMPILER.kernel("step", np.dtype("float32"))


CACHED = """
import numpy as np
from distgrad import kernels
from distgrad.blocked import sign_mask
kernel = kernels.Compiler().kernel("decay", np.dtype("float32"))
p = np.ones(3, np.float32)
kernel.in_place(p, p.copy(), np.ones(3, np.float32), sign_mask(p.dtype))
print(p[0])
"""


@pytest.mark.parametrize("usable", [True, False])
def test_the_cache_is_used_where_it_can_be_written_and_done_without_elsewhere(tmp_path: Path, usable: bool) -> None:
    folder = tmp_path / "cache"
    if not usable:
        folder.write_text("a file where the folder would be: not even root can write into it")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}

    done = subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, check=False)

    assert done.stdout == "-1.0\n", done.stderr
    assert usable == any(folder.rglob("*.nbi"))


OTHER_TYPES = """
import numpy as np
from distgrad import kernels
for name in ("float32", "float64"):
    kernels.Compiler().kernel("decay", np.dtype(name))
"""


def test_a_cache_that_has_code_for_other_types_is_not_used(tmp_path: Path) -> None:
    """Two processes that fill a new cache at once may leave the code of one type under the name of another."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", OTHER_TYPES], env=environment, check=True)
    for path in tmp_path.rglob("*.2.nbc"):  # of float64
        path.with_name(path.name.replace(".2.", ".1.")).write_bytes(path.read_bytes())

    done = subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, check=False)

    assert done.stdout == "-1.0\n", done.stderr
