"""The operating system's disk.

Here alone the journal and the checkpoints touch files; what they ask of a disk is in `distgrad.durable.disk_protocol`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrad.arrays import aligned_empty, lasting_empty
from distgrad.descriptors import with_spare
from distgrad.durable.disk_protocol import Disk, File, Lock
from distgrad.errors import DataFolderInUse

__all__ = ["Disk", "File", "Lock", "OsDisk", "OsFile", "OsLock"]

# Linux takes this many buffers in one call.
_MAX_BUFFERS = 1024
_FLUSH_FROM_BYTES = 1 << 20
_WARM_UP_TO_BYTES = 8 << 20
# Gradients' headers and small parts; a copy is cheaper than one more buffer in a gathered write.
_JOIN_BELOW_BYTES = 4096
# In the place of a descriptor that was closed.
_CLOSED = -1


class OsFile:
    """A file of the operating system.

    Parameters
    ----------
    descriptor : int
        Open for writing; owned from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # Where what was written ends, and up to where the system's copy in memory was given up.
        self._end = self._forgotten = 0

    def write(self, offset: int, buffers: Sequence[Any]) -> int:
        """Write buffers behind one another; see `File.write`."""
        total = 0
        pending = [memoryview(buffer).cast("B") for buffer in _joined(buffers) if len(buffer)]
        first = 0
        while first < len(pending):
            written = _write_at(self._descriptor, pending[first : first + _MAX_BUFFERS], offset + total)
            if not written:
                return total  # the caller sees that it is less than it gave
            total += written
            while first < len(pending) and written >= len(pending[first]):
                written -= len(pending[first])
                first += 1
            if written:
                pending[first] = pending[first][written:]
        if total >= _FLUSH_FROM_BYTES and hasattr(os, "posix_fadvise"):
            # Linux then begins to write at once, and does not wait for the sync to do so.
            os.posix_fadvise(self._descriptor, offset, total, os.POSIX_FADV_DONTNEED)
        self._end = offset + total
        return total

    def allocate(self, size: int) -> None:
        """Reserve room; see `File.allocate`."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._descriptor, 0, size)

    def truncate(self, size: int) -> None:
        """Cut the file; see `File.truncate`."""
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """Wait for the disk; see `File.sync`."""
        end = self._end  # more may be written meanwhile, by another thread
        getattr(os, "fdatasync", os.fsync)(self._descriptor)
        if end - self._forgotten >= _FLUSH_FROM_BYTES and hasattr(os, "posix_fadvise"):
            # Nobody reads it but a recovery. Its memory is used again for what is written next, instead of new memory
            # for all of it, in place of what others have in memory; Linux keeps the page that is not full yet.
            os.posix_fadvise(self._descriptor, 0, end, os.POSIX_FADV_DONTNEED)
            self._forgotten = end

    def close(self) -> None:
        """Close the file; see `File.close`. Idempotent."""
        descriptor, self._descriptor = self._descriptor, _CLOSED
        if descriptor != _CLOSED:  # a second close would be of somebody else's file, under the same number
            os.close(descriptor)


class OsDisk:
    """The operating system's files."""

    def make_folder(self, folder: str) -> None:
        """Make a folder; see `Disk.make_folder`."""
        os.makedirs(folder, exist_ok=True)

    def lock(self, path: str) -> Lock:
        """Take a lock file; see `Disk.lock`."""
        return OsLock(path)

    def create(self, path: str) -> OsFile:
        """Make a new file; see `Disk.create`."""
        return OsFile(_opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)))

    def open(self, path: str) -> OsFile:
        """Open a file for writing; see `Disk.open`."""
        return OsFile(_opened(path, os.O_WRONLY | getattr(os, "O_BINARY", 0)))

    def read(self, path: str, offset: int = 0, size: int | None = None) -> memoryview:
        """Read a piece of a file; see `Disk.read`."""
        length = os.stat(path).st_size - offset
        wanted = max(0, length if size is None else min(size, length))
        # What is small comes from malloc's heap, which is warm. What is large gets huge pages where there are any:
        # reading 64 MiB into a new bytearray is five times slower.
        empty = aligned_empty if wanted <= _WARM_UP_TO_BYTES else lasting_empty
        memory = empty(wanted, np.uint8).data
        return memory[: self.read_into(path, offset, memory)]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fill a buffer from a file; see `Disk.read_into`."""
        with with_spare(lambda: open(path, "rb", buffering=0)) as file:
            file.seek(offset)
            done = 0
            while done < len(buffer) and (count := file.readinto(buffer[done:])):
                done += count
            return done

    def size(self, path: str) -> int:
        """Give the length of a file; see `Disk.size`."""
        return os.stat(path).st_size

    def list(self, folder: str) -> list[str]:
        """Name the files in a folder; see `Disk.list`."""
        return sorted(with_spare(lambda: os.listdir(folder)))

    def rename(self, source: str, target: str) -> None:
        """Give a file another name; see `Disk.rename`."""
        os.replace(source, target)

    def remove(self, path: str) -> None:
        """Remove a file; see `Disk.remove`."""
        os.unlink(path)

    def sync_folder(self, folder: str) -> None:
        """Wait for the names in a folder; see `Disk.sync_folder`."""
        if os.name == "nt":
            return  # Windows cannot open a folder, and orders renames by itself
        descriptor = _opened(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class OsLock:
    """A lock file that the operating system lets go of when the process ends, however it ends.

    Parameters
    ----------
    path : str
        Made if it is not there; stays behind.

    Raises
    ------
    DataFolderInUse
        If another process has it.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._descriptor)
        except OSError as error:
            os.close(self._descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise
            raise DataFolderInUse(
                f"{os.path.dirname(path)} is in use by another process",
                hint="end that broker first, or give this one a data folder of its own",
            ) from error

    def close(self) -> None:
        """Give the lock back; see `Lock.close`. Idempotent."""
        descriptor, self._descriptor = self._descriptor, _CLOSED
        if descriptor != _CLOSED:  # a second close would be of somebody else's file, under the same number
            os.close(descriptor)


def _opened(path: str, flags: int) -> int:
    return with_spare(lambda: os.open(path, flags, 0o666))


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt  # there is no fcntl on Windows

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl  # and no msvcrt elsewhere

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write_at(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
    if hasattr(os, "pwritev"):
        return os.pwritev(descriptor, buffers, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    written = 0
    with contextlib.suppress(BlockingIOError):
        for buffer in buffers:
            count = os.write(descriptor, buffer)
            written += count
            if count < len(buffer):
                break
    return written


def _joined(buffers: Sequence[Any]) -> list[Any]:
    """Join neighbours that are small, so that a gathered write has few buffers."""
    joined: list[Any] = []
    small: list[Any] = []
    for buffer in buffers:
        if len(buffer) < _JOIN_BELOW_BYTES:
            small.append(buffer)
            continue
        if small:
            joined.append(b"".join(small))
            small = []
        joined.append(buffer)
    if small:
        joined.append(b"".join(small))
    return joined
