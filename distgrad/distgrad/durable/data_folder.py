"""The folder that a broker keeps everything in: who has it, of which format it is, and which checkpoints are there.

It holds ``FORMAT``, ``lock``, the journal, and files ``checkpoint-<sequence>-<version>.safetensors``. What is being
written is called ``.<name>.tmp`` until it is whole. An empty file ``went-back-to-<version>`` says that the last start
was asked to go back to this version, and that it was done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from distgrad.durable.checkpoint_file import read_checkpoint
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.disk import Disk, Lock
from distgrad.errors import CheckpointError, ConfigError, DataDamaged

FOLDER_FORMAT = 1
"""Version of the folder's format that is written."""

_FORMAT_NAME, _LOCK_NAME = "FORMAT", "lock"
_FORMAT_LINE = re.compile(rb"distgrad data (\d{1,9})\n")
_CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]{20})-([0-9]{1,20})\.safetensors")
_JOURNAL_NAME = re.compile(r"journal-.*\.log")
_ASIDE = "set-aside-"
_WENT_BACK = "went-back-to-"
_TEMPORARY_NAME = re.compile(r"\..+\.tmp")


class CheckpointName(NamedTuple):
    """A checkpoint in the folder, by its name; whether it is whole only reading it tells."""

    sequence: int
    version: int
    path: str


