"""Where gradients lie until they are settled, if not in the caller's arrays: memory that is used again and again.

Shared with the broker where both are on one host: then not the gradient is sent but a header that names the slot.
Else it is this process's own, and the numbers are sent from there. The broker may be told of a slot or not, and may
forget it (another session, another broker): what it does not know is sent. So nothing depends on sharing.

A slot is free again when the gradient in it is settled. Nothing here knows a socket, a lock or a clock.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from distgrad.arrays import lasting_empty
from distgrad.codec import slot_arenas, slot_bytes
from distgrad.layout import Layout
from distgrad.nests import Container, is_flat
from distgrad.shared_pages import SharedPages, Unavailable
from distgrad.wire import PART_BYTES, charge

# Below this a copy through a socket costs less than everything else.
SHARED_BYTES = 64 * 1024
# Enough that one is being filled, one applied and one waits, if the grant is; more, within this many bytes, where they
# are small.
MIN_SLOTS, MAX_SLOTS = 3, 16
_SLOTS_BYTES = 64 * 1024 * 1024


class SlotMemory:
    """Memory for one gradient.

    Parameters
    ----------
    index : int
        Its name within the process, from 0, never used again.
    layout : Layout
        Of the gradients.
    shares : bool
        Whether to try to make it shared memory.

    Attributes
    ----------
    arenas : list of ndarray, 1-D
        The trained arenas.
    parts : list of memoryview
        The same as the parts of a payload, should it be sent.
    pages : SharedPages or None
        What others may attach to.
    """

    __slots__ = ("_layout", "_leaves", "_taker", "arenas", "index", "number", "pages", "parts")

    def __init__(self, index: int, layout: Layout, *, shares: bool) -> None:
        self.index = index
        self.pages: SharedPages | None = None
        size = slot_bytes(layout)
        memory: np.ndarray[Any, Any] | None = None
        if shares:
            try:
                self.pages = SharedPages(size)
                memory = self.pages.array
            except Unavailable:
                pass
        self.arenas = slot_arenas(layout, lasting_empty(size, np.uint8) if memory is None else memory)
        bytes_of = [arena.view(np.uint8).data for arena in self.arenas if arena.size]
        self.parts = [data[at : at + PART_BYTES] for data in bytes_of for at in range(0, len(data), PART_BYTES)]
        # The gradient in it: unsettled if its number is more than what is settled.
        self.number = 0
        self._taker: weakref.ref[Taken] | None = None
        self._layout = layout
        self._leaves: Any = None

    @property
    def is_taken(self) -> bool:
        """Whether somebody fills it."""
        return self._taker is not None and self._taker() is not None

    def take(self) -> Taken:
        """Take it, until it is given back or what this returns is gone.

        Returns
        -------
        Taken
            For one caller.
        """
        taken = Taken(self)
        self._taker = weakref.ref(taken)
        return taken

    def give_back(self) -> None:
        """End its being taken."""
        self._taker = None

    def nest(self, like: Any) -> Any:
        """Show the memory as a gradient, in containers that are the caller's own.

        Parameters
        ----------
        like : nest
            As for `Layout.nest`.

        Returns
        -------
        nest of ndarray
            An array for each trained leaf, None for the others.
        """
        layout = self._layout
        if self._leaves is None:
            self._leaves = [
                self.arenas[leaf.arena][leaf.offset : leaf.offset + leaf.size].reshape(leaf.shape)
                if leaf.arena < layout.n_trainable_arenas
                else None
                for leaf in layout.leaves
            ]
            # Where there are thousands of leaves they are mostly the items of one dict, which is copied by one call.
            structure = layout.structure
            if isinstance(structure, Container) and structure.kind == "dict" and is_flat(structure):
                self._leaves = layout.nest(self._leaves)
        return dict(self._leaves) if isinstance(self._leaves, dict) else layout.nest(self._leaves, like)


class Taken:
    """A slot in its taker's hands. If Ctrl-C comes on its way there, nobody has this, and the slot is free again.

    Parameters
    ----------
    memory : SlotMemory
        The slot.
    """

    __slots__ = ("__weakref__", "memory")

    def __init__(self, memory: SlotMemory) -> None:
        self.memory = memory

    def keep(self, number: int) -> None:
        """Leave the slot to the gradient in it.

        Parameters
        ----------
        number : int
            The gradient's.
        """
        self.memory.number = number
        self.memory.give_back()

    def give_back(self, last: int | None = None) -> None:
        """Give the slot back unused.

        Parameters
        ----------
        last : int, optional
            The last number that was given, if there was a `keep`: it may have been of one that was not given after all.
        """
        if last is not None and self.memory.number > last:
            self.memory.number = 0
        self.memory.give_back()


class Slots:
    """The slots of one worker, for one layout at a time."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._slots: list[SlotMemory] = []
        self._made = 0
        # The grant when the broker had no room for one more.
        self._crowded_at: int | None = None

    def take(self, layout: Layout, settled: int, grant: int, *, shares: bool) -> Taken | None:
        """Take a slot that is free, or make one.

        Parameters
        ----------
        layout : Layout
            Of the gradient.
        settled : int
            The number up to which all is settled.
        grant : int
            Bytes that may be on the way or in the broker's queue.
        shares : bool
            Whether a new one should be shared memory.

        Returns
        -------
        Taken or None
            For the caller alone, until `keep` or `give_back`. None if all are in use: something has to be settled.
        """
        if self._layout is None or self._layout.fingerprint != layout.fingerprint:
            # The others live on as long as something that is unsettled lies in them.
            self._layout, self._slots, self._crowded_at = layout, [], None
        is_crowded = self._crowded_at is not None
        if is_crowded and grant != self._crowded_at and grant > charge(layout.gradient_bytes):
            self._crowded_at, is_crowded = None, False  # grants are no turns any more
        # What is needed besides is this process's own.
        shares = shares and not (is_crowded and self._slots)
        if shares and any(slot.pages is None for slot in self._slots):
            self._slots = [slot for slot in self._slots if slot.pages is not None]
        for slot in self._slots:
            if not slot.is_taken and slot.number <= settled:
                return slot.take()
        size = max(slot_bytes(layout), 1)
        # As many as may be on the way, and one to fill; what callers hold besides is their own affair.
        useful = 1 if is_crowded else max(1, grant // size) + 1
        useful += sum(slot.is_taken for slot in self._slots)
        if len(self._slots) >= min(useful, max(MIN_SLOTS, min(MAX_SLOTS, _SLOTS_BYTES // size))):
            return None
        slot = SlotMemory(self._made, layout, shares=shares)
        self._made += 1
        self._slots.append(slot)
        return slot.take()

    def crowd(self, taken: Taken, grant: int) -> bool:
        """Take note that the broker has no room for a slot: what is made from now on, until it has, is not shared.

        Parameters
        ----------
        taken : Taken
            The slot.
        grant : int
            As for `take`.

        Returns
        -------
        bool
            Whether it was given back, because there are others to take.
        """
        self._crowded_at = grant
        others = [slot for slot in self._slots if slot is not taken.memory]
        if not others:
            taken.memory.pages = None
            return False
        taken.give_back()
        self._slots = others
        return True

    @property
    def is_waiting_in_vain(self) -> bool:
        """Whether all slots are in their takers' hands, so that nothing that is settled could free one."""
        return all(slot.is_taken for slot in self._slots)
