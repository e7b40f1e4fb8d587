"""``distgrad worker`` runs the user's function in processes that reach a real broker."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distgrad.admin import Admin
from support.processes import Process, clean_environment

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and sessions are POSIX")

# As the installed command does, this looks for its own imports everywhere but in the user's folder.
WORKER = (sys.executable, "-P", "-m", "distgrad", "worker")
HOSTILE = "raise SystemExit('the user\\'s own file was imported in place of a library')\n"
TRAIN = """\
import os, numpy as np
def train(worker):
    rank, world = int(os.environ["DISTGRAD_RANK"]), int(os.environ["DISTGRAD_WORLD"])
    worker.initialize({"w": np.zeros(4)})
    gradient = np.zeros(4)
    gradient[rank] = -1
    for _ in range(5):
        worker.push({"w": gradient})
    print("I am", worker.worker_id, rank, "of", world)
"""


@pytest.fixture
def broker() -> Iterator[str]:
    """Run a broker process; return its control address."""
    with Process("broker", "--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0") as process:
        yield process.wait_for_line(r"control=(\S+)")[1]


def run(*words: str, cwd: Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``distgrad worker`` to its end."""
    done = subprocess.run(
        [*WORKER, *words], cwd=cwd, env=clean_environment(**env), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def parameters(address: str) -> np.ndarray:
    with Admin(address) as admin:
        w = admin.get_model_parameters()["w"]
    assert isinstance(w, np.ndarray)
    return w


def workers(address: str) -> dict[str, int]:
    with Admin(address) as admin:
        return {worker["id"]: worker["settled"] for worker in admin.workers()}


def test_the_users_own_worker_and_broker_modules_are_the_ones_that_run(broker: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("import broker\n" + TRAIN)
    (tmp_path / "broker.py").write_text("print('the user\\'s broker')")
    for library in ("random", "queue", "zmq", "click", "msgpack"):
        (tmp_path / f"{library}.py").write_text(HOSTILE)

    done = run(broker, "worker:train", "--processes", "2", "--id", "w", cwd=tmp_path)

    assert sorted(done.stdout.splitlines()) == [
        "w-0 | I am w-0 0 of 2",
        "w-0 | the user's broker",
        "w-1 | I am w-1 1 of 2",
        "w-1 | the user's broker",
    ]
    assert parameters(broker).tolist() == [5, 5, 0, 0], "the workers were flushed when the function returned"


def test_several_machines_share_one_world(broker: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(TRAIN)
    options = ("--processes", "2", "--world", "4", "--id", "w")

    first = run(broker, "job:train", *options, cwd=tmp_path)
    second = run(broker, "job:train", *options, "--first-rank", "2", cwd=tmp_path)

    assert sorted((first.stdout + second.stdout).splitlines()) == [f"w-{n} | I am w-{n} {n} of 4" for n in range(4)]
    assert parameters(broker).tolist() == [5, 5, 5, 5]


def test_a_process_that_crashed_comes_back_under_its_id(broker: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        TRAIN
        + """
def crash_once(worker):
    is_first = not os.path.exists("marker")
    open("marker", "w").close()
    train(worker)
    worker.flush()
    if is_first:
        os.kill(os.getpid(), 9)
"""
    )

    done = run(broker, "job:crash_once", "--id", "w", cwd=tmp_path)

    assert "w-0 | distgrad: ended by SIGKILL; restart 1 of 3 in 0.5 s" in done.stderr
    assert workers(broker) == {"w-0": 10}
    assert parameters(broker).tolist() == [10, 0, 0, 0]


def test_restarts_are_bounded_by_the_option(broker: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("def train(worker): print('try'); raise ValueError('always')")

    done = run(broker, "job:train", "--max-restarts", "1", "--id", "w", cwd=tmp_path, code=70)

    assert done.stdout == "w-0 | try\n" * 2
    assert done.stderr.count("ValueError: always") == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_function_and_what_it_pushed_is_kept(
    broker: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "job.py").write_text(TRAIN + "    import time\n    while True: time.sleep(60)\n")
    with Process(broker, "job:train", "--processes", "2", "--id", "w", cwd=tmp_path, program=WORKER) as process:
        for _ in range(2):
            process.wait_for_line("I am")

        os.kill(process.pid, number)

        assert process.wait() == code
    assert parameters(broker).tolist() == [5, 5, 0, 0]


def test_an_id_that_another_run_took_is_not_fought_over(broker: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        """\
import numpy as np
def hold(worker):
    print("ready")
    while True:
        worker.initialize({"w": np.zeros(4)})
        worker.push({"w": np.zeros(4)})
        worker.flush()
def take(worker):
    pass
"""
    )
    with Process(broker, "job:hold", "--id", "w", cwd=tmp_path, program=WORKER) as holder:
        holder.wait_for_line("ready")

        run(broker, "job:take", "--id", "w", cwd=tmp_path)

        assert holder.wait() == 1
    [line] = [line for line in holder.lines if "ready" not in line]
    assert line.startswith("w-0 | distgrad: ")
    assert line.endswith("; not restarted")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("job",), "write for example job:train"),
        (("nothing:train",), "error: there is no module 'nothing' in "),
        (("job:nothing",), "error: {folder}/job.py has no 'nothing'; it defines train"),
        (("job:train", "--first-rank", "2", "--world", "3", "--processes", "2"), "--world must be at least"),
        (("job:train", "--keys", "no.key"), "no.key"),
    ],
)
def test_wrong_usage_is_one_line_however_many_processes(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    (tmp_path / "job.py").write_text(TRAIN)

    done = run("tcp://127.0.0.1:1", "--processes=4", *words, cwd=tmp_path, code=2)

    error, *hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert message.format(folder=tmp_path) in error
    assert len(hint) <= 1
    assert done.stdout == ""


def test_processes_share_the_cores_unless_told_otherwise(broker: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import os\ndef train(worker): print(os.environ['OMP_NUM_THREADS'])")
    many = ("--processes", str(2 * (os.cpu_count() or 1)))

    shared = run(broker, "job:train", *many, cwd=tmp_path)
    told = run(broker, "job:train", *many, cwd=tmp_path, OMP_NUM_THREADS="3")

    assert set(re.findall(r"\| (.*)", shared.stdout)) == {"1"}
    assert set(re.findall(r"\| (.*)", told.stdout)) == {"3"}
