"""A broker and workers as Ray actors, killed and back again, in a network that has loopback alone.

Ray listens on every interface, so each test's program runs in a network namespace of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.processes import Process

if find_spec("ray") is None:
    pytest.skip("needs the extra ray", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ray.md").read_text()
INITIALIZE = (
    'ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")'
)
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
ALONE = ("unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")

# Between two kills the broker is asked how far it is, so that each lands in the middle.
KILLS = """
    import os, signal
    def wait_for(version):
        while True:
            try:
                with running.admin(60) as admin:
                    if admin.status()["version"] >= version:
                        return
            except (ray.exceptions.RayError, distgrad.DistgradError) as error:
                print("meanwhile:", type(error).__name__)
    before = ray.get([actor.process_id.remote() for actor in (running.broker, running.workers[0])])
    wait_for(100)
    os.kill(before[1], signal.SIGKILL)
    wait_for(200)
    os.kill(before[0], signal.SIGKILL)
    wait_for(300)
    after = ray.get([running.broker.process_id.remote()])
    print("another broker:", after[0] != before[0])
"""


def run_alone(program: str, folder: Path, env: Mapping[str, str] | None = None) -> Process:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs `unshare` and `ip`")
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no network namespace can be made here")
    path = folder / "on_ray.py"
    path.write_text(program)
    return Process(program=(*ALONE, sys.executable, str(path)), cwd=folder, env={**ENVIRONMENT, **(env or {})})


@pytest.mark.timeout(300)
def test_the_program_of_the_page_trains_and_killed_actors_come_back(tmp_path: Path) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    changed = program.replace("ray.init()", INITIALIZE).replace("/var/tmp/distgrad-run", str(tmp_path / "run"))
    changed = changed.replace("import ray\n", "import ray\n\nimport distgrad\n", 1)
    head, tail = changed.split("        running.wait()\n")
    killed = "".join(f"    {line}\n" for line in KILLS.strip("\n").splitlines())

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {"TMPDIR": str(temporary), "RAY_TMPDIR": tempfile.gettempdir()}
    with run_alone(head + killed + "        running.wait()\n" + tail, tmp_path, env) as script:
        code = script.wait(250)

    assert code == 0, script.output()
    # Of the broker that was killed.
    assert len(list(temporary.glob("distgrad-keys-*"))) == 1
    assert "another broker: True" in script.lines
    # Two workers, 300 batches each, and each counted once.
    [last] = [line for line in script.lines if line.startswith("600 ")]
    w0, w1 = map(float, re.findall(r"-?\d+\.\d+", last))
    assert (w0, w1) == pytest.approx((2.0, -1.0), abs=0.1)


# The digits take some seconds only: the worker itself sees to it that it is killed in the middle, once.
DIGITS = f"""
import functools, os, pathlib, signal
import digits
import ray
from distgrad import Adam
from distgrad_broker import Broker
from distgrad_worker.ray import launch

def train(worker):
    was_killed = pathlib.Path(os.environ["WAS_KILLED"])
    if os.environ["DISTGRAD_RANK"] == "0" and not was_killed.exists():
        push, left = worker.push, iter(range(300))

        def push_or_be_killed(*gradients, **details):
            if next(left, None) is None:
                worker.flush()
                was_killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return push(*gradients, **details)

        worker.push = push_or_be_killed
    digits.train(worker)

if __name__ == "__main__":
    {INITIALIZE}
    broker = functools.partial(Broker, optimizer=Adam(lr=0.0005))
    with launch(train, workers=2, broker=broker) as running:
        running.wait()
        with running.admin() as admin:
            print("applied:", admin.status()["applied"])
            print("accuracy:", digits.evaluate(admin.get_model_parameters(), digits.load_data()[1])[1])
"""


@pytest.mark.timeout(300)
def test_the_digits_are_learnt_although_a_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install '.[demo]'")
    environment = {"PYTHONPATH": str(ROOT / "examples"), "WAS_KILLED": str(tmp_path / "killed")}

    with run_alone(DIGITS, tmp_path, environment) as script:
        assert script.wait(250) == 0, script.output()

    told = dict(line.split(": ") for line in script.lines if line.startswith(("applied", "accuracy")))
    # This example has no cursor, so the one that comes back begins again.
    assert int(told["applied"]) == 4000 + 300
    assert float(told["accuracy"]) > 0.95


FAILS = f"""
import functools, sys
import ray
from distgrad_broker import Broker
from distgrad_worker.ray import launch
from distgrad.errors import ConfigError

def train(worker):
    raise ValueError("of the user")

if __name__ == "__main__":
    for wrong in (dict(workers=0, broker=Broker), dict(workers=1, broker=Broker, keys="some.key")):
        try:
            launch(train, **wrong)
        except ConfigError as error:
            print("refused:", error)
    {INITIALIZE}
    with launch(train, workers=1, broker=Broker) as running:
        # Another's key, or none, is not let in.
        import distgrad
        try:
            with distgrad.Admin(running.address, timeout=1) as stranger:
                stranger.status()
        except distgrad.BrokerUnreachable:
            print("a stranger is kept out")
        try:
            running.wait(60)
        except ValueError as error:
            print("raised:", str(error).splitlines()[-1])
"""


@pytest.mark.timeout(200)
def test_errors_of_the_user_reach_the_launcher_and_strangers_reach_nothing(tmp_path: Path) -> None:
    with run_alone(FAILS, tmp_path) as script:
        assert script.wait(150) == 0, script.output()

    assert [line.split(":")[0] for line in script.lines if line.startswith("refused")] == ["refused", "refused"]
    assert "a stranger is kept out" in script.lines
    assert any(re.match(r"raised: .*of the user", line) for line in script.lines), script.output()
