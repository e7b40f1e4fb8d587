"""Checkpoints on disk: written whole or not at all, a piece at a time, and verified whole before they are used.

A file is written beside its place, synced, and renamed; it is never edited afterwards. The bytes are in
``docs/checkpoint.md``.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import suppress

import numpy as np
import xxhash

from distgrad.arrays import lasting_empty
from distgrad.durable.checkpoint_header import (
    FORMAT,
    MAX_HEADER_BYTES,
    UNSIGNED,
    Array,
    Block,
    Checkpoint,
    beginning,
    read_header,
    write_header,
)
from distgrad.durable.disk import Disk, File
from distgrad.errors import CheckpointError, ConfigError, DataDamaged, StateError

PIECE_BYTES = 4 << 20
"""What one step writes at most. It also stays in the processor's cache from the reading to the checksum."""
SYNC_BYTES = 32 << 20
"""What is written between two syncs: the journal's own syncs wait behind them."""


class CheckpointWriter:
    """Writes one checkpoint, a step at a time, for a thread that has other work between the steps.

    Parameters
    ----------
    disk : Disk
        Where to.
    path : str
        The file to be; one that is there is replaced at the end. Until then ``.<name>.tmp`` stands beside it.
    checkpoint : Checkpoint
        What to write. Its arrays are read until the last step, and must not change before.

    Attributes
    ----------
    size : int
        Bytes of the whole file.

    Raises
    ------
    CheckpointError
        If it has more leaves, or more state, than a file can hold.
    ConfigError
        If arrays do not fit the layout.
    """

    def __init__(self, disk: Disk, path: str, checkpoint: Checkpoint) -> None:
        self._disk = disk
        self._path = path
        folder, name = os.path.split(path)
        self._folder = folder or os.curdir
        self._temporary = os.path.join(self._folder, f".{name}.tmp")
        self._file: File | None = None
        self._is_there = self._is_whole = False
        head, self._place, blocks = write_header(checkpoint)
        self._buffers = [memoryview(head), *(_bytes_of(_checked(checkpoint, block)) for block in blocks if block.size)]
        self.size = sum(map(len, self._buffers))
        self._steps = self._write()

    def step(self) -> bool:
        """Write the next piece, or sync.

        Returns
        -------
        bool
            Whether the checkpoint is whole, in its place, and on the disk.

        Raises
        ------
        StateError
            If it was abandoned, or failed before.
        OSError
            If the disk fails or is full. The temporary file is removed, and what was at the path is untouched; only
            if the very last sync fails the new file may be there, and may be gone after a crash.
        """
        try:
            next(self._steps)
        except StopIteration:
            if not self._is_whole:
                raise StateError(f"the writing of {self._path} was given up") from None
        except BaseException:
            self.abandon()
            raise
        return self._is_whole

    def abandon(self) -> None:
        """Stop, and remove the temporary file; does nothing once the checkpoint is whole."""
        self._steps.close()
        with suppress(OSError):
            self._close()
        if self._is_there:
            self._is_there = False
            with suppress(OSError):
                self._disk.remove(self._temporary)

    def _write(self) -> Generator[None]:
        digest = xxhash.xxh3_64()
        self._file = file = self._create()
        offset = synced = 0
        for buffer in self._buffers:
            for begin in range(0, len(buffer), PIECE_BYTES):
                piece = buffer[begin : begin + PIECE_BYTES]
                file.write(offset, [piece])
                digest.update(piece)
                offset += len(piece)
                yield
                if offset - synced >= SYNC_BYTES:
                    file.sync()
                    synced = offset
                    yield
        file.write(self._place, [digest.hexdigest().encode()])
        file.sync()
        yield
        self._close()
        self._disk.rename(self._temporary, self._path)
        self._is_there = False
        self._disk.sync_folder(self._folder)
        self._is_whole = True

    def _create(self) -> File:
        try:
            file = self._disk.create(self._temporary)
        except FileExistsError:  # left over by one that was killed
            self._disk.remove(self._temporary)
            file = self._disk.create(self._temporary)
        self._is_there = True
        return file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def read_checkpoint(disk: Disk, path: str) -> Checkpoint:
    """Read a checkpoint, and verify all of it.

    Parameters
    ----------
    disk : Disk
        Where from.
    path : str
        The file.

    Returns
    -------
    Checkpoint
        Whole. Its arrays are new, lasting ones, which `ParameterHolder.set_arenas` may take.

    Raises
    ------
    DataDamaged
        If a byte is not as it was written, or the file is no checkpoint.
    CheckpointError
        If it is of another version of the format, or cannot be read.
    """
    try:
        source = _Source(disk, path)
        text = source.read_head()
        known = beginning(text)
        if known is None:
            raise DataDamaged(f"{path} does not begin as a checkpoint of distgrad does", path=path, offset=0)
        version, checksum, place = known
        source.digest.update(b"".join((text[:place], UNSIGNED, text[place + len(UNSIGNED) :])))
        if version != FORMAT:
            source.skip_rest()
            source.check(checksum, place)
            raise CheckpointError(
                f"{path} has checkpoint format {version}; this distgrad reads format {FORMAT}",
                hint="use the distgrad that wrote it, or a newer one",
            )
        checkpoint = _read(source, text)
        source.check(checksum, place)
        return checkpoint
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise CheckpointError(f"cannot read {path}: {reason}") from error


