"""The Slurm script with real brokers and workers; ``srun`` and ``scontrol`` are stand-ins for one machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from support.ports import free_port
from support.processes import Process

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SCRIPT = DEPLOY / "slurm" / "distgrad.sbatch"

# Runs the command once for each task, as srun does with the job's tasks; signals reach them all, as with srun.
SRUN = """#!/bin/bash
tasks=$SLURM_NTASKS
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks=* ]] && tasks=${1#--ntasks=}
  shift
done
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((task = 0; task < tasks; task++)); do
  SLURM_PROCID=$task "$@" &
  pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do
  while :; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  ((code > worst)) && worst=$code
done
exit "$worst"
"""


def test_the_job_trains_to_the_end_and_leaves_the_model(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(DEPLOY / "training" / "train.py", tmp_path)
    environment = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
        "LISTEN": "127.0.0.1",
        "CONTROL_PORT": str(free_port()), "GRADIENTS_PORT": str(free_port()), "STEPS": "150",
    }  # fmt: skip

    def submit() -> Process:
        return Process(program=("bash", str(SCRIPT)), cwd=tmp_path, env=environment)

    # The job's time is over, which the script is told beforehand, and then it is submitted again.
    with submit() as job:
        job.wait_for_line(r"^healthy: ")
        job.terminate()
        assert job.wait() == 143
    with submit() as job:
        code = job.wait(100)

    assert code == 0, job.output()
    model = load_file(tmp_path / "run-17" / "model.safetensors")
    assert [*model["w"], *model["b"]] == pytest.approx([2.0, -1.0, 0.5], abs=0.3)
    assert any("version 300" in line for line in job.lines), job.output()


def test_the_script_passes_shellcheck() -> None:
    program = Path(sys.executable).parent / "shellcheck"
    if not program.exists():
        pytest.skip("shellcheck is not installed: make deployment")

    ended = subprocess.run([str(program), str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False)

    assert (ended.returncode, ended.stdout) == (0, "")
