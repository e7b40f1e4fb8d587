"""Tests of `distgrad.arrays` that its users' tests do not make: bfloat16, whose type is not NumPy's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distgrad
from distgrad import Admin
from distgrad.arrays import BFLOAT16, dtype_of, largest
from distgrad.errors import GradientRefused, LayoutError, MalformedMessage
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad_broker import Broker
from distgrad_worker import Worker

BF16 = dtype_of(BFLOAT16)
START: dict[str, Any] = {"h": np.arange(6).reshape(2, 3).astype(BF16), "w": np.zeros(2, np.float32)}


def test_the_largest_number_is_the_last_finite_one() -> None:
    bits = np.array(largest(BF16), BF16).view(np.int16)

    assert np.isfinite(float(bits.view(BF16)))
    assert float((bits + np.int16(1)).view(BF16)) == np.inf


def test_a_layout_has_its_arena_first_and_travels() -> None:
    layout = Layout.of(START)

    assert [arena.dtype.name for arena in layout.arenas] == ["bfloat16", "float32"]
    assert Layout.from_frame(layout.to_frame()) == layout
    assert layout.gradient_bytes == 12 + 8


def test_without_ml_dtypes_a_layout_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Layout.of(START).to_frame()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)

    with pytest.raises(MalformedMessage, match=r"pip install '\.\[bfloat16\]'"):
        Layout.from_frame(frame)
    with pytest.raises(LayoutError, match="need the extra"):
        dtype_of(BFLOAT16)


def test_it_is_not_imported_by_those_who_do_not_use_it() -> None:
    code = (
        "import numpy, sys, distgrad; s = distgrad.DistributedGradients(optimizer=distgrad.Adam())\n"
        "s.set_model_parameters(numpy.zeros(3)); sys.exit('ml_dtypes' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("rule", [None, distgrad.SGD(lr=0.1, momentum=0.9), distgrad.Adam(lr=0.1)])
def test_an_update_is_that_of_float32_rounded_once(rule: Any) -> None:
    rng = np.random.default_rng(0)
    narrow = rng.normal(size=1000).astype(BF16)
    gradient = rng.normal(size=1000).astype(BF16)
    results = []
    for dtype in (BF16, np.dtype(np.float32)):
        holder = ParameterHolder(rule=rule, executor="numpy")
        holder.set_nest(narrow.astype(dtype))
        holder.apply([gradient.astype(dtype)])
        assert holder.storage is not None
        results.append(holder.storage.arenas[0])

    assert results[0].dtype == BF16
    assert results[0].tobytes() == results[1].astype(BF16).tobytes()


@pytest.mark.parametrize("shares_memory", [False, True])
@pytest.mark.parametrize("size", [3, 100_000])
def test_broker_and_worker_carry_it_by_socket_and_by_shared_memory(shares_memory: bool, size: int) -> None:
    with (
        Broker(parameters={"h": np.ones(size, BF16)}) as broker,
        Worker(broker.address, shares_memory=shares_memory) as worker,
    ):
        worker.pull()
        worker.push({"h": np.full(size, 0.5, np.float32)})
        with worker.slot() as gradients:
            gradients["h"][:] = 0.25
        worker.flush()

        found = worker.pull().parameters["h"]

    assert found.dtype == BF16
    assert (found.astype(np.float32) == 0.25).all()


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    with Broker(parameters=START) as broker, Worker(broker.address) as worker:
        worker.pull()
        worker.push({"h": np.full((2, 3), np.inf, BF16), "w": np.zeros(2)})

        with pytest.raises(GradientRefused, match="'h' holds inf"):
            worker.flush()


def test_a_broker_goes_on_with_it_after_a_restart_and_saves_it(tmp_path: Path) -> None:
    for restart in range(2):
        with (
            Broker(parameters=START, data=tmp_path / "run", optimizer=distgrad.Adam(lr=0.5)) as broker,
            Worker(broker.address, worker_id="w") as worker,
            Admin(broker.address) as admin,
        ):
            worker.pull()
            worker.push({"h": np.ones((2, 3), BF16), "w": np.ones(2, np.float32)})
            worker.flush()
            assert admin.status()["version"] == restart + 1
            found = worker.pull().parameters["h"]

    assert found.dtype == BF16
    np.testing.assert_allclose(found.astype(np.float32), np.arange(6).reshape(2, 3) - 1, atol=0.02)
