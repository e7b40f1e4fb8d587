"""Run a program as a hardened container or service would: a read-only system, nobody's user, no capabilities.

Docker and systemd are no part of the tests, but what they use is the kernel's: namespaces of mounts, users, seccomp.
What may be written to is a file system in memory on ``/mnt``, which exists inside the namespace only.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path("/mnt")
USER = 10001

_SETUP = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=0755,size=256m sandbox /mnt
mkdir -m 0700 /mnt/data /mnt/cache && mkdir -m 1777 /mnt/tmp
chown {user}:{user} /mnt/data /mnt/cache
{prepare}
mount -t tmpfs -o size=16m sandbox /dev/shm
mount -o remount,bind,ro /
exec setpriv --reuid {user} --regid {user} --clear-groups --bounding-set=-all --no-new-privs "$@"
"""


def sandboxed(prepare: str = "", *, unit: Path | None = None) -> tuple[str, ...]:
    """Give the prefix of a command that runs it in a sandbox, or skip the test where that is not possible.

    Parameters
    ----------
    prepare : str
        Lines of shell that run as root before the system becomes read-only; they may write to ``/mnt``.
    unit : Path, optional
        A systemd unit whose system call filter is put on as well.
    """
    for program in ("unshare", "setpriv", "mount"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no `{program}` command")
    if os.geteuid() != 0:
        pytest.skip("another user can only be had as root")
    # Without capabilities root is nobody, too: for a checkout that no other user can read.
    user = USER if _can_import(USER) else 0
    script = _SETUP.format(prepare=prepare, user=user)
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespace of mounts can be made here")
    if unit is None:
        return prefix
    return (*prefix, sys.executable, "-P", __file__, *system_calls(unit), "--")


def system_calls(unit: Path) -> list[str]:
    """List the system calls that a unit allows, as systemd expands its groups."""
    if shutil.which("systemd-analyze") is None or ctypes.util.find_library("seccomp") is None:
        pytest.skip("needs systemd-analyze and libseccomp")
    allowed: set[str] = set()
    lines = re.findall(r"^SystemCallFilter=(~?)(.*)$", unit.read_text(), re.MULTILINE)
    # What systemd always allows, so that the program can be started.
    for minus, names in [("", "@default"), *lines]:
        calls = {call for name in names.split() for call in _expanded(name)}
        allowed = allowed - calls if minus else allowed | calls
    return sorted(allowed | {"execve"})


def _expanded(name: str) -> set[str]:
    if not name.startswith("@"):
        return {name}
    done = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    words = [line.strip() for line in done.stdout.splitlines()[1:]]
    return {call for word in words if word and not word.startswith("#") for call in _expanded(word)}


def _can_import(user: int) -> bool:
    # In a child of a child: setpriv itself still has the rights to start what lies in a home folder.
    command = (
        f'exec setpriv --reuid {user} --regid {user} --clear-groups sh -c \'"$0" -c "import distgrad_broker"\' "$0"'
    )
    return (
        subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, cwd="/", check=False).returncode == 0
    )


def _filter_and_run(arguments: list[str]) -> None:
    """Allow this process the system calls that are named, and become the program behind ``--``."""
    split = arguments.index("--")
    library = ctypes.CDLL(ctypes.util.find_library("seccomp"), use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    refuse_with_eperm, allow = 0x00050001, 0x7FFF0000  # linux/seccomp.h
    calls = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(refuse_with_eperm)))
    for name in arguments[:split]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # others are of other architectures
            assert library.seccomp_rule_add(calls, ctypes.c_uint32(allow), number, 0) == 0, name
    assert library.seccomp_load(calls) == 0
    os.execvp(arguments[split + 1], arguments[split + 1 :])


if __name__ == "__main__":
    _filter_and_run(sys.argv[1:])
