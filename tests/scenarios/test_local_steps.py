"""The example with local steps learns with few exchanges, started by the lines that it shows."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from distgrad import Admin
from support.broker_process import broker_process
from support.processes import run

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install '.[demo]'")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_example_with_local_steps_learns_with_few_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    digits, example = (importlib.import_module(name) for name in ("digits", "local_steps"))
    lines = re.findall(r"^    distgrad (.+)$", example.__doc__ or "", re.MULTILINE)
    begin_broker, begin_workers = map(shlex.split, lines)

    with broker_process(*begin_broker[1:]) as (address, _), Admin(address) as admin:
        words = [address if word.startswith("tcp://") else word for word in begin_workers]
        done = run(*words, cwd=EXAMPLES)
        assert done.returncode == 0, done.stdout + done.stderr
        status, trained = admin.status(), admin.get_model_parameters()

    assert (status["version"], status["applied"]) == (example.EXCHANGES, 2 * example.EXCHANGES)
    assert digits.evaluate(trained, digits.load_data()[1])[1] > 0.94
