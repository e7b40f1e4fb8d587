"""Run in a network of its own, in which there is only loopback.

Ray, gloo and MPI listen on every interface and let in whoever comes. So the whole benchmark starts itself again in
a new network namespace; what listens there can be reached from nowhere else. Linux only, as root or where an ordinary
user may make user namespaces.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence

_MARK = "BENCH_PEERS_NAMESPACE"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h
_REQUEST = "16sH22x"  # struct ifreq: name and flags


def is_isolated() -> bool:
    """Tell whether no interface is up but loopback, if that is."""
    return all(name == "lo" or not _flags(name) & _IFF_UP for _, name in socket.if_nameindex())


def enter(module: str, arguments: Sequence[str]) -> str | None:
    """Start ``python -m module`` again in a namespace; do nothing in there but switch loopback on.

    Parameters
    ----------
    module : str
        Of this program.
    arguments : sequence of str
        Its arguments.

    Returns
    -------
    str or None
        Why there can be no namespace. ``None`` means that this process runs in one.
    """
    if os.environ.pop(_MARK, None) is None:
        command = _unshare()
        if command is None:
            return "no network namespace can be made here (it takes Linux, util-linux, and root or user namespaces)"
        os.environ[_MARK] = "1"
        sys.stdout.flush()
        os.execvp(command[0], [*command, sys.executable, "-m", module, *arguments])
    if not is_isolated():
        return "the new network namespace has an interface that is up beside loopback"
    _switch_on("lo")
    return None


def _unshare() -> list[str] | None:
    program = shutil.which("unshare")
    if program is None or not sys.platform.startswith("linux"):
        return None
    for command in ([program, "--net"], [program, "--net", "--map-root-user"]):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def _flags(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack(_REQUEST, name.encode(), 0))
    return int(struct.unpack(_REQUEST, asked)[1])


def _switch_on(name: str) -> None:
    request = struct.pack(_REQUEST, name.encode(), _flags(name) | _IFF_UP)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
