"""What is on a simulated disk: bytes of files, names in folders, and what a crash of the machine leaves of both."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""


class NameEvent(NamedTuple):
    """A name came (no source), went (no target), or became another one."""

    source: str | None
    target: str | None
    inode: Inode | None

    def happen(self, names: dict[str, Inode]) -> None:
        """Change the names in a folder; where an event is lost that this one needs, nothing happens."""
        if self.source is None or self.target is None:
            if self.target is not None and self.inode is not None:
                names[self.target] = self.inode
            elif self.source is not None:
                names.pop(self.source, None)
        elif self.inode is not None and names.get(self.source) is self.inode:
            names[self.target] = names.pop(self.source)


class Inode:
    """A file's bytes: those that are seen, those that are certain, and the changes between; zeros behind both."""

    __slots__ = ("certain", "certain_size", "changes", "seen", "size", "taken")

    def __init__(self) -> None:
        self.seen, self.certain = bytearray(), bytearray()
        self.size = self.certain_size = 0
        self.taken = 0
        self.changes: list[tuple[int, bytes | None]] = []  # bytes at an offset, or None and a new size

    def change(self, change: tuple[int, bytes | None]) -> None:
        self.size = _apply(self.seen, self.size, change)
        self.changes.append(change)

    def sync(self) -> None:
        for change in self.changes:
            self.certain_size = _apply(self.certain, self.certain_size, change)
        self.changes.clear()

    def sync_some(self, random: Random) -> None:
        for change in self.changes:
            for piece in _surviving(change, random, 0.5):
                self.certain_size = _apply(self.certain, self.certain_size, piece)

    def spoil(self, random: Random) -> None:
        """Fail to sync: what was not written counts as written from now on, and no later sync will write it."""
        self.sync_some(random)
        self.changes.clear()

    def copy(self) -> Inode:
        twin = Inode()
        twin.seen, twin.certain = bytearray(self.seen), bytearray(self.certain)
        twin.size, twin.certain_size, twin.taken = self.size, self.certain_size, self.taken
        twin.changes = list(self.changes)
        return twin

    def survive(self, random: Random, chance: float) -> Inode:
        """Give the file as a crash of the machine leaves it."""
        twin = Inode()
        twin.seen, twin.size = bytearray(self.certain), self.certain_size
        is_torn = random.random() < 0.5  # else each call survives whole or not at all
        for change in self.changes:
            if is_torn:
                pieces = _surviving(change, random, chance)
            else:
                pieces = [change] if random.random() < chance else []
            for piece in pieces:
                twin.size = _apply(twin.seen, twin.size, piece)
        if twin.size > self.certain_size and random.random() < 0.25:
            # The data arrived, but not the new size.
            twin.size = _apply(twin.seen, twin.size, (random.randrange(self.certain_size, twin.size + 1), None))
        twin.certain, twin.certain_size = bytearray(twin.seen), twin.size
        twin.taken = max(len(twin.seen), min(self.taken, twin.size))
        return twin


def _apply(image: bytearray, size: int, change: tuple[int, bytes | None]) -> int:
    """Change an image; give its new size."""
    place, data = change
    if data is None:
        del image[place:]
        return place
    if place > len(image):
        image.extend(bytes(place - len(image)))
    image[place : place + len(data)] = data
    return max(size, place + len(data))


def _surviving(change: tuple[int, bytes | None], random: Random, chance: float) -> list[tuple[int, bytes | None]]:
    """Choose the sectors of a change that reach the disk."""
    place, data = change
    if data is None:
        return [change] if random.random() < chance else []
    pieces: list[tuple[int, bytes | None]] = []
    start = 0
    while start < len(data):
        stop = min(len(data), start + SECTOR_BYTES - (place + start) % SECTOR_BYTES)
        if random.random() < chance:
            pieces.append((place + start, data[start:stop]))
        start = stop
    return pieces
