"""Parameters in files: ``.safetensors`` and ``.npz``, written whole or not at all.

A file holds flat names: a leaf's path joined with ``.``, and ``parameters`` for one bare array. It is written beside
its place, forced to the disk, and renamed, so that a crash leaves the former file or the new one, never a mixture.
"""

from __future__ import annotations

import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from distgrad.arrays import BFLOAT16, dtype_of
from distgrad.errors import CheckpointError, ConfigError
from distgrad.layout import Layout

# What one bare array is called in a file, where a name cannot be empty.
BARE_NAME = "parameters"

Array = np.ndarray[Any, Any]
_T = TypeVar("_T")


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Check, before any work is done for it, that a path names a kind of file that distgrad knows.

    Parameters
    ----------
    path : path
        The file need not exist.

    Raises
    ------
    ConfigError
        If it ends neither in ``.safetensors`` nor in ``.npz``.
    """
    _format(Path(path), _READERS)


def write(path: str | os.PathLike[str], nest: Any) -> None:
    """Write parameters to a file, replacing what was there.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors`` or ``.npz``.
    nest : nest of arrays
        The parameters; the file holds their leaves under flat names.

    Raises
    ------
    ConfigError
        If the path has another ending.
    LayoutError
        If the parameters cannot be laid out.
    CheckpointError
        If the file cannot be written, or cannot hold a leaf's name. What was there before is untouched.
    """
    target = Path(path)
    writer = _format(target, _WRITERS)
    layout = Layout.of(nest)
    arrays = {_stored_name(leaf.name): array for leaf, array in zip(layout.leaves, layout.flatten(nest), strict=True)}
    if len(arrays) < len(layout.leaves):
        raise CheckpointError(f"cannot write {target}: two leaves would be called {BARE_NAME!r}; rename one")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Made here with the permissions that the user's umask asks for: safetensors makes 0600 files of its own.
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        writer(beside, arrays)
        os.chmod(beside, mode)
        _sync(beside)
        os.replace(beside, target)
        _sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def read(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the arrays of a file.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors`` or ``.npz``.

    Returns
    -------
    dict of str to ndarray
        Flat names, sorted, and arrays in native byte order that belong to the caller.

    Raises
    ------
    ConfigError
        If the path has another ending.
    CheckpointError
        If the file is missing, damaged, or holds what distgrad has no type for.
    """
    source = Path(path)
    reader = _format(source, _READERS)
    try:
        arrays = reader(source)
    # A damaged file makes NumPy, zipfile and safetensors raise whatever the damage leads them to.
    except (
        OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError, SyntaxError,
        NotImplementedError, RuntimeError, zipfile.BadZipFile, safetensors.SafetensorError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"cannot read {source}: {_reason(error)}") from error
    if not arrays:
        raise CheckpointError(f"cannot read {source}: it holds no arrays")
    return {name: arrays[name] for name in sorted(arrays)}


def as_nest(arrays: Mapping[str, Array], like: Layout | None = None) -> Any:
    """Give the arrays of a file the structure that they had.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        From `read`.
    like : Layout, optional
        The layout whose structure is taken if it has the same names; its shapes and dtypes do not matter.

    Returns
    -------
    nest of ndarray
        That structure; otherwise one bare array if ``parameters`` is the only name, else a flat dict of the names.
    """
    if like is not None:
        names = [_stored_name(leaf.name) for leaf in like.leaves]
        if set(names) == set(arrays):
            return like.nest([arrays[name] for name in names])
    if set(arrays) == {BARE_NAME}:
        return arrays[BARE_NAME]
    return dict(arrays)


def _write_safetensors(path: Path, arrays: Mapping[str, Array]) -> None:
    # safetensors writes the memory behind an array as it lies, strides or not.
    safetensors.numpy.save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)


def _read_safetensors(path: Path) -> dict[str, Array]:
    try:
        return dict(safetensors.numpy.load_file(path))
    except TypeError:
        dtype_of(BFLOAT16)  # safetensors asks NumPy for it by name, and NumPy knows it from now on
        return dict(safetensors.numpy.load_file(path))


def _write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    # Not numpy.savez: it takes names as keyword arguments, so that a leaf called "file" breaks it.
    for name, array in arrays.items():
        if array.dtype.name == BFLOAT16:
            raise CheckpointError(f"cannot write {name!r}: .npz has no bfloat16; write .safetensors")
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(name + ".npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _read_npz(path: Path) -> dict[str, Array]:
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy"): _read_entry(archive, name) for name in archive.namelist()}


def _read_entry(archive: zipfile.ZipFile, name: str) -> Array:
    if not name.endswith(".npy"):
        raise ValueError(f"entry {name!r} is not an array")
    entry: IO[bytes]
    with archive.open(name) as entry:
        array: Array = np.lib.format.read_array(entry, allow_pickle=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


_WRITERS: dict[str, Callable[[Path, Mapping[str, Array]], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
}
_READERS: dict[str, Callable[[Path], dict[str, Array]]] = {".safetensors": _read_safetensors, ".npz": _read_npz}


def _format(path: Path, formats: Mapping[str, _T]) -> _T:
    try:
        return formats[path.suffix.lower()]
    except KeyError:
        raise ConfigError(f"a file of parameters must end in {' or '.join(formats)}, got {str(path)!r}") from None


def _stored_name(name: str) -> str:
    # "__metadata__" is safetensors' own; zip cuts a name at its first zero character.
    if name == "__metadata__" or "\0" in name:
        raise CheckpointError(f"a leaf in a file cannot be called {name!r}; rename it")
    return name or BARE_NAME


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and orders renames by itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