def _read(source: _Source, text: bytes) -> Checkpoint:
    """Read what comes behind the header into new arrays; their content is not verified yet."""
    try:
        header = read_header(text)
    except ValueError as error:
        raise DataDamaged(
            f"{source.path} is damaged: its header is wrong: {error}", path=source.path, offset=8
        ) from error
    expected = source.offset + sum(block.size * block.dtype.itemsize for block in header.blocks)
    if source.size != expected:
        raise DataDamaged(
            f"{source.path} is damaged: it has {source.size} bytes, its header tells of {expected}",
            path=source.path,
            offset=min(source.size, expected),
        )
    arrays: dict[tuple[str | None, int], Array] = {}
    for block in header.blocks:
        arrays[block.slot, block.arena] = array = lasting_empty(block.size, block.dtype)
        if block.size:
            source.fill(_bytes_of(array))
    layout = header.layout
    numbers, trained = (range(len(layout.arenas)), range(layout.n_trainable_arenas)) if layout else ((), ())
    return Checkpoint(
        header.sequence,
        header.version,
        header.state,
        layout,
        [arrays[None, number] for number in numbers],
        {slot: [arrays[slot, number] for number in trained] for slot in header.slots},
    )


class _Source:
    """A file that is read from its beginning to its end, and the checksum of what was read."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self.path = path
        self.size = disk.size(path)
        self.offset = 0
        self.digest = xxhash.xxh3_64()

    def read_head(self) -> bytes:
        """Read the header, and leave it to the caller to count it in, as the checksum in it is left out."""
        start = bytes(self._disk.read(self.path, 0, 8))
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(self.size - 8, MAX_HEADER_BYTES):
            raise DataDamaged(
                f"{self.path} is damaged: it has {self.size} bytes, and a header of {length}", path=self.path, offset=0
            )
        self.digest.update(start)
        text = bytes(self._disk.read(self.path, 8, length))
        self.offset = 8 + len(text)
        self._expect(len(text), length)
        return text

    def fill(self, buffer: memoryview) -> None:
        """Read on, into a buffer."""
        for begin in range(0, len(buffer), PIECE_BYTES):
            piece = buffer[begin : begin + PIECE_BYTES]
            count = self._disk.read_into(self.path, self.offset, piece)
            self.digest.update(piece)
            self.offset += count
            self._expect(count, len(piece))

    def skip_rest(self) -> None:
        """Read on to the end, for the checksum only."""
        scratch = memoryview(bytearray(min(PIECE_BYTES, self.size - self.offset)))
        while self.offset < self.size:
            self.fill(scratch[: self.size - self.offset])

    def check(self, checksum: bytes, place: int) -> None:
        """Compare what was read with its checksum."""
        expected, found = checksum.decode(), self.digest.hexdigest()
        if found != expected:
            raise DataDamaged(
                f"{self.path} is damaged: its checksum is {expected}, its bytes give {found}",
                path=self.path,
                offset=8 + place,
            )

    def _expect(self, count: int, expected: int) -> None:
        if count < expected:
            raise DataDamaged(
                f"{self.path} is damaged: it ends after {self.offset} of {self.size} bytes",
                path=self.path,
                offset=self.offset,
            )


def _checked(checkpoint: Checkpoint, block: Block) -> Array:
    """Find the array of a block; the rest of the program is not trusted with its size."""
    arrays = checkpoint.arenas if block.slot is None else checkpoint.slots[block.slot]
    array = arrays[block.arena] if block.arena < len(arrays) else np.empty(0, block.dtype)
    if array.shape != (block.size,) or array.dtype != block.dtype or not array.flags.c_contiguous:
        raise ConfigError(
            f"arena {block.arena} of {block.slot or 'the parameters'} must be {block.size} contiguous elements of "
            f"{block.dtype}, got {array.dtype} of shape {array.shape}"
        )
    return array


def _bytes_of(array: Array) -> memoryview:
    return array.view(np.uint8).data
