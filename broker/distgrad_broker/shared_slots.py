"""Slots of shared memory: workers on the broker's host leave gradients there, and send only their headers.

A worker tells of a slot with `share`; the broker attaches to it, or says that it cannot, and then everything is sent
through sockets. What lies in a slot is checked and applied like what comes from a socket. But it is the worker's
memory, and it is read more than once: a rule with state checks all of a gradient before it reads it again to apply it.
Nothing is copied in between, because that costs time. A worker that writes to a slot before its gradient is settled can
therefore bring numbers into the parameters that were never checked. Who runs as the broker's user is trusted not to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distgrad.codec import slot_arenas, slot_bytes
from distgrad.layout import Layout
from distgrad.shared_pages import Unavailable, address_of, attach
from distgrad.wire import Gradient, charge

# A worker uses far fewer; each costs a mapping.
MAX_SLOTS = 64


class SharedSlots:
    """The slots that the broker is attached to; owned by its loop."""

    def __init__(self) -> None:
        # By worker: its session and the layout's fingerprint, and the parts that lie in each slot.
        self._slots: dict[str, tuple[tuple[str, int], dict[int, list[memoryview]]]] = {}

    def attach(self, worker: str, session: str, slot: int, address: object, layout: Layout) -> Sequence[int]:
        """Attach to a slot; those of another layout or session are let go of, but for what is queued.

        Parameters
        ----------
        worker, session : str
            Whose it is.
        slot : int
            Its name within the worker's process.
        address : object
            Where it is found, as it came over the wire.
        layout : Layout
            Of the gradients that will lie in it.

        Returns
        -------
        sequence of int
            All slots that are now known.

        Raises
        ------
        Unavailable
            If that is not possible; nothing is changed.
        """
        found = address_of(address)
        if found.size != slot_bytes(layout) or not found.size:
            raise Unavailable(f"a slot must have {slot_bytes(layout)} bytes, got {found.size}")
        key = session, layout.fingerprint
        known, slots = self._slots.get(worker, (key, {}))
        if known != key:
            slots = {}
        if slot not in slots and len(slots) >= MAX_SLOTS:
            raise Unavailable(f"a worker shares at most {MAX_SLOTS} slots")
        arenas = slot_arenas(layout, attach(found, writes=False))
        slots[slot] = [arena.view(np.uint8).data for arena in arenas if arena.size]
        self._slots[worker] = (key, slots)
        return sorted(slots)

    def known(self, worker: str, session: str, layout: Layout) -> set[int]:
        """Name the slots of one layout that the broker is attached to.

        Parameters
        ----------
        worker, session : str
            Whose they are.
        layout : Layout
            Of the gradients in them.

        Returns
        -------
        set of int
            Their names.
        """
        key, slots = self._slots.get(worker, (None, {}))
        return set(slots) if key == (session, layout.fingerprint) else set()

    def forget(self, worker: str) -> None:
        """Detach from a worker's slots; what is queued keeps those that it lies in.

        Parameters
        ----------
        worker : str
            Its id.
        """
        self._slots.pop(worker, None)

    def find(self, gradient: Gradient) -> None:
        """Give a gradient the parts that lie in its slot; it has none if the slot is not known (see `is_known`).

        Parameters
        ----------
        gradient : Gradient
            With a slot; its header was checked.
        """
        # Not by its fingerprint: what names another layout than its slot was made for is refused when it is applied.
        (session, _), slots = self._slots.get(gradient.worker, (("", 0), {}))
        if session == gradient.session and gradient.slot in slots:
            gradient.parts = slots[gradient.slot]
            gradient.size = sum(map(len, gradient.parts))
            gradient.charge = charge(gradient.size)


def is_known(gradient: Gradient) -> bool:
    """Tell whether the payload of a gradient is there.

    Parameters
    ----------
    gradient : Gradient
        From a channel, which has called `SharedSlots.find`.

    Returns
    -------
    bool
        False if it lies in a slot that the broker does not know: it has to be sent.
    """
    return gradient.slot is None or bool(gradient.parts)
