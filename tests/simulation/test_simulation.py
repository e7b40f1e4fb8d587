"""Brokers, workers, network, disk and clocks in a world that fails them: what was settled stays, and counts once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulation import checks
from simulation.broker_process import BrokerProcess
from simulation.clockwork import Violation
from simulation.mutations import MUTATIONS, ROOT
from simulation.plan import ENDS_BROKER, FAULTS, GRADIENTS, make_plan
from simulation.run import report, shrink, try_seed
from simulation.world import run_seed

# What `make test` has time for, in steps that name a failure soon.
STEP = 10
SEEDS = range(0, 70, STEP)


@pytest.mark.parametrize("first", SEEDS)
def test_everything_is_settled_once_whatever_fails(first: int) -> None:
    for seed in range(first, first + STEP):
        world = run_seed(seed)
        assert world.counts["pushed"] >= GRADIENTS, f"seed {seed}"


@pytest.mark.parametrize("seed", [3, 17])
def test_a_seed_happens_in_the_same_way_again(seed: int) -> None:
    once, again = run_seed(seed, traces=True), run_seed(seed, traces=True)

    assert once.trace
    assert once.trace == again.trace
    assert once.counts == again.counts


def test_a_trace_changes_nothing() -> None:
    silent, traced = run_seed(5), run_seed(5, traces=True)

    assert (silent.now, silent.happened, silent.counts) == (traced.now, traced.happened, traced.counts)


def test_incidents_can_be_left_out() -> None:
    plan = make_plan(5)
    everything = {incident.index for incident in plan.incidents}

    world = run_seed(5, without=everything)

    assert world.counts["incidents"] == 0
    assert world.counts["kills"] + world.counts["power cuts"] == 0


def test_every_plan_has_workers_gradients_and_faults_enough() -> None:
    for seed in range(200):
        plan = make_plan(seed)
        faults = [incident.kind for incident in plan.incidents if incident.kind in FAULTS]
        assert set(faults) & set(ENDS_BROKER), f"seed {seed}"
        assert plan.n_workers >= 3
        assert len(faults) >= 5
        assert plan.n_workers * plan.quota >= GRADIENTS >= 200


def test_planted_faults_fit_the_code() -> None:
    for mutation in MUTATIONS:
        for path, old, _ in mutation.edits:
            assert (ROOT / path).read_text().count(old) == 1, f"{mutation.name}: {path}"


def test_a_failing_seed_is_told_with_its_trace_and_the_incidents_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_after_a_restart(broker: BrokerProcess) -> None:
        if broker.number > 1 and not broker.world.is_ending:
            raise Violation("planted")

    monkeypatch.setattr(checks, "check_state", fail_after_a_restart)
    _, failure = try_seed(7)
    assert failure is not None

    report(7, failure, lines=20)
    without, _ = shrink(7, failure)

    told = capsys.readouterr().out
    needed = [incident for incident in make_plan(7).incidents if incident.index not in without]
    assert len(needed) == 1
    assert "seed 7 failed: Violation: planted" in told
    assert f"it still fails with only these incidents: {needed[0].index}: {needed[0].kind}" in told
    assert "broker 2   begins at version" in told


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_ten_thousand_seeds() -> None:
    command = [sys.executable, "-m", "simulation.run", "--seeds=10000", "--first=1000", "--jobs=2"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=7_000, check=False
    )

    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]
