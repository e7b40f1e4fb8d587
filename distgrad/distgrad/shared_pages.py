"""Memory that processes of one host share, without a name in any file system: nothing is left behind by whoever dies.

One process makes it (`SharedPages`) and tells another its address over a socket: process, descriptor, random name.
The other one finds it below ``/proc`` (`attach`), which the kernel allows to processes of the same user alone, and
checks that it is what it was told of: that name, that size, and seals that keep its size as it is, so that no peer can
cut it off under the reader. The memory is given back when the last mapping is gone, however its processes end.

Linux only. Elsewhere, and where anything is in the way, callers fall back to sockets.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
import sys
import threading
import weakref
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_NAME = "distgrad-"
_FD_LINK = "/memfd:{} (deleted)"

# F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW, and two that Python's modules lack.
_SEALS = 0x1 | 0x2 | 0x4
# Linux 5.1: mappings that exist may be written to, new ones may not.
_F_SEAL_FUTURE_WRITE = 0x10
# Linux 5.14: have the pages now, or an error; not a signal when they are first touched.
_MADV_POPULATE_WRITE = 23

_lock = threading.Lock()


class Address(NamedTuple):
    """Where shared memory is found by another process of the host.

    Attributes
    ----------
    pid, fd : int
        A process that has it open, and its descriptor there.
    name : str
        Random: who does not know it cannot be made to map something else.
    size : int
        Bytes.
    """

    pid: int
    fd: int
    name: str
    size: int


class Unavailable(Exception):
    """Memory cannot be shared here; the message tells why."""


class SharedPages:
    """A piece of memory that others can attach to, for as long as `array` or this object lives.

    Parameters
    ----------
    size : int
        Bytes, at least 1. They are reserved at once, so that writing to them never fails later.
    is_read_only : bool
        Whether others may only read it.

    Attributes
    ----------
    array : ndarray of uint8, shape (size,)
        The memory; zero at first.
    address : Address
        For `attach` in another process.

    Raises
    ------
    Unavailable
        If there is no such memory on this system, or not enough of it.
    """

    __slots__ = ("__weakref__", "address", "array")

    def __init__(self, size: int, *, is_read_only: bool = False) -> None:
        if sys.platform != "linux":
            raise Unavailable("memory is shared on Linux only")
        import fcntl  # which Windows lacks

        name = _NAME + os.urandom(16).hex()
        fd = -1
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            pages = mmap.mmap(fd, size)
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
            try:
                pages.madvise(_MADV_POPULATE_WRITE)
            except OSError:
                os.posix_fallocate(fd, 0, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, (_SEALS | _F_SEAL_FUTURE_WRITE) if is_read_only else _SEALS)
        except (OSError, ValueError) as error:
            if fd >= 0:
                os.close(fd)
            raise Unavailable(f"{size} bytes cannot be shared: {error}") from error
        self.address = Address(os.getpid(), fd, name, size)
        self.array: NDArray[np.uint8] = np.frombuffer(pages, np.uint8)
        # With the mapping, not with this object: views of the array keep the memory, and others may attach until then.
        weakref.finalize(pages, os.close, fd)


def attach(address: Address, *, writes: bool) -> NDArray[np.uint8]:
    """Map another process's shared memory.

    Parameters
    ----------
    address : Address
        As it was told; nothing of it is believed.
    writes : bool
        Whether to map it so that it can be written to.

    Returns
    -------
    ndarray of uint8, shape (size,)
        The memory. It stays mapped as long as the array or a view of it lives.

    Raises
    ------
    Unavailable
        If it is not there, not of this host, or not what it should be.
    """
    if sys.platform != "linux":
        raise Unavailable("memory is shared on Linux only")
    import fcntl  # which Windows lacks

    pid, fd, name, size = address
    if not name.startswith(_NAME) or not name.isprintable() or "/" in name or size < 1:
        raise Unavailable("this is no address of shared memory")
    path = f"/proc/{pid:d}/fd/{fd:d}"
    try:
        if os.readlink(path) != _FD_LINK.format(name):
            raise Unavailable(f"{path} is something else")
        # What is opened is looked at again: the link may lead elsewhere by now.
        own = os.open(path, (os.O_RDWR if writes else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unavailable(f"{path} cannot be opened: {error}") from error
    try:
        found = os.fstat(own)
        seals = fcntl.fcntl(own, fcntl.F_GET_SEALS)
        is_named = os.readlink(f"/proc/self/fd/{own}") == _FD_LINK.format(name)
        if not (stat.S_ISREG(found.st_mode) and is_named and found.st_size == size and seals & _SEALS == _SEALS):
            raise Unavailable(f"{path} is not {size} bytes of sealed memory")
        access = mmap.ACCESS_WRITE if writes else mmap.ACCESS_READ
        return np.frombuffer(mmap.mmap(own, size, access=access), np.uint8)
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be mapped: {error}") from error
    finally:
        os.close(own)


def host_name() -> str | None:
    """Name this host, and what of it this process can see: who is told the same name may try to attach.

    Returns
    -------
    str or None
        The same for processes that share the kernel and the numbering of processes; tells nothing else. None where
        memory cannot be shared.
    """
    if sys.platform != "linux":
        return None
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read()
        seen = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256(f"distgrad {boot} {seen} {os.getuid()}".encode()).hexdigest()[:32]


def fence() -> None:
    """Order what this thread reads and writes before against what it reads and writes afterwards.

    A lock that is taken and given back, twice, is a full fence on every processor that Python runs on.
    """
    with _lock:
        pass
    with _lock:
        pass


def address_of(value: Any) -> Address:
    """Check an address that came over the wire.

    Parameters
    ----------
    value : object
        A decoded ``[pid, fd, name, size]``.

    Returns
    -------
    Address
        The same; whether it leads anywhere is `attach`'s to find out.

    Raises
    ------
    Unavailable
        If it is anything else.
    """
    if (
        type(value) is not list
        or [type(part) for part in value] != [int, int, str, int]
        or not all(0 <= part < 2**47 for part in (value[0], value[1], value[3]))
    ):
        raise Unavailable("an address of shared memory is [pid, fd, name, size]")
    return Address(*value)
