"""Any version of a killed, reconfigured and restarted broker's run is rebuilt as it was seen live, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad import Reader
from distgrad.durable.disk import OsDisk
from distgrad.durable.rebuild import rebuild
from distgrad.errors import ConfigError
from distgrad_worker import Worker
from support.durable_broker import DurableBroker
from support.processes import run

Live = dict[int, dict[str, bytes]]
"""What was seen of each version, after it was settled; the last state where parameters were replaced."""

OPTIONS = {
    "async": [],
    "sync": ["--policy", "sync", "--workers", "2"],
    "scaled": ["--staleness-scaling", "inverse", "--reduction", "sum"],
}
RULES = {
    "adam": ["--optimizer", "adam", "--lr", "0.1"],
    "momentum": ["--optimizer", "sgd", "--lr", "0.1", "--momentum", "0.9", "--nesterov"],
    "none": [],
}
START = {
    "layers": [{"w": np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)}, {"h": np.ones(33, np.float16)}],
    "b": np.linspace(-1, 1, 77),
    "steps": np.arange(5),
    "flags": np.array([True, False]),
}


def in_bytes(nest: Any) -> dict[str, bytes]:
    w, h = nest["layers"][0]["w"], nest["layers"][1]["h"]
    return {name: array.tobytes() for name, array in {**nest, "layers": w, "h": h}.items()}


class Run:
    """Two workers of a broker, and what was seen of it."""

    def __init__(self, broker: DurableBroker) -> None:
        self.broker = broker
        self.live: Live = {}
        self._random = np.random.default_rng(5)

    def __enter__(self) -> Run:
        self.workers = [Worker(self.broker.address, worker_id=f"w{number}") for number in range(2)]
        self.reader = Reader(self.broker.address)
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        for worker in self.workers:
            worker.close()

    def look(self) -> None:
        snapshot = self.reader.get()
        self.live[snapshot.version] = in_bytes(snapshot.parameters)

    def train(self, n_steps: int) -> None:
        """Let both workers push on what they pulled, and look at what came of it."""
        for _ in range(n_steps):
            for number, worker in enumerate(self.workers):
                worker.pull()
                gradient = {
                    "layers": [
                        {"w": self._random.normal(size=(20, 30))},
                        {"h": self._random.normal(size=33).astype(np.float16)},
                    ],
                    "b": self._random.normal(size=77),
                }
                worker.push(gradient, cursor=f"{number}", loss=0.5)
            for worker in self.workers:
                worker.flush(60)
            self.look()

    def check(self, versions: list[int] | None = None) -> None:
        """Rebuild versions, and compare them with what was seen."""
        for version in versions or sorted(self.live):
            rebuilt = rebuild(OsDisk(), str(self.broker.data), version)
            found = rebuilt.holder.nest()
            rebuilt.holder.close()
            assert in_bytes(found) == self.live[version], f"version {version}"
            assert rebuilt.other_executors == []


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ("async", "adam"),
        pytest.param("sync", "momentum", marks=pytest.mark.slow),
        pytest.param("scaled", "none", marks=pytest.mark.slow),
    ],
)
def test_every_version_is_rebuilt_as_it_was_seen(tmp_path: Path, policy: str, rule: str) -> None:
    data = tmp_path / "data"
    with DurableBroker(data, *OPTIONS[policy], *RULES[rule]) as broker, Run(broker) as seen:
        with broker.admin() as admin:
            admin.set_model_parameters(START)
        seen.look()
        seen.train(4)
        with broker.admin() as admin:
            admin.set_parameters("ascent", **({} if rule == "none" else {"lr": 0.03}))
        seen.train(3)
        seen.check([min(seen.live), max(seen.live)])  # while the broker runs
        broker.kill()
        broker.start()
        seen.train(3)
        with broker.admin() as admin:
            admin.set_model_parameters({**START, "b": np.zeros(77)})
        seen.look()
        seen.train(3)
        broker.kill()
        broker.start()
        seen.train(2)
        newest = max(seen.live)
        broker.stop()

        seen.check()
        rebuilt = run("replay", data, "--out", tmp_path / "newest.npz")
        assert rebuilt.returncode == 0, rebuilt.stderr
        assert f"version {newest}" in rebuilt.stdout
        with np.load(tmp_path / "newest.npz") as arrays:
            assert arrays["layers.0.w"].tobytes() == seen.live[newest]["layers"]
            assert arrays["steps"].tolist() == START["steps"].tolist()  # type: ignore[attr-defined]


def test_what_old_checkpoints_took_along_is_out_of_reach_and_the_range_is_told(tmp_path: Path) -> None:
    options = ["--checkpoint-updates", "5", "--segment-bytes", "4096", *RULES["adam"]]
    with DurableBroker(tmp_path / "data", *options) as broker, broker.admin() as admin, Run(broker) as seen:
        admin.set_model_parameters(START)
        seen.train(20)
        broker.stop()
        lowest = min(int(path.stem.rpartition("-")[2]) for path in broker.data.glob("checkpoint-*.safetensors"))
        assert lowest > 0
        seen.check([version for version in seen.live if version >= lowest])
        for version in (0, lowest - 1, 41):
            with pytest.raises(ConfigError, match=rf"version {version} is not in .*, which has \d+ to 40"):
                rebuild(OsDisk(), str(broker.data), version)


def test_a_folder_without_a_journal_has_the_versions_of_its_checkpoints(tmp_path: Path) -> None:
    options = ["--durability", "checkpoint", "--checkpoint-updates", "10"]
    with DurableBroker(tmp_path / "data", *options) as broker, broker.admin() as admin, Run(broker) as seen:
        admin.set_model_parameters(START)
        seen.train(3)
        version = max(seen.live)
        seen.check([version])
        with pytest.raises(ConfigError, match=rf"only those of its checkpoints: .*{version}"):
            rebuild(OsDisk(), str(broker.data), version + 1)


def test_replay_follows_a_broker_that_goes_on_writing(tmp_path: Path) -> None:
    options = ["--checkpoint-updates", "20", "--segment-bytes", "65536", *RULES["momentum"]]
    with DurableBroker(tmp_path / "data", *options) as broker, broker.admin() as admin, Run(broker) as seen:
        admin.set_model_parameters(START)
        zeros = {"layers": [{"w": np.ones((20, 30))}, {"h": np.zeros(33)}], "b": np.ones(77)}
        before = -1
        for _ in range(15):
            for _ in range(40):
                seen.workers[0].push(zeros)
            rebuilt = rebuild(OsDisk(), str(broker.data))
            assert rebuilt.holder.version >= before
            before = rebuilt.holder.version
            rebuilt.holder.close()
            assert run("journal", broker.data, "--verify", "--json").returncode == 0 if before % 3 == 0 else True
