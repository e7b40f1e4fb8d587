"""A disk in memory that does what a real one may do: fill up, fail, tear, and forget what was not synced.

Two images of everything are kept: what processes see, and what a crash of the machine leaves for certain. A call costs
what it moves, never the size of a file. All is decided by numbers that are passed in, so a run can be repeated.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache
from random import Random
from typing import Any

from distgrad.errors import DataFolderInUse
from support.sim_inode import Inode, NameEvent

# Simulations ask for the same few paths again and again.
_split = lru_cache(maxsize=4_096)(os.path.split)


class Crash(BaseException):
    """The process, or the machine, stops here; no code of the process may go on."""


class Stage(Enum):
    """Where in a call something happens."""

    BEFORE = "before"
    MIDDLE = "middle"
    AFTER = "after"


class SimDisk:
    """Implements `distgrad.durable.disk.Disk` in memory.

    Calls that change something are counted: `create`, `write`, `allocate`, `truncate`, `sync`, `rename`, `remove`,
    `sync_folder`. Folders are there, for good, once they were made.

    Parameters
    ----------
    seed : int
        Decides how much of a call is done that stops or fails in the middle.
    capacity : int, optional
        Bytes that files may have in all; may be changed at any time. Unbounded by default.

    Attributes
    ----------
    calls : list of str
        Names of the calls so far that change something.
    used : int
        Bytes that files have.
    """

    def __init__(self, seed: int = 0, *, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.calls: list[str] = []
        self.used = 0
        self._random = Random(seed)
        self._seen: dict[str, dict[str, Inode]] = {}  # folder, name
        self._certain: dict[str, dict[str, Inode]] = {}
        self._unsynced: dict[str, list[NameEvent]] = {}  # per folder
        self._locks: set[str] = set()
        self._faults: dict[int, tuple[Stage, BaseException]] = {}
        self._next_faults: dict[str, deque[tuple[Stage, int]]] = {}
        self._is_dead = False

    # Faults

    def crash_at(self, call: int, stage: Stage = Stage.BEFORE) -> None:
        """Raise `Crash` at a call that changes something; the first is 1."""
        self._faults[call] = (stage, Crash(f"{stage.value} call {call}"))

    def fail_at(self, call: int, code: int, stage: Stage = Stage.BEFORE) -> None:
        """Raise an `OSError` at a call that changes something; the first is 1."""
        self._faults[call] = (stage, _error(code))

    def fail_next(self, name: str, code: int, *, times: int = 1, stage: Stage = Stage.BEFORE) -> None:
        """Raise an `OSError` at the next calls of a name; `read`, `size` and `list` can fail, too."""
        self._next_faults.setdefault(name, deque()).extend([(stage, code)] * times)

    def mend(self) -> None:
        """Forget all faults that have not happened yet."""
        self._faults.clear()
        self._next_faults.clear()

    def crash(self, random: Random, *, machine: bool = True) -> SimDisk:
        """Give the disk as another process finds it later; this one stays as it is.

        Parameters
        ----------
        random : Random
            Decides what survives of what was not synced.
        machine : bool
            False if only the process ends: then all that was written is there, and what was not synced still is not.
        """
        after = SimDisk(random.getrandbits(32), capacity=self.capacity)
        copies: dict[int, Inode] = {}
        # How likely it is that a sector, or a name, survives: now all, now none, now any subset.
        chance = random.choice([0.0, 0.2, 0.5, 0.8, 1.0])

        def copy(inode: Inode) -> Inode:
            if id(inode) not in copies:
                copies[id(inode)] = inode.survive(random, chance) if machine else inode.copy()
            return copies[id(inode)]

        for folder in self._seen:
            certain = dict(self._certain[folder])
            events = self._unsynced[folder]
            if machine:
                for event in events:
                    if random.random() < chance:
                        event.happen(certain)
                after._seen[folder] = {name: copy(inode) for name, inode in certain.items()}
                after._certain[folder] = dict(after._seen[folder])
                after._unsynced[folder] = []
            else:
                after._seen[folder] = {name: copy(inode) for name, inode in self._seen[folder].items()}
                after._certain[folder] = {name: copy(inode) for name, inode in certain.items()}
                after._unsynced[folder] = [
                    NameEvent(event.source, event.target, event.inode and copy(event.inode)) for event in events
                ]
        after.used = sum(inode.taken for names in after._seen.values() for inode in names.values())
        return after

    # For tests

    def flip(self, path: str, offset: int, mask: int = 1) -> None:
        """Change a byte on the disk, as decay does."""
        inode = self._inode(path)
        for image in (inode.seen, inode.certain):
            if offset < len(image):
                image[offset] ^= mask

    def paths(self) -> list[str]:
        """Give the paths of all files."""
        return sorted(os.path.join(folder, name) for folder, names in self._seen.items() for name in names)

    # The protocol `Disk`

    def make_folder(self, folder: str) -> None:
        if folder not in self._seen:
            self._seen[folder], self._certain[folder], self._unsynced[folder] = {}, {}, []

    def lock(self, path: str) -> SimLock:
        if path in self._locks:
            raise DataFolderInUse(f"{os.path.dirname(path)} is in use by another process")
        self._locks.add(path)
        return SimLock(self._locks, path)

    def create(self, path: str) -> SimFile:
        def create() -> None:
            names, name = self._find(path)
            if name in names:
                raise _error(errno.EEXIST, path)
            self._note(path, NameEvent(None, name, Inode()))

        self._change("create", create)
        return SimFile(self, self._inode(path))

    def open(self, path: str) -> SimFile:
        self._check("open")
        return SimFile(self, self._inode(path))

    def read(self, path: str, offset: int = 0, size: int | None = None) -> memoryview:
        self._check("read")
        inode = self._inode(path)
        end = inode.size if size is None else min(inode.size, offset + size)
        memory = bytearray(max(0, end - offset))
        piece = memoryview(inode.seen)[offset:end]
        memory[: len(piece)] = piece
        return memoryview(memory)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        piece = self.read(path, offset, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def size(self, path: str) -> int:
        self._check("size")
        return self._inode(path).size

    def list(self, folder: str) -> list[str]:
        self._check("list")
        if folder not in self._seen:
            raise _error(errno.ENOENT, folder)
        return sorted(self._seen[folder])

    def rename(self, source: str, target: str) -> None:
        def rename() -> None:
            inode = self._inode(source)
            names, name = self._find(target)
            if name in names and names[name] is not inode:
                self._free(names[name])
            if os.path.dirname(source) == os.path.dirname(target):
                self._note(source, NameEvent(os.path.basename(source), name, inode))
            else:  # each folder has its own event, so a crash may leave both names, or none
                self._note(target, NameEvent(None, name, inode))
                self._note(source, NameEvent(os.path.basename(source), None, None))

        self._change("rename", rename)

    def remove(self, path: str) -> None:
        def remove() -> None:
            self._free(self._inode(path))
            self._note(path, NameEvent(os.path.basename(path), None, None))

        self._change("remove", remove)

    def sync_folder(self, folder: str) -> None:
        if folder not in self._seen:
            raise _error(errno.ENOENT, folder)
        events = self._unsynced[folder]

        def sync(chance: float = 1.0) -> None:
            for event in events:
                if self._random.random() < chance:
                    event.happen(self._certain[folder])

        def whole() -> None:
            sync()
            events.clear()

        # A folder is written whole when it next changes, so another sync after a failed one does help, unlike a file's.
        self._change("sync_folder", whole, half=lambda: sync(0.5), spoil=lambda: sync(0.5))

    def _find(self, path: str) -> tuple[dict[str, Inode], str]:
        folder, name = _split(path)
        if folder not in self._seen:
            raise _error(errno.ENOENT, path)
        return self._seen[folder], name

    def _inode(self, path: str) -> Inode:
        names, name = self._find(path)
        if name not in names:
            raise _error(errno.ENOENT, path)
        return names[name]

    def _note(self, path: str, event: NameEvent) -> None:
        folder = _split(path)[0]
        event.happen(self._seen[folder])
        self._unsynced[folder].append(event)

    def _free(self, inode: Inode) -> None:
        self.used -= inode.taken
        inode.taken = 0

    def _check(self, name: str) -> None:
        if self._is_dead:
            raise Crash("the process has stopped")
        faults = self._next_faults.get(name)
        if faults:
            raise _error(faults.popleft()[1])

    def _change(
        self,
        name: str,
        whole: Callable[[], None],
        *,
        half: Callable[[], None] | None = None,
        spoil: Callable[[], None] | None = None,
    ) -> None:
        """Do something that counts as a call.

        `half` is what a stop in the middle leaves done; `spoil` what an error does, if what failed is not tried again.
        """
        if self._is_dead:
            raise Crash("the process has stopped")
        self.calls.append(name)
        fault = self._faults.pop(len(self.calls), None)
        faults = self._next_faults.get(name)
        if fault is None and faults:
            stage, code = faults.popleft()
            fault = (stage, _error(code))
        if fault is None:
            whole()
            return
        stage, error = fault
        if isinstance(error, Crash):
            self._is_dead = True
        elif spoil is not None:
            spoil()
            raise error
        if stage is Stage.AFTER:
            whole()
        elif stage is Stage.MIDDLE and half is not None:
            half()
        raise error


class SimFile:
    """A file of a `SimDisk` that is open for writing."""

    def __init__(self, disk: SimDisk, inode: Inode) -> None:
        self._disk = disk
        self._inode = inode
        self._is_open = True

    def write(self, offset: int, buffers: Sequence[Any]) -> int:
        self._check_open()
        data = b"".join(buffers)
        random = self._disk._random
        self._disk._change(
            "write",
            lambda: self._put(offset, data),
            half=lambda: self._put(offset, data[: random.randrange(len(data) + 1)]),
        )
        return len(data)

    def allocate(self, size: int) -> None:
        self._check_open()

        def allocate() -> None:
            self._take(size, is_whole=True)
            if size > self._inode.size:
                self._inode.change((size, None))

        self._disk._change("allocate", allocate)

    def truncate(self, size: int) -> None:
        self._check_open()

        def truncate() -> None:
            self._disk.used -= max(0, self._inode.taken - size)
            self._inode.taken = min(self._inode.taken, size)
            self._inode.change((size, None))

        self._disk._change("truncate", truncate)

    def sync(self) -> None:
        self._check_open()
        random = self._disk._random
        self._disk._change(
            "sync",
            self._inode.sync,
            half=lambda: self._inode.sync_some(random),
            spoil=lambda: self._inode.spoil(random),
        )

    def close(self) -> None:
        self._is_open = False

    def _put(self, offset: int, data: bytes) -> None:
        room = self._take(offset + len(data)) - offset
        if room > 0 and data:
            self._inode.change((offset, data[:room]))
        if room < len(data):
            raise _error(errno.ENOSPC)

    def _take(self, end: int, *, is_whole: bool = False) -> int:
        """Take room on the disk up to some byte of the file; give up to which one there is room."""
        capacity = self._disk.capacity
        more = max(0, end - self._inode.taken)
        if capacity is not None and self._disk.used + more > capacity:
            if is_whole:
                raise _error(errno.ENOSPC)
            more = max(0, capacity - self._disk.used)
        self._inode.taken += more
        self._disk.used += more
        return min(end, self._inode.taken)

    def _check_open(self) -> None:
        if not self._is_open:
            raise _error(errno.EBADF)


class SimLock:
    """A lock of a `SimDisk`."""

    def __init__(self, locks: set[str], path: str) -> None:
        self._locks = locks
        self._path = path

    def close(self) -> None:
        self._locks.discard(self._path)


def _error(code: int, path: str | None = None) -> OSError:
    return OSError(code, os.strerror(code)) if path is None else OSError(code, os.strerror(code), path)
