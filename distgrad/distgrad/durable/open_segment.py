"""The one file of a journal that is written to, and who waits for the disk to have it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from distgrad.durable.disk import File

Submit = Callable[[Callable[[], None]], "Future[None]"]
"""Has something done, perhaps on another thread."""


def at_once(call: Callable[[], None]) -> Future[None]:
    """Do something before returning.

    Parameters
    ----------
    call : callable
        What to do.

    Returns
    -------
    Future
        Done, with the exception if there was one.
    """
    try:
        call()
    except Exception as error:
        future: Future[None] = Future()
        future.set_exception(error)
    else:
        return _DONE
    return future


_DONE: Future[None] = Future()
_DONE.set_result(None)


class OpenSegment:
    """The segment that is written to.

    Parameters
    ----------
    path : str
        Its name.
    file : File
        New.
    size : int
        How much room it has, bytes.
    replaced : list of str
        Older ones that begin with the same record; not needed once this one holds something durable.

    Attributes
    ----------
    offset : int
        Where the next record goes.
    is_on_disk : bool
        Whether it holds something durable.
    """

    __slots__ = ("file", "is_on_disk", "offset", "path", "replaced", "size")

    def __init__(self, path: str, file: File, size: int, replaced: list[str]) -> None:
        self.path = path
        self.file = file
        self.size = size
        self.replaced = replaced
        self.offset = 0
        self.is_on_disk = False

    def reserve(self) -> None:
        """Reserve room, so that a sync need not write the file's size; on a tiny disk there may be none."""
        try:
            self.file.allocate(self.size)
        except OSError:
            self.trim()

    def trim(self) -> None:
        """Cut off what is behind the last record; the reader copes with it as well."""
        with suppress(OSError):
            self.file.truncate(self.offset)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self.file.close()
