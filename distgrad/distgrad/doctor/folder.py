"""A data folder: can it be written to, is there room, do syncs work, does the clock agree with it."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from distgrad.doctor.finding import Finding, fault, ok, warning
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import OsDisk
from distgrad.errors import DataFolderInUse, DistgradError

_TOO_LITTLE_BYTES = 128 * 1024**2  # less than two segments of the journal
_LITTLE_BYTES = 4 * 1024**3
_SYNCS = 5
_SLOW_SYNC_S = 0.05
_CLOCK_SLACK_S = 2.0
_FLEETING = ("tmpfs", "ramfs")
_DISTANT = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")


def data_folder(path: Path) -> Iterator[Finding]:
    """Look at a broker's data folder, or at the place where it is to be made.

    Parameters
    ----------
    path : Path
        The folder.

    Yields
    ------
    Finding
        On writing, room, the kind of file system, and on what is in it.
    """
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield fault("data folder", f"{there} is a file, so there can be no folder {path}", "choose another --data")
        return
    yield _room(there)
    yield from _writing(there)
    yield from _file_system(there)
    if there == path and (path / "FORMAT").exists():
        yield _contents(path)
        yield _clock(path)


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{folder} has {free / 1024**3:,.1f} GiB of room"
    mend = "make room, or choose another disk (docs/operations.md tells how much it takes)"
    if free < _TOO_LITTLE_BYTES:
        return fault("room", f"{text}; the journal alone takes {_TOO_LITTLE_BYTES // 1024**2} MiB", mend)
    return warning("room", text, mend) if free < _LITTLE_BYTES else ok("room", text)


def _writing(folder: Path) -> Iterator[Finding]:
    """Write, sync and remove a file, as the journal does, and tell how long a sync takes."""
    path = folder / f".doctor-{secrets.token_hex(4)}.tmp"  # what a broker removes, should we be killed
    times = []
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for _ in range(_SYNCS):
                os.write(descriptor, bytes(4096))
                started = time.perf_counter()
                os.fsync(descriptor)
                times.append(time.perf_counter() - started)
        finally:
            os.close(descriptor)
            path.unlink()
        above = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(above)
        finally:
            os.close(above)
    except OSError as error:
        yield fault(
            "writing",
            f"{folder} cannot be written to: {error.strerror}",
            "make it this user's own (chown), mount it read-write, or choose another --data",
        )
        return
    typical = sorted(times)[len(times) // 2]
    text = f"{folder} is written to and synced, in {typical * 1e3:.1f} ms"
    if typical > _SLOW_SYNC_S:
        yield warning("writing", text, "a faster disk, or --sync-every 20ms, which syncs more at once")
    else:
        yield ok("writing", text)


def _file_system(folder: Path) -> Iterator[Finding]:
    kind = _kind_of(folder)
    if kind in _FLEETING:
        yield warning("file system", f"{folder} is in memory ({kind}), and gone with the machine", "choose a disk")
    elif kind in _DISTANT:
        yield warning(
            "file system", f"{folder} is on a network file system ({kind}), where locks and syncs may not hold",
            "put it on a local disk",
        )  # fmt: skip


def _kind_of(folder: Path) -> str | None:
    """Find the file system of a folder; None where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(lines):
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == wanted:
            return kind.split()[0]
    return None


def _contents(path: Path) -> Finding:
    try:
        DataFolder(OsDisk(), str(path)).close()
    except DataFolderInUse:
        return ok("data folder", f"{path} is in use by a process, as it should be while a broker runs")
    except DistgradError as error:
        return fault("data folder", str(error), error.hint or f"distgrad journal {path} --verify tells more")
    return ok("data folder", f"{path} is there; distgrad journal {path} --verify reads all of it")


def _clock(path: Path) -> Finding:
    newest = max((entry.stat().st_mtime for entry in path.iterdir()), default=0.0)
    ahead = newest - time.time()
    if ahead > _CLOCK_SLACK_S:
        return fault(
            "clock", f"{path} has a file that is {ahead:,.0f} s from the future: the clock was set back",
            "set the clock: timedatectl set-ntp true",
        )  # fmt: skip
    return ok("clock", f"nothing in {path} is from the future")
