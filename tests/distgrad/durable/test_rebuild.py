"""Versions from a data folder: each as it was, or a sentence about why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import SGD, Adam, DistributedGradients
from distgrad.durable.described import read_header
from distgrad.durable.disk import OsDisk
from distgrad.durable.journal_reader import read
from distgrad.durable.rebuild import rebuild
from distgrad.errors import ConfigError, DataDamaged
from distgrad.policies import Buffered
from distgrad.rules import Rule
from support.gates import WAIT_S


def train(folder: Path, n_gradients: int, **more: Any) -> list[bytes]:
    """Train in one go; return every version's parameters."""
    versions = []
    random = np.random.default_rng(3)
    with DistributedGradients(data=folder, **more) as shared:
        shared.set_model_parameters(np.zeros(50, np.float32))
        shared.start()
        for _ in range(n_gradients):
            versions.append(shared.get_model_parameters().tobytes())
            shared.add_gradients(random.normal(size=50))
            shared.flush(WAIT_S)
        versions.append(shared.get_model_parameters().tobytes())
    return versions


def rebuilt(folder: Path, until: int | None = None, **more: Any) -> tuple[int, bytes, Sequence[str]]:
    found = rebuild(OsDisk(), str(folder), until, **more)
    parameters = found.holder.nest().tobytes()
    found.holder.close()
    return found.holder.version, parameters, found.other_executors


@pytest.mark.parametrize("rule", [None, Adam(lr=0.1), SGD(lr=0.1, momentum=0.9)])
def test_every_version_comes_back(tmp_path: Path, rule: Rule | None) -> None:
    versions = train(tmp_path, 6, optimizer=rule)

    for version, expected in enumerate(versions):
        assert rebuilt(tmp_path, version) == (version, expected, [])
    assert rebuilt(tmp_path) == (6, versions[6], [])


def test_a_buffers_mean_comes_back(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path, policy=Buffered(3)) as shared:
        shared.set_model_parameters(np.zeros(5, np.float32))
        shared.start()
        for factor in range(7):
            shared.add_gradients(factor * np.ones(5))
        shared.flush(WAIT_S)
        expected = shared.get_model_parameters().tobytes()
        assert shared.version == 3
    assert rebuilt(tmp_path, 3)[1] == expected


def test_of_several_states_of_a_version_it_is_the_last(tmp_path: Path) -> None:
    train(tmp_path, 2)
    with DistributedGradients(data=tmp_path) as shared:
        shared.set_model_parameters(np.arange(3.0))
    assert rebuilt(tmp_path, 2)[1] == np.arange(3.0).tobytes()


def test_another_executor_is_told(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    train(tmp_path, 3, optimizer=Adam(lr=0.1))

    assert rebuilt(tmp_path, 2, executor="numpy")[2] == ["numba"]
    assert rebuilt(tmp_path, 2, executor="numba")[2] == []
    assert rebuilt(tmp_path, 3, executor="numpy")[2] == [], "the checkpoint's own version is only read"


def test_a_version_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    train(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"version 4 is not in .*, which has 0 to 3"):
        rebuilt(tmp_path, 4)
    for path in sorted(tmp_path.glob("journal-*"))[:1]:
        path.unlink()
    assert rebuilt(tmp_path, 3)[0] == 3
    with pytest.raises(ConfigError, match=r"version 1 is not in .*, which has 3 to 3"):
        rebuilt(tmp_path, 1)


def test_parameters_that_were_taken_away_are_said_to_be(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as shared:
        assert shared.get_model_parameters() is None
    with pytest.raises(ConfigError, match="there are no parameters in"):
        rebuilt(tmp_path)
    with DistributedGradients(data=tmp_path) as shared:
        shared.set_model_parameters(np.zeros(3))
        shared.start()
        shared.add_gradients(np.ones(3))
        shared.add_gradients(np.ones(3))
        shared.flush(WAIT_S)
        shared.set_model_parameters(None)
    with pytest.raises(ConfigError, match="version 2 has no parameters any more"):
        rebuilt(tmp_path)
    assert rebuilt(tmp_path, 1)[1] == np.full(3, -1.0).tobytes()


def test_damage_on_the_way_is_told_with_the_command_that_shows_it(tmp_path: Path) -> None:
    versions = train(tmp_path, 4)
    [record] = [
        record
        for record in read(OsDisk(), str(tmp_path), 1)
        if (told := read_header(record.header)).kind == "decided" and told.message["version"] == 2
    ]
    content = bytearray(Path(record.path).read_bytes())
    content[record.offset + 60] ^= 1
    Path(record.path).write_bytes(content)

    assert rebuilt(tmp_path, 1)[1] == versions[1], "what comes before the damage is whole"
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    with pytest.raises(DataDamaged) as damaged:
        rebuilt(tmp_path)
    assert damaged.value.hint == f"`distgrad journal {tmp_path} --verify` shows all that is damaged"


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distgrad.durable.recovery._REPORT_EVERY", 2)
    train(tmp_path, 4)
    told: list[tuple[int, int]] = []

    rebuilt(tmp_path, 3, on_progress=lambda records, version: told.append((records, version)))

    assert told[-1][1] == 3
