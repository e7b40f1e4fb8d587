"""The policy of docs/extending.md, as a user would have it: in Python, and by name from another distribution."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from distgrad import Admin
from distgrad.errors import ConfigError
from distgrad.policies import names
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.processes import Process

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
ZEROS = {"w": np.zeros(3, np.float32)}
ONES = {"w": np.ones(3, np.float32)}


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the page's policy under the page's line of registration, as pip would lay the files down."""
    (tmp_path / "quota_policy.py").write_text(block("python"))
    entry = block("toml").partition("\n")[2].replace('"', "")
    about = tmp_path / "quota_policy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: quota-policy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[distgrad.policies]\n{entry}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quota_policy", raising=False)
    return tmp_path


def push_four(address: str) -> tuple[int, float]:
    """Return how many of four gradients were superseded, and what became of the parameters."""
    with Worker(address) as worker:
        worker.initialize(ZEROS)
        for _ in range(4):
            worker.push(ONES)
        worker.flush(20)
        return worker.superseded, float(worker.pull().parameters["w"][0])


def test_a_policy_object_is_used_as_it_is_and_each_broker_has_its_own_copy(installed: Path) -> None:
    from quota_policy import Quota  # type: ignore[import-not-found]  # written by the fixture

    quota = Quota(limit=3)
    for _ in range(2):
        with Broker(policy=quota) as broker:
            assert push_four(broker.address) == (1, -3.0)


def test_a_registered_policy_has_a_name_and_settings_and_combines_with_a_bound(installed: Path) -> None:
    assert "quota" in names()
    with Broker(policy="quota", policy_settings="{limit = 2}", bound=8) as broker, Admin(broker.address) as admin:
        assert push_four(broker.address) == (2, -2.0)
        told = admin.status()["policy"]
        assert (told["policy"], told["limit"], told["bound"]) == ("quota", 2, 8)
        admin.set_parameters(policy="async")
        assert admin.status()["policy"]["policy"] == "async"


def test_its_own_error_reaches_the_user(installed: Path) -> None:
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        Broker(policy="quota", policy_settings="{limit = 0}")
    with pytest.raises(ConfigError, match="'quota' has no size; it takes limit"):
        Broker(policy="quota", policy_settings="{size = 1}")


def test_the_command_of_the_page_starts_such_a_broker(installed: Path) -> None:
    options = ("--policy", "quota", "--policy-settings", "{limit = 3}")
    assert "--policy quota --policy-settings '{limit = 3}'" in PAGE
    free = ("--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0")
    with Process("broker", *options, *free, env={"PYTHONPATH": str(installed)}) as process:
        address = process.wait_for_line(r"control=(\S+)")[1]
        assert push_four(address) == (1, -3.0)
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "sync", "quorum": 9, "max_workers": 8}, "quorum must be at most max_workers, 8, got 9"),
        ({"policy": "sync", "policy_settings": "quorum"}, "TOML inline table"),
        ({"policy": "sync", "policy_settings": "3"}, "TOML inline table"),
        ({"quorum": 2}, "quorum belongs to sync"),
        ({"policy": "sinc"}, "must be one of async, sync, bounded, buffered"),
    ],
)
def test_impossible_policies_are_refused_at_the_start(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Broker(**settings)  # type: ignore[arg-type]  # what a user may write


def test_a_policy_that_must_hold_more_than_the_queue_is_refused_at_the_start() -> None:
    with (
        pytest.raises(ConfigError, match=r"must hold 5 gradient.*raise it to at least 5120"),
        Broker(policy="sync", workers=5, queue_bytes=4096, parameters=ZEROS),
    ):
        pass
