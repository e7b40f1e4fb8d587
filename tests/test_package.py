"""The packages as others get them: what is importable, what the archives hold, and what a bare environment can do."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "distgrad": ROOT / "distgrad" / "distgrad",
    "distgrad_broker": ROOT / "broker" / "distgrad_broker",
    "distgrad_worker": ROOT / "worker" / "distgrad_worker",
}
# A user's own modules, named as ours are tempted to be. The broker's says so at once if it is imported.
USERS_BROKER = "raise SystemExit('the user\\'s broker.py was imported')\n"
USERS_WORKER = """\
import numpy as np

def train(worker):
    worker.initialize({"w": np.zeros(3)})
    worker.push({"w": np.ones(3)})
    worker.flush()
    print("the user's train ran", worker.pull().parameters["w"])
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_a_source_root_holds_one_package_and_a_readme(name: str) -> None:
    held = {path.name for path in PACKAGES[name].parent.iterdir() if path.name != "__pycache__"}

    assert held == {name, "README.md"}, "anything else would leak into every developer's path and miss from the wheel"


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_under_test_is_this_checkout(name: str) -> None:
    module = importlib.import_module(name)

    assert module.__file__ is not None, "an empty namespace package: the project is not installed"
    assert Path(module.__file__).resolve().parent == PACKAGES[name]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_exists(name: str) -> None:
    module = importlib.import_module(name)

    assert len(module.__all__) == len(set(module.__all__))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_public_names_are_unique_across_packages() -> None:
    names = [name for package in PACKAGES for name in importlib.import_module(package).__all__]

    assert len(names) == len(set(names))


class Archives(NamedTuple):
    """What ``make build`` makes."""

    wheel: Path
    source: Path


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    pytest.importorskip("build.env", reason="a folder build/ is no module")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Archives(wheel, source)


@pytest.fixture(scope="module", params=["wheel", "checkout"])
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with nothing but distgrad and its base requirements; return its folder of programs."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    what = request.getfixturevalue("archives").wheel if request.param == "wheel" else ROOT
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--constraint", ROOT / "constraints.txt", what, cwd=folder)
    return programs


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    (tmp_path / "broker.py").write_text(USERS_BROKER)
    (tmp_path / "worker.py").write_text(USERS_WORKER)
    return tmp_path


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_the_example_and_nothing_else(archives: Archives) -> None:
    expected = {"distgrad_worker/examples/digits.py"} | {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    with zipfile.ZipFile(archives.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert held == expected


@pytest.mark.slow
def test_the_source_archive_holds_what_builds_and_tests_it(archives: Archives) -> None:
    with tarfile.open(archives.source) as source:
        held = {name.partition("/")[2] for name in source.getnames()}

    assert {"pyproject.toml", "Makefile", "constraints.txt", "LICENSE", "tests/test_package.py", "docs/wire.md"} <= held
    assert [name for name in held if re.search(r"(^|/)(\.ci|\.venv|__pycache__|keys)(/|$)|\.key$", name)] == []


@pytest.mark.slow
def test_the_package_index_would_take_both_archives(archives: Archives) -> None:
    pytest.importorskip("twine")

    run(sys.executable, "-m", "twine", "check", "--strict", *archives, cwd=archives.wheel.parent)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_bare_environment_has_a_working_command_beside_hostile_files(bare: Path, users_folder: Path) -> None:
    version = re.search(r'"(.+)"', (PACKAGES["distgrad"] / "version.py").read_text().split("__version__")[1])
    assert version is not None
    (users_folder / "worker.py").write_text(USERS_BROKER)

    for command in ([bare / "distgrad"], [bare / "python", "-m", "distgrad"]):
        assert version[1] in run(*command, "--version", cwd=users_folder)
        for group in ("broker", "worker", "admin", "keys", "demo"):
            assert "--help" in run(*command, group, "--help", cwd=users_folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_bare_environment_has_nothing_that_belongs_to_an_extra(bare: Path, users_folder: Path) -> None:
    listed = run(bare / "python", "-m", "pip", "list", "--format=json", "--disable-pip-version-check", cwd=users_folder)
    found = {package["name"].lower() for package in json.loads(listed.splitlines()[0])}

    extras = {"torch", "jax", "ray", "starlette", "uvicorn", "textual", "numba", "scikit-learn", "matplotlib"}
    assert found & extras == set()
    assert "distgrad" in found
    assert len(found) < 20


def test_importing_distgrad_imports_nothing_heavy() -> None:
    """Not even numpy: what a name needs is imported when it is used."""
    program = "import sys, distgrad; print(*{'numpy', 'zmq', 'rich', 'numba', 'asyncio'} & set(sys.modules))"

    assert run(sys.executable, "-c", program, cwd=ROOT).strip() == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_bare_environment_trains_with_the_users_worker_module(bare: Path, users_folder: Path) -> None:
    with running_broker(bare, users_folder) as address:
        printed = run(bare / "distgrad", "worker", address, "worker:train", "--processes", "2", cwd=users_folder)

    assert printed.count("the user's train ran") == 2


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program to its end and return what it printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


def clean_environment() -> dict[str, str]:
    """Return the environment without what would lead another Python to this checkout or to our settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DISTGRAD_", "PYTHON"))}


@contextlib.contextmanager
def running_broker(programs: Path, folder: Path) -> Iterator[str]:
    """Run a broker process; its control address is what the block gets."""
    command: list[str | Path] = [
        programs / "distgrad",
        "broker",
        "--control",
        "127.0.0.1:0",
        "--gradients",
        "127.0.0.1:0",
    ]
    with subprocess.Popen(command, cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = re.search(r"control=(\S+)", process.stdout.readline())
            assert ready
            yield ready[1]
        finally:
            process.terminate()
