"""The in-process class and its data folder: settings and checkpoints in it, and who may have it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import SGD, Adam, DistributedGradients
from distgrad.errors import (
    CheckpointError,
    ConfigError,
    DataFolderInUse,
)
from support.gates import WAIT_S
from support.random_nests import same


def files(folder: Path, kind: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(kind))


# Settings


def test_settings_in_force_come_back_unless_other_ones_are_given_than_the_last_time(tmp_path: Path) -> None:
    with DistributedGradients(optimizer=SGD(lr=1.0), data=tmp_path) as first:
        first.set_model_parameters(np.zeros(1))
        first.set_parameters("ascent", lr=0.25)
    with DistributedGradients(optimizer=SGD(lr=1.0), data=tmp_path) as second:
        assert (second.gradient_change_mode, second.optimizer) == ("ascent", SGD(lr=0.25))
    with DistributedGradients(optimizer=SGD(lr=0.75), data=tmp_path) as third:
        assert (third.gradient_change_mode, third.optimizer) == ("ascent", SGD(lr=0.75))
    with DistributedGradients("ascent", optimizer=Adam(lr=0.5), data=tmp_path) as fourth:
        assert (fourth.gradient_change_mode, fourth.optimizer) == ("ascent", Adam(lr=0.5))
        fourth.set_parameters("descent")
    with DistributedGradients("ascent", data=tmp_path) as fifth:
        assert (fifth.gradient_change_mode, fifth.optimizer) == ("descent", None)


def test_new_parameters_reset_the_optimizer_and_keep_version_and_numbers(tmp_path: Path) -> None:
    for _ in range(2):
        with DistributedGradients(optimizer=Adam(lr=0.5), data=tmp_path) as shared:
            before = shared.version
            shared.set_model_parameters(np.zeros(2))
            shared.start()
            shared.add_gradients(np.ones(2))
            shared.flush(WAIT_S)
            assert shared.version == before + 1
            assert shared.get_model_parameters().tolist() == pytest.approx([-0.5] * 2)


def test_adopted_arrays_are_kept_as_copies(tmp_path: Path) -> None:
    mine: dict[str, Any] = {"w": np.zeros((3, 2), np.float32).T, "b": np.zeros(2, np.float32), "n": np.arange(2)}
    with DistributedGradients(optimizer=SGD(lr=1.0, momentum=0.5), data=tmp_path) as first:
        first.set_model_parameters(mine, True)
        first.start()
        for _ in range(3):
            first.add_gradients({"w": np.arange(6.0).reshape(2, 3), "b": np.ones(2)})
        first.flush(WAIT_S)
    for _ in range(2):  # the journal's copies, then the checkpoint's
        with DistributedGradients(optimizer=SGD(lr=1.0, momentum=0.5), data=tmp_path) as second:
            assert {name: same(array, mine[name]) for name, array in second.get_model_parameters().items()} == {
                "w": True,
                "b": True,
                "n": True,
            }
        for path in tmp_path.glob("checkpoint-*"):
            path.unlink()


# The folder


def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    program = "import sys; from distgrad import DistributedGradients; DistributedGradients(data=sys.argv[1])"
    with DistributedGradients(data=tmp_path):
        with pytest.raises(DataFolderInUse) as refused:
            DistributedGradients(data=tmp_path)
        assert "destroy()" in str(refused.value.hint)
        other = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert "DataFolderInUse" in other.stderr
    DistributedGradients(data=tmp_path).destroy()


def test_a_brokers_folder_is_refused_and_a_broker_goes_on_from_ours(tmp_path: Path) -> None:
    from distgrad import Admin
    from distgrad_broker import Broker
    from distgrad_worker import Worker

    with DistributedGradients(optimizer=SGD(lr=0.5, momentum=0.9), data=tmp_path) as shared:
        shared.set_model_parameters({"w": np.zeros(2)})
        shared.add_gradients({"w": np.ones(2)})
    with Broker(optimizer=SGD(lr=0.5, momentum=0.9), data=tmp_path) as broker, Admin(broker.address) as admin:
        with Worker(broker.address, worker_id="w1") as worker:
            worker.push({"w": np.ones(2)})
            worker.flush(WAIT_S)
        assert admin.status()["version"] == 2
        assert admin.get_model_parameters()["w"].tolist() == pytest.approx([-0.5 - 0.5 * 1.9] * 2)
    with pytest.raises(ConfigError, match="data folder of a broker, with the workers 'w1'"):
        DistributedGradients(data=tmp_path)


def test_a_folder_that_is_a_file_or_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="a file is in its place"):
        DistributedGradients(data=file)
    folder = tmp_path / "folder"
    with DistributedGradients(data=folder) as shared:
        shared.set_model_parameters(np.zeros(1000))
        shared.start()
        for _ in range(3):
            shared.add_gradients(np.ones(1000))
            shared.flush(WAIT_S)
    for path in folder.glob("checkpoint-*"):
        path.unlink()
    [segment] = folder.glob("journal-*")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        DistributedGradients(data=folder)
    DistributedGradients(data=tmp_path / "other").destroy()


def test_the_last_checkpoint_has_everything_and_none_is_written_for_nothing(tmp_path: Path) -> None:
    with DistributedGradients(data=tmp_path) as shared:
        shared.set_model_parameters(np.zeros(3))
    checkpoints = files(tmp_path, "checkpoint-")
    assert len(checkpoints) == 1
    with DistributedGradients(data=tmp_path):
        pass
    assert files(tmp_path, "checkpoint-") == checkpoints


@pytest.mark.parametrize("name", ["CHECKPOINT_S", "CHECKPOINT_BYTES"])
def test_checkpoints_are_written_now_and_then_and_the_journal_behind_them_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(f"distgrad.local_journal.{name}", {"CHECKPOINT_S": 0.1, "CHECKPOINT_BYTES": 20_000_000}[name])
    gradient = np.ones(400_000)
    with DistributedGradients(data=tmp_path, optimizer=Adam(lr=0.1), max_queue=4) as shared:
        shared.set_model_parameters(np.zeros(400_000))
        shared.start()
        while "journal-00000000000000000001.log" in files(tmp_path, "journal-") and shared.version < 1_000:
            shared.add_gradients(gradient)
        assert shared.version < 1_000
        shared.flush(WAIT_S)
        version, parameters = shared.version, shared.get_model_parameters()
    assert len(files(tmp_path, "checkpoint-")) == 2
    with DistributedGradients(data=tmp_path, optimizer=Adam(lr=0.1)) as again:
        assert again.version == version
        assert again.get_model_parameters().tobytes() == parameters.tobytes()


def test_the_journal_of_many_short_runs_does_not_grow(tmp_path: Path) -> None:
    for _ in range(5):
        with DistributedGradients(data=tmp_path) as shared:
            shared.set_model_parameters(np.zeros(3))
            shared.start()
            shared.add_gradients(np.ones(3))
            shared.flush(WAIT_S)
        segments = files(tmp_path, "journal-")
        assert len(segments) <= 3
    assert "journal-00000000000000000001.log" not in segments
