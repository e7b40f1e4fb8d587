"""The machine: libraries, compiled kernels, shared memory, limits, the clock."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from distgrad import sockets
from distgrad.doctor.finding import Finding, fault, ok, warning

# What a broker needs beside workers' connections: libraries, sockets, files of the journal.
_OWN_FILES = 64
# Requests, gradients, pulls.
_FILES_PER_WORKER = 3
_SMALL_SHARED_BYTES = 256 * 1024**2
_SHARED = Path("/dev/shm")
# This was written in 2025: no machine that runs it is older.
_EARLIEST_S = 1_735_689_600.0
_COMPILE_S = 300.0

# In a process of its own: importing numba takes a while, and where memory cannot be made executable it may crash.
_COMPILE = """
import numpy
from distgrad.kernels import Compiler
compiler = Compiler()
compiler.kernel("step", numpy.dtype("float32"))
print("cached" if compiler.has_cache else "no cache")
"""

_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)$")


def versions() -> Iterator[Finding]:
    """Look at Python, distgrad and the libraries that it needs.

    Yields
    ------
    Finding
        One for each library that is missing or too old, or one for all.
    """
    wanted = [match for text in requires("distgrad") or () if (match := _REQUIREMENT.match(text)) is not None]
    found, wrong = [], False
    for name, least in (match.groups() for match in wanted):
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        if installed is not None and _numbers(installed) >= _numbers(least):
            found.append(f"{name} {installed}")
            continue
        wrong = True
        has = "is not installed" if installed is None else f"is {installed}"
        yield fault(
            "versions",
            f"{name} {has}, but {least} or newer is needed",
            f"{sys.executable} -m pip install '{name}>={least}'",
        )
    try:
        sockets.curve_pair()
    except Exception as error:  # what pyzmq raises depends on how libzmq was built
        wrong = True
        yield fault(
            "versions",
            f"this ZeroMQ cannot encrypt: {error}",
            "install pyzmq from its wheel: pip install --force-reinstall pyzmq",
        )
    if not wrong:
        python = ".".join(map(str, sys.version_info[:3]))
        yield ok("versions", f"distgrad {version('distgrad')}, Python {python}, {', '.join(found)}")


def kernels() -> Iterator[Finding]:
    """Compile a kernel as a broker would.

    Yields
    ------
    Finding
        One.
    """
    if importlib.util.find_spec("numba") is None:
        yield warning(
            "kernels",
            "numba is not installed: updates take several times as long",
            "in the clone of distgrad: pip install '.[fast]'",
        )
        return
    command = [sys.executable, "-P", "-c", _COMPILE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)
    except subprocess.TimeoutExpired:
        yield fault("kernels", f"compiling took more than {_COMPILE_S:g} s", "see whether the machine is overloaded")
        return
    if done.returncode != 0:
        why = f"signal {-done.returncode}" if done.returncode < 0 else (done.stderr.splitlines() or ["no reason"])[-1]
        yield fault(
            "kernels",
            f"numba is installed but cannot compile: {why}",
            "allow memory that is written and executed (systemd: MemoryDenyWriteExecute=no), "
            "or mend it by, in the clone of distgrad: pip install --force-reinstall '.[fast]'",
        )
    elif done.stdout.strip() == "cached":
        yield ok("kernels", f"numba {version('numba')} compiles, and keeps what it compiled")
    else:
        yield warning(
            "kernels",
            f"numba {version('numba')} compiles, but its cache cannot be written: every start compiles anew",
            "set NUMBA_CACHE_DIR to a folder that this user can write to",
        )


def shared_memory() -> Iterator[Finding]:
    """Look at the room for shared memory, which training programs and transports on one machine use.

    Yields
    ------
    Finding
        One.
    """
    if not _SHARED.is_dir():
        yield warning("shared memory", f"there is no {_SHARED}", "mount a tmpfs there")
        return
    room = os.statvfs(_SHARED)
    size = room.f_blocks * room.f_frsize
    if size < _SMALL_SHARED_BYTES:
        yield warning(
            "shared memory",
            f"{_SHARED} has {_size(size)}; processes that share arrays want {_size(_SMALL_SHARED_BYTES)} or more",
            "docker run --shm-size 1g; in Kubernetes an emptyDir with medium: Memory at /dev/shm",
        )
    else:
        yield ok("shared memory", f"{_SHARED} has {_size(size)}")


def open_files(workers: int) -> Iterator[Finding]:
    """Look at how many files and connections a process may have.

    Parameters
    ----------
    workers : int
        How many the broker is to serve.

    Yields
    ------
    Finding
        One, where the system has such a limit.
    """
    try:
        import resource
    except ModuleNotFoundError:  # not a POSIX system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OWN_FILES + _FILES_PER_WORKER * workers
    # `distgrad broker` raises its own limit as far as it may.
    allowed = max(soft, hard) if resource.RLIM_INFINITY not in (soft, hard) else resource.RLIM_INFINITY
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        yield fault(
            "open files",
            f"a process may have {allowed}; a broker with {workers} workers needs {needed}",
            f"ulimit -n {needed} (as root, because this is the hard limit), or LimitNOFILE= in the systemd unit",
        )
    else:
        may = "as many as it likes" if allowed == resource.RLIM_INFINITY else str(allowed)
        yield ok("open files", f"a process may have {may}, enough for {workers} workers")


def clock() -> Iterator[Finding]:
    """Look at the clock; files from the future are looked for in the data folder.

    Yields
    ------
    Finding
        One.
    """
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < _EARLIEST_S:
        yield fault("clock", f"the clock says {shown}", "set it: timedatectl set-ntp true")
    else:
        yield ok("clock", f"the clock says {shown}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[a-z+]", text)[0]))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1024**2:,.0f} MiB"
