"""What an import needs (nothing that only Linux has) and does (nothing)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.processes import clean_environment

PACKAGES = ("distgrad", "distgrad_broker", "distgrad_worker")
# What macOS or Windows lack: modules, the folder of shared memory, and a function of glibc.
ELSEWHERE = """
import builtins, ctypes, sys

for name in ("fcntl", "grp", "pwd", "resource", "termios", "_posixshmem"):
    sys.modules[name] = None
for name in ("jax", "ray", "torch"):
    sys.modules[name] = None  # what these need themselves is for them to say

def no_shared_memory(event, arguments):
    if event in ("open", "os.listdir", "os.mkdir", "os.remove") and str(arguments[0]).startswith("/dev/shm"):
        raise FileNotFoundError(arguments[0])

sys.addaudithook(no_shared_memory)

class CDLL(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("mallopt", "malloc_trim"):
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = CDLL
"""
IMPORT_ALL = """
import importlib, pkgutil

package = importlib.import_module(sys.argv[1])
for name in package.__all__:
    getattr(package, name)
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            # Extras need not be installed.
            extras = ("jax", "matplotlib", "numba", "ray", "sklearn", "starlette", "textual", "torch", "uvicorn")
            if error.name.partition(".")[0] not in extras:
                raise
"""


def python(program: str, *arguments: str) -> str:
    """Run a program in an interpreter of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=clean_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_where_linux_features_are_missing(package: str) -> None:
    python(ELSEWHERE + IMPORT_ALL, package)


def test_the_class_runs_where_linux_features_are_missing() -> None:
    program = """
import numpy as np
import distgrad

with distgrad.DistributedGradients() as gradients:
    gradients.set_model_parameters({"w": np.ones(3)})
    gradients.start()
    gradients.add_gradients({"w": np.full(3, 0.25)})
    gradients.flush(30)
    print(gradients.get_model_parameters()["w"])
"""
    assert python(ELSEWHERE + program) == "[0.75 0.75 0.75]\n"


def test_sockets_open_where_there_is_no_mallopt() -> None:
    program = """
from distgrad.malloc import give_back, keep_freed_memory
from distgrad.sockets import open_context

open_context().term()
give_back()
print(keep_freed_memory())
"""
    assert python(ELSEWHERE + program) == "False\n"


def test_importing_reads_no_setting_and_starts_nothing() -> None:
    program = """
import os, sys, threading

class Watched(dict):
    def _look(self, name):
        assert "DISTGRAD" not in str(name), name
    def __getitem__(self, name):
        self._look(name)
        return super().__getitem__(name)
    def get(self, name, default=None):
        self._look(name)
        return super().get(name, default)

os.environ = Watched(os.environ)
import distgrad, distgrad_broker, distgrad_worker
for package in (distgrad, distgrad_broker, distgrad_worker):
    for name in package.__all__:
        getattr(package, name)
print(threading.active_count())
"""
    assert python(program) == "1\n"
