"""Read and write single key files: whole, private, and on the disk before anyone relies on them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from distgrad.descriptors import with_spare
from distgrad.errors import KeyFileError

HOW_TO_MAKE = "distgrad keys new NAME --role worker --dir DIR makes one"

_FORMAT = 1
_MAX_FILE_BYTES = 4096


def create(path: Path, mode: int, comment: str, values: Mapping[str, str]) -> None:
    """Write a key file that must not exist, and see it to the disk.

    Parameters
    ----------
    path : Path
        Where.
    mode : int
        Permissions.
    comment : str
        What the file is; its first line.
    values : mapping of str to str
        What it holds; neither quotes nor backslashes.

    Raises
    ------
    KeyFileError
        If it exists or cannot be written; then nothing is left behind.
    """
    # Neither names nor Z85 have a quote or a backslash, so basic strings need no escapes.
    lines = [f"# distgrad: {comment}", f"format = {_FORMAT}", *(f'{key} = "{value}"' for key, value in values.items())]
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise taken(path) from error
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error


def taken(path: Path) -> KeyFileError:
    """Build the error for a key file that exists already.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    KeyFileError
        To raise.
    """
    return KeyFileError(
        f"{path} exists already, and key files are never overwritten",
        hint="choose another name, or distgrad keys revoke NAME --dir DIR and remove the client's old file",
    )


def sync_folder(folder: Path) -> None:
    """See the entries of a folder to the disk, where the system can.

    Parameters
    ----------
    folder : Path
        The folder.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, *, secret: bool) -> dict[str, object]:
    """Read a key file, after checking who else can.

    Parameters
    ----------
    path : Path
        The file.
    secret : bool
        Nobody else may read it. Otherwise nobody else may write it.

    Returns
    -------
    dict
        Its values, not checked.

    Raises
    ------
    KeyFileError
        If it is missing, open to others, or not a key file.
    """
    try:
        # Not blocking, because opening a named pipe would wait for its writer.
        descriptor = with_spare(lambda: os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise KeyFileError(f"{path} is not a file")
            if secret:
                _check_private(path, status)
            else:
                check_not_writable_by_others(path, status)
            text = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise KeyFileError(f"key file {path} does not exist", hint=HOW_TO_MAKE) from error
    except OSError as error:
        raise KeyFileError(f"cannot read key file {path}: {error.strerror}") from error
    import tomllib  # only who has keys pays for it

    try:
        values = tomllib.loads(text.decode("ascii"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} is not a key file: {error}", hint=HOW_TO_MAKE) from error
    if len(text) > _MAX_FILE_BYTES or values.get("format") != _FORMAT:
        raise KeyFileError(f"{path} is not a key file of format {_FORMAT}", hint=HOW_TO_MAKE)
    return values


def _check_private(path: Path, status: os.stat_result) -> None:
    # Kubernetes gives a pod's secrets to root and lets the pod's own group read them, on a read-only file system.
    if os.name != "posix" or not status.st_mode & 0o077:
        return
    if status.st_mode & 0o037 or status.st_uid != 0 or not _is_read_only(path):
        raise KeyFileError(
            f"{path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}); a secret key must be 0600",
            hint=f"chmod 600 {path}",
        )


def check_not_writable_by_others(path: Path, status: os.stat_result) -> None:
    """Refuse a file or folder that another user could change.

    Parameters
    ----------
    path : Path
        The file or folder.
    status : os.stat_result
        Its status.

    Raises
    ------
    KeyFileError
        If its mode lets others write, unless the file system is read-only: Kubernetes mounts secrets so.
    """
    if os.name == "posix" and status.st_mode & 0o022 and not _is_read_only(path):
        raise KeyFileError(
            f"{path} can be changed by others (mode {stat.S_IMODE(status.st_mode):04o}), who could let themselves in",
            hint=f"chmod go-w {path}",
        )


def _is_read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
