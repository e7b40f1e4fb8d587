"""``distgrad replay`` and ``distgrad journal``: what a person types and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distgrad import Adam, DistributedGradients
from distgrad.command import main
from distgrad.data_command import journal, replay
from distgrad.errors import GradientRefused
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.gates import WAIT_S

HOSTILE = "\x1b[31mred\n[bold]not markup[/bold]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers, five updates, one refusal, and a cursor that would steer a terminal."""
    path = tmp_path_factory.mktemp("run") / "data"
    with (
        Broker(parameters={"w": np.zeros(4), "n": np.arange(2)}, optimizer=Adam(lr=0.1), data=path) as broker,
        Worker(broker.address, worker_id="[red]one[/red]") as one,
        Worker(broker.address, worker_id="two") as two,
    ):
        for number in range(4):
            one.push({"w": np.ones(4)}, cursor=HOSTILE + str(number), loss=0.25)
        one.flush(WAIT_S)
        two.push({"w": np.ones(4)}, cursor=b"\x00\x01")
        two.flush(WAIT_S)
        two.push({"w": np.full(4, np.inf)})
        with pytest.raises(GradientRefused):
            two.flush(WAIT_S)
    return path


def run(command: Any, *words: object) -> Any:
    return CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)


def test_replay_writes_the_newest_version_or_the_one_that_is_named(folder: Path, tmp_path: Path) -> None:
    newest = run(replay, folder, "--out", tmp_path / "newest.npz")
    third = run(replay, folder, "--until", 3, "--out", tmp_path / "third.safetensors")

    assert newest.exit_code == third.exit_code == 0
    assert newest.stdout.startswith(f"wrote {tmp_path / 'newest.npz'}: version 5, from the checkpoint of version 5")
    assert "version 3, from the beginning and" in third.stdout
    assert "; computed by num" in third.stdout
    with np.load(tmp_path / "newest.npz") as arrays:
        assert arrays["w"].tolist() == pytest.approx([-0.5] * 4, rel=1e-6)
        assert arrays["n"].tolist() == [0, 1]


def test_replay_warns_if_another_executor_repeats_the_updates(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    result = run(replay, folder, "--until", 2, "--executor", "numpy", "--out", tmp_path / "p.npz")

    assert result.exit_code == 0
    assert "warning: the updates were computed by numba and repeated by numpy" in result.stderr
    assert run(replay, folder, "--until", 2, "--out", tmp_path / "p.npz").stderr == ""


def test_replay_refuses_what_it_cannot_do_with_a_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        (["replay", folder, "--until", 6, "--out", tmp_path / "p.npz"], "version 6 is not in"),
        (["replay", folder, "--out", tmp_path / "p.txt"], "must end in .safetensors or .npz"),
        (["replay", tmp_path, "--out", tmp_path / "p.npz"], "is no data folder"),
        (["journal", tmp_path / "nowhere"], "cannot read the data folder"),
    ):
        assert main(list(map(str, words))) == 2
        assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_replay_warns_of_a_damaged_checkpoint_and_uses_an_older_one(tmp_path: Path) -> None:
    for _ in range(2):
        with DistributedGradients(data=tmp_path / "data") as shared:
            shared.set_model_parameters(np.zeros(4))
            shared.start()
            shared.add_gradients(np.ones(4))
            shared.flush(WAIT_S)
    newest = max((tmp_path / "data").glob("checkpoint-*"))
    newest.write_bytes(newest.read_bytes()[:-1])

    result = run(replay, tmp_path / "data", "--out", tmp_path / "p.npz")

    assert result.exit_code == 0
    assert f"warning: {newest} is damaged, an older checkpoint was used" in result.stderr
    assert "version 2, from the checkpoint of version 1" in result.stdout


def test_journal_shows_files_and_statistics(folder: Path) -> None:
    result = run(journal, folder, "--verify")

    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    for expected in (
        "gradients of [red]one[/red] │ 4",
        "gradients of two │ 2",
        "decisions applied │ 5",
        "decisions refused │ 1",
        "versions │ 0 to 5",
        "verified: every byte",
    ):
        assert expected in words


def test_journal_shows_the_last_records_with_what_peers_wrote_escaped(folder: Path) -> None:
    everything = run(journal, folder, "--records", 100).stdout
    lines = everything.splitlines()

    assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1))
    assert "\x1b" not in everything
    [gradient] = [line for line in lines if "number=3 " in line]
    assert 'worker="[red]one[/red]"' in gradient or "worker=[red]one[/red]" in gradient
    assert r'cursor="\u001b[31mred\n[bold]not markup[/bold]2"' in gradient
    assert "loss=0.25" in gradient
    assert "bytes=32" in gradient
    assert any("cursor=0001" in line for line in lines)
    assert any("refused=two:2(not_finite)" in line for line in lines)
    assert len(run(journal, folder, "--records", 2).stdout.splitlines()) == 2
    assert len(run(journal, folder, "--records").stdout.splitlines()) == min(20, len(lines))


def test_journal_is_one_line_of_json(folder: Path) -> None:
    result = run(journal, folder, "--json", "--records", 3)
    found = json.loads(result.stdout)

    assert result.stdout.count("\n") == 1
    assert found["gradients"] == {"[red]one[/red]": 4, "two": 2}
    assert found["outcomes"] == {"applied": 5, "refused": 1}
    assert (found["versions"], found["payload_bytes"], found["damaged"]) == ([0, 5], 192, [])
    assert len(found["last"]) == 3
    assert found["last"][-1]["kind"] == "left"
    assert [segment["first"] for segment in found["segments"]] == [1]
    assert [checkpoint["version"] for checkpoint in found["checkpoints"]] == [5]


def test_journal_names_what_is_damaged_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DistributedGradients(data=tmp_path) as shared:
        shared.set_model_parameters(np.zeros(4))
    [checkpoint] = tmp_path.glob("checkpoint-*")
    content = bytearray(checkpoint.read_bytes())
    content[-1] ^= 1
    checkpoint.write_bytes(content)

    assert main(["journal", str(tmp_path)]) == 0
    assert main(["journal", str(tmp_path), "--verify"]) == 1
    assert f"damaged: {checkpoint} is damaged" in capsys.readouterr().err
    [segment] = tmp_path.glob("journal-*")
    segment.write_bytes(segment.read_bytes()[:-8])
    checkpoint.unlink()
    assert main(["journal", str(tmp_path), "--verify"]) == 0
    assert "is torn at byte" in capsys.readouterr().err
