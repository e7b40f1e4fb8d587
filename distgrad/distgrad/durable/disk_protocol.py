"""The few things that are asked of a disk, so that tests can put another one in its place.

What is written is on the disk after `File.sync`; that a file exists, or has another name, after `Disk.sync_folder`.
Before that a crash of the machine may lose it, whole or in part and in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class File(Protocol):
    """A file that is written to. One thread uses it."""

    def write(self, offset: int, buffers: Sequence[Any]) -> int:
        """Write buffers behind one another.

        Parameters
        ----------
        offset : int
            Where the first one goes, bytes from the file's beginning.
        buffers : sequence of buffers of bytes
            They may be empty.

        Returns
        -------
        int
            How many bytes were written. An `OSError` may leave some of them written.
        """
        ...

    def allocate(self, size: int) -> None:
        """Reserve room; the new bytes are zeros. An `OSError` leaves the file usable.

        Parameters
        ----------
        size : int
            Bytes of the whole file. One that is longer stays as it is.
        """
        ...

    def truncate(self, size: int) -> None:
        """Cut the file.

        Parameters
        ----------
        size : int
            Bytes that are left.
        """
        ...

    def sync(self) -> None:
        """Wait until what was written is on the disk. After an `OSError` nobody knows what is: the file is given up."""
        ...

    def close(self) -> None:
        """Close the file; what was not synced may still be lost."""
        ...


class Disk(Protocol):
    """Files and folders by path."""

    def make_folder(self, folder: str) -> None:
        """Make a folder, and those above it, if it is not there.

        Parameters
        ----------
        folder : str
            Its path.
        """
        ...

    def lock(self, path: str) -> Lock:
        """Take a lock for this process, until it ends.

        Parameters
        ----------
        path : str
            The lock file; made if it is not there.

        Returns
        -------
        Lock
            Held. `DataFolderInUse` is raised if another process holds it.
        """
        ...

    def create(self, path: str) -> File:
        """Make a new file.

        Parameters
        ----------
        path : str
            `FileExistsError` is raised if something is there.

        Returns
        -------
        File
            Empty.
        """
        ...

    def open(self, path: str) -> File:
        """Open a file that is there for writing.

        Parameters
        ----------
        path : str
            `FileNotFoundError` is raised if nothing is there.

        Returns
        -------
        File
            With what it holds.
        """
        ...

    def read(self, path: str, offset: int = 0, size: int | None = None) -> memoryview:
        """Read a piece of a file.

        Parameters
        ----------
        path : str
            The file.
        offset : int
            Where the piece begins.
        size : int, optional
            Its bytes; all that follow by default.

        Returns
        -------
        memoryview
            Bytes in memory of their own; fewer if the file ends before.
        """
        ...

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fill a buffer from a file.

        Parameters
        ----------
        path : str
            The file.
        offset : int
            Where to begin in it.
        buffer : memoryview
            Writable bytes.

        Returns
        -------
        int
            How many bytes were read; fewer than the buffer has if the file ends before.
        """
        ...

    def size(self, path: str) -> int:
        """Give the length of a file.

        Parameters
        ----------
        path : str
            The file.

        Returns
        -------
        int
            Bytes.
        """
        ...

    def list(self, folder: str) -> list[str]:
        """Name what is in a folder.

        Parameters
        ----------
        folder : str
            Its path.

        Returns
        -------
        list of str
            Names without the folder, sorted.
        """
        ...

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, in place of whatever had that name.

        Parameters
        ----------
        source, target : str
            Its path before and after.
        """
        ...

    def remove(self, path: str) -> None:
        """Remove a file.

        Parameters
        ----------
        path : str
            `FileNotFoundError` is raised if nothing is there.
        """
        ...

    def sync_folder(self, folder: str) -> None:
        """Wait until the names in a folder are on the disk.

        Parameters
        ----------
        folder : str
            Its path.
        """
        ...


class Lock(Protocol):
    """A lock that is held."""

    def close(self) -> None:
        """Give it back."""
        ...