class DataFolder:
    """The data folder of one process, which has it for itself until `close`.

    One thread uses it.

    Parameters
    ----------
    disk : Disk
        Where it is.
    path : str
        The folder; made if it is not there.
    read_only : bool, default False
        Only look, also while another process has the folder: nothing is locked, made or changed, and
        only `checkpoints` and `newest_whole` may be called.

    Attributes
    ----------
    path : str
        The folder.

    Raises
    ------
    ConfigError
        If the path leads to, or through, a file; with `read_only`, if there is no data folder.
    DataFolderInUse
        If another process has the folder.
    CheckpointError
        If the folder cannot be written to, or was written by a newer distgrad.
    DataDamaged
        If its format cannot be read.
    """

    def __init__(self, disk: Disk, path: str, *, read_only: bool = False) -> None:
        self._disk = disk
        self.path = path
        self._damaged: set[str] = set()
        self._lock: Lock | None = None
        if read_only:
            self._check_is_there()
            return
        with _explained(path):
            disk.make_folder(path)
            self._lock = disk.lock(self._in(_LOCK_NAME))
        try:
            with _explained(path):
                self._check_format()
        except BaseException:
            self._lock.close()
            raise

    def checkpoint_path(self, sequence: int, version: int) -> str:
        """Name the file of a checkpoint.

        Parameters
        ----------
        sequence : int
            Where in the journal it stands, 0 to 2**64 - 1.
        version : int
            Of the parameters, 0 to 2**64 - 1.

        Returns
        -------
        str
            Its path.
        """
        return self._in(f"checkpoint-{sequence:020d}-{version}.safetensors")

    def checkpoints(self) -> list[CheckpointName]:
        """List the checkpoints.

        Returns
        -------
        list of CheckpointName
            Newest first.

        Raises
        ------
        OSError
            If the folder cannot be read.
        """
        found = [_CHECKPOINT_NAME.fullmatch(name) for name in self._disk.list(self.path)]
        names = [CheckpointName(int(each[1]), int(each[2]), self._in(each[0])) for each in found if each]
        return sorted(names, reverse=True)

    def newest_whole(self, until: int | None = None) -> tuple[Checkpoint | None, list[tuple[str, CheckpointError]]]:
        """Read the newest checkpoint that is whole.

        Parameters
        ----------
        until : int, optional
            The highest version of the parameters that is wanted; newer checkpoints are passed over.

        Returns
        -------
        checkpoint : Checkpoint or None
            None if there is none.
        failures : list of (str, CheckpointError)
            Path of each newer one, and why it could not be used. `prune` does not count these as kept.

        Raises
        ------
        OSError
            If the folder cannot be read.
        """
        failures: list[tuple[str, CheckpointError]] = []
        for sequence, version, path in self.checkpoints():
            if until is not None and version > until:
                continue
            try:
                checkpoint = read_checkpoint(self._disk, path)
                if (checkpoint.sequence, checkpoint.version) != (sequence, version):
                    found = os.path.basename(self.checkpoint_path(checkpoint.sequence, checkpoint.version))
                    raise DataDamaged(f"{path} was renamed: it is {found}", path=path, offset=0)
            except CheckpointError as error:
                failures.append((path, error))
                self._damaged.add(path)
            else:
                return checkpoint, failures
        return None, failures

    def prune(self, keep: int) -> int | None:
        """Remove all checkpoints but the newest.

        Parameters
        ----------
        keep : int
            How many stay, at least 1. Those that `newest_whole` could not use stay besides, as long as they are newer
            than the oldest of these.

        Returns
        -------
        int or None
            Sequence of the oldest one that was kept, from which on the journal is needed; None if there is none.

        Raises
        ------
        OSError
            If a file cannot be removed; the newest are there in any case.
        """
        names = self.checkpoints()
        usable = [name for name in names if name.path not in self._damaged]
        if not usable:
            return None
        oldest = usable[: max(1, keep)][-1]
        # From the oldest on, so that what a crash leaves behind has no gap.
        removed = [name for name in reversed(names) if name < oldest]
        for name in removed:
            self._disk.remove(name.path)
        if removed:
            self._disk.sync_folder(self.path)
        return oldest.sequence

    def set_aside(self, newest: str) -> str:
        """Move the journal, and the checkpoints behind one of them, to a folder of their own within this one.

        Parameters
        ----------
        newest : str
            Path of the checkpoint that is to be the newest.

        Returns
        -------
        str
            The folder.

        Raises
        ------
        OSError
            If something cannot be moved; call it again.
        """
        names = self._disk.list(self.path)
        kept = _place(os.path.basename(newest))
        # The newest first: after a crash in between, a start that does not name the version again cannot take a later
        # checkpoint, and finds that the journal does not fit the one that is left.
        checkpoints = sorted((name for name in names if _CHECKPOINT_NAME.fullmatch(name)), key=_place, reverse=True)
        later = [name for name in checkpoints if _place(name) > kept]
        journal = [name for name in reversed(names) if _JOURNAL_NAME.fullmatch(name)]
        taken = {name for name in names if name.startswith(_ASIDE)}
        aside = next(f"{_ASIDE}{number}" for number in range(1, 10**6) if f"{_ASIDE}{number}" not in taken)
        self._disk.make_folder(self._in(aside))
        for name in [*later, *journal]:
            self._disk.rename(self._in(name), os.path.join(self._in(aside), name))
        self._disk.sync_folder(self._in(aside))
        self._disk.sync_folder(self.path)
        return self._in(aside)

    def has_gone_back(self, version: int) -> bool:
        """Tell whether the start before this one was asked to go back to a version, and it was done.

        Parameters
        ----------
        version : int
            Of the parameters.

        Returns
        -------
        bool
            As `note_going_back` left it.

        Raises
        ------
        OSError
            If the folder cannot be read.
        """
        return f"{_WENT_BACK}{version}" in self._disk.list(self.path)

    def note_going_back(self, version: int | None) -> None:
        """Note that going back to a version is done; None if this start was not asked to.

        Parameters
        ----------
        version : int or None
            Of the parameters.

        Raises
        ------
        OSError
            If that cannot be written; call it again.
        """
        wanted = None if version is None else f"{_WENT_BACK}{version}"
        found = [name for name in self._disk.list(self.path) if name.startswith(_WENT_BACK)]
        if found == ([] if wanted is None else [wanted]):
            return
        if wanted is not None and wanted not in found:
            self._disk.create(self._in(wanted)).close()
        for name in found:
            if name != wanted:
                self._disk.remove(self._in(name))
        self._disk.sync_folder(self.path)

    def clean(self) -> list[str]:
        """Remove what was being written when a process ended; call it before anything is written.

        Returns
        -------
        list of str
            Paths of what was removed.

        Raises
        ------
        OSError
            If a file cannot be removed.
        """
        paths = [self._in(name) for name in self._disk.list(self.path) if _TEMPORARY_NAME.fullmatch(name)]
        for path in paths:
            self._disk.remove(path)
        # A process that was killed may have renamed a checkpoint, and not made that certain.
        self._disk.sync_folder(self.path)
        return paths

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()

    def _in(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _check_is_there(self) -> None:
        try:
            is_data = _FORMAT_NAME in self._disk.list(self.path)
        except OSError as error:
            raise ConfigError(f"cannot read the data folder {self.path}: {error.strerror or error}") from error
        if not is_data:
            raise ConfigError(f"{self.path} is no data folder: it has no file {_FORMAT_NAME}")
        with _explained(self.path):
            self._check_format()

    def _check_format(self) -> None:
        path = self._in(_FORMAT_NAME)
        if _FORMAT_NAME not in self._disk.list(self.path):
            self._write_format(path)
            return
        line = bytes(self._disk.read(path, 0, 64))
        found = _FORMAT_LINE.fullmatch(line)
        if found is None:
            raise DataDamaged(
                f"{path} should say 'distgrad data {FOLDER_FORMAT}', it says {line.decode(errors='replace')!r}",
                path=path,
                offset=0,
                hint="name the right folder; if it is the right one, write that line into the file",
            )
        if int(found[1]) != FOLDER_FORMAT:
            raise CheckpointError(
                f"{self.path} has data format {int(found[1])}; this distgrad reads format {FOLDER_FORMAT}",
                hint="use the distgrad that wrote it, or a newer one, or another folder",
            )

    def _write_format(self, path: str) -> None:
        temporary = self._in(f".{_FORMAT_NAME}.tmp")
        with suppress(FileNotFoundError):
            self._disk.remove(temporary)
        file = self._disk.create(temporary)
        try:
            file.write(0, [f"distgrad data {FOLDER_FORMAT}\n".encode()])
            file.sync()
        finally:
            file.close()
        self._disk.rename(temporary, path)
        self._disk.sync_folder(self.path)
        # The folder itself, and those that were made for it, are names in the ones above; some may not be ours to open.
        folder = os.path.abspath(self.path)
        while (above := os.path.dirname(folder)) != folder:
            with suppress(OSError):
                self._disk.sync_folder(above)
            folder = above


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what the operating system says about the folder into what can be done about it."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"the data folder {path} cannot be made: a file is in its place", hint="name a folder"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot use the data folder {path}: {error.strerror or error}",
            hint="give this user the right to write there and some room, or name another folder",
        ) from error


def _place(name: str) -> tuple[int, int]:
    """Read sequence and version from a checkpoint's name."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    assert match is not None  # it is one
    return int(match[1]), int(match[2])
