"""The programs on the page about data folders do what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import Adam, DistributedGradients

PAGE = Path(__file__).resolve().parents[1] / "docs" / "replay.md"


def test_the_program_goes_on_where_it_was_and_its_versions_can_be_had_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, in_one_process = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    computed: list[int] = []

    def compute(model: Any, number: int) -> Any:
        computed.append(number)
        return {"w": model["w"] - number}

    names = {
        **{"DistributedGradients": DistributedGradients, "Adam": Adam, "start": {"w": np.zeros(3)}},
        **{"compute": compute, "n_batches": 4},
    }
    exec(in_one_process, names)
    exec(in_one_process, {**names, "n_batches": 6})

    assert computed == [0, 1, 2, 3, 4, 5]
    found: dict[str, Any] = {}
    exec(again.replace("until=1200", "until=6"), found)
    with DistributedGradients(optimizer=Adam(lr=0.05), data="run") as shared:
        assert found["parameters"]["w"].tolist() == shared.get_model_parameters()["w"].tolist()
