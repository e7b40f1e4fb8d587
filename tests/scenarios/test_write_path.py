"""A broker killed at every call that changes its disk: what it had told to be settled is there, to the bit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distgrad import Adam
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import OsDisk
from distgrad.durable.recovery import recover
from distgrad.holder import ParameterHolder
from support.killing_disk import AFTER, BEFORE, MIDDLE
from support.processes import clean_environment

COUNT = 15
TESTS = Path(__file__).resolve().parents[1]


def run(folder: Path, at: int, when: str) -> tuple[int, str]:
    """Push to a broker that is killed; give the exit code and what was printed."""
    ended = subprocess.run(
        [sys.executable, "-m", "support.killing_disk", str(folder), str(at), when, str(COUNT)],
        cwd=TESTS,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode in (0, -9), ended.stderr
    return ended.returncode, ended.stdout


def settled_of(printed: str) -> int:
    return max((int(number) for number in re.findall(r"^settled (\d+)$", printed, re.M)), default=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """How many calls a run has, and the bytes that it ends with."""
    code, printed = run(tmp_path_factory.mktemp("calm") / "data", 0, BEFORE)
    assert code == 0
    return int(re.findall(r"^calls (\d+)$", printed, re.M)[0]), re.findall(r"^bytes (.*)$", printed, re.M)[0]


def check(folder: Path, at: int, when: str, expected: str) -> None:
    """Kill at one call; look at what can be recovered; then go on to the end."""
    code, printed = run(folder, at, when)
    settled = settled_of(printed)
    # Calls differ a little from run to run: how many records one sync takes is a matter of time.
    if code != 0:
        data = DataFolder(OsDisk(), str(folder))
        holder = ParameterHolder(rule=Adam(lr=0.01))
        recovered = recover(OsDisk(), data, holder)
        data.close()
        assert holder.version >= settled, (at, when)
        if settled:
            assert recovered.books.members["w"].decided >= settled
        code, printed = run(folder, 0, BEFORE)
        assert code == 0
    assert re.findall(r"^bytes (.*)$", printed, re.M) == [expected], (at, when)


@pytest.mark.parametrize("when", [MIDDLE])
def test_a_kill_at_some_calls_loses_nothing_that_was_settled(
    tmp_path: Path, undisturbed: tuple[int, str], when: str
) -> None:
    calls, expected = undisturbed
    check(tmp_path, calls // 2 + len(when), when, expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", [BEFORE, MIDDLE, AFTER])
def test_a_kill_at_every_call_loses_nothing_that_was_settled(
    tmp_path: Path, undisturbed: tuple[int, str], when: str
) -> None:
    calls, expected = undisturbed
    for at in range(1, calls + 5):
        check(tmp_path / f"{at}", at, when, expected)
