"""The gradients that are not settled yet, in order: what was numbered, what is on the way, what still waits.

``settled < … <= sent < … <= last``: numbers up to *settled* are done with, those up to *sent* were sent in the
current attempt, the rest waits for a grant. The bytes in flight (settled < number <= sent) stay within the grant;
everything kept stays within the window's own limit. What a former process under the same id left in the broker's
queue is in flight too, for the grant covers it. Nothing here knows a socket or a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Mapping, Sequence
from typing import Any

from distgrad.wire import INT64_MAX, MIN_CHARGE_BYTES
from distgrad_worker.headers import Header

# Enough that the broker always has the next gradient while it applies one; more would only make workers staler.
DEFAULT_LIMIT_BYTES = 64 * 1024 * 1024


class Entry:
    """One numbered gradient.

    Parameters
    ----------
    number : int
        Its number.
    header : Header
        What its header shares with others.
    details : mapping
        From `checked_details`.
    parts : sequence of buffers
        The payload; not touched by anybody until it is settled.
    charge : int
        What it counts for in the grant, bytes.
    slot : int or None
        The slot that the payload lies in.
    asks : int or None
        The number of the pull that its message stands for as well.
    """

    __slots__ = ("asks", "charge", "details", "header", "number", "parts", "slot")

    def __init__(
        self,
        number: int,
        header: Header,
        details: Mapping[str, Any],
        parts: Sequence[Any],
        charge: int,
        slot: int | None,
        asks: int | None,
    ) -> None:
        self.number = number
        self.header = header
        self.details = details
        self.parts = parts
        self.charge = charge
        self.slot = slot
        self.asks = asks

    def frames(self, shared: Container[int] = ()) -> list[Any]:
        """Build the message; `Header.address` comes first.

        Parameters
        ----------
        shared : container of int
            The slots that the broker knows; a payload in another one is sent.

        Returns
        -------
        list of buffers
            The header, and what is not in it.
        """
        details, parts = self.details, self.parts
        if self.slot is not None and self.slot in shared:
            details, parts = {**details, "slot": self.slot}, ()
        # Again if it is sent again: the broker knows whether the pull was asked for otherwise since.
        return self.header.frames(self.number, details, parts, self.asks)


class Window:
    """Unsettled gradients of one worker.

    Parameters
    ----------
    limit_bytes : int or None
        The most that is kept; None is 64 MiB or two gradients, whichever is more.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        # Whether only the grant limits a window whose user named no limit.
        self.keeps_all = False
        self.settled = 0
        self.sent = 0
        self.last = 0
        self.kept_bytes = 0
        self.in_flight_bytes = 0
        # Numbers up to here belong to a former process; as long as its bytes may be in the queue they count.
        self.inherited = 0
        self._inherited_bytes = 0
        self._entries: deque[Entry] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def lowest(self) -> int:
        """Lowest unsettled number, 0 if there is none."""
        return self._entries[0].number if self._entries else 0

    @property
    def unsent_charge(self) -> int:
        """What the next gradient to be sent counts for, 0 if all are sent."""
        return self._entries[self.sent + 1 - self._entries[0].number].charge if self.sent < self.last else 0

    def inherit(self, settled: int, accepted: int, queued_bytes: int) -> None:
        """Go on where a former process under the same id stopped.

        Parameters
        ----------
        settled : int
            The broker's cumulative settled number.
        accepted : int
            The last number that the broker has.
        queued_bytes : int
            What lies between the two in the broker's queue.
        """
        self.settled = settled
        self.sent = self.last = self.inherited = accepted
        self.kept_bytes = self.in_flight_bytes = self._inherited_bytes = queued_bytes

    def disown(self, queued_bytes: int = 0) -> None:
        """Note that no more of a former process's bytes can be in the queue.

        Parameters
        ----------
        queued_bytes : int
            What the broker has accepted of this id and not settled, whichever process sent it.
        """
        gone = max(self._inherited_bytes - queued_bytes, 0)
        self.kept_bytes -= gone
        self.in_flight_bytes -= gone
        self._inherited_bytes -= gone

    def has_room(self, charge: int, grant: int) -> bool:
        """Tell whether one more gradient can be taken in.

        Parameters
        ----------
        charge : int
            What it counts for, bytes.
        grant : int
            The broker's grant, bytes.

        Returns
        -------
        bool
            True if it fits in the grant and in the window; an empty window takes one of any size.
        """
        if self.kept_bytes + charge > grant:
            return False
        if self.limit_bytes is None and self.keeps_all:
            return True
        limit = max(DEFAULT_LIMIT_BYTES, 2 * charge) if self.limit_bytes is None else self.limit_bytes
        return not self._entries or self.kept_bytes + charge <= limit

    def add(
        self,
        header: Header,
        details: Mapping[str, Any],
        parts: Sequence[Any],
        charge: int,
        slot: int | None = None,
        asks: int | None = None,
    ) -> Entry:
        """Give a gradient the next number and keep it until it is settled.

        Parameters
        ----------
        header : Header
            What its header shares with others.
        details : mapping
            From `checked_details`.
        parts : sequence of buffers
            Its payload.
        charge : int
            What it counts for, bytes.
        slot : int, optional
            The slot that the payload lies in.
        asks : int, optional
            The pull that its message stands for.

        Returns
        -------
        Entry
            Not sent yet.
        """
        entry = Entry(self.last + 1, header, details, parts, charge, slot, asks)
        # Ctrl-C comes at the beginning or end of a call: either nothing is done, or all.
        self.last = entry.number
        self.kept_bytes += charge
        self._entries.append(entry)
        return entry

    def send(self, grant: int, last: int = INT64_MAX) -> list[Entry]:
        """Take what may be sent now, and mark it as sent.

        Parameters
        ----------
        grant : int
            The broker's grant, bytes.
        last : int, optional
            No number behind it.

        Returns
        -------
        list of Entry
            In order.
        """
        entries = self._entries
        taken: list[Entry] = []
        # The usual case is one new entry at the end; only a new attempt looks at more.
        for index in range(self.sent - self.last, min(last - self.last, 0)):
            entry = entries[index]
            if self.in_flight_bytes + entry.charge > grant:
                break
            self.sent = entry.number
            self.in_flight_bytes += entry.charge
            taken.append(entry)
        return taken

    def settle(self, number: int) -> int:
        """Let go of everything up to a number.

        Parameters
        ----------
        number : int
            The broker's cumulative settled number.

        Returns
        -------
        int
            How many were let go.
        """
        count = 0
        entries = self._entries
        while entries and entries[0].number <= number:
            entry = entries[0]
            # Ctrl-C comes at the end of a call, when the entry is gone as well, or at the end of a turn.
            self.kept_bytes -= entry.charge
            if entry.number <= self.sent:
                self.in_flight_bytes -= entry.charge
            entries.popleft()
            count += 1
        if number >= self.inherited:
            self.disown()
        self.settled = max(self.settled, number)
        self.sent = max(self.sent, self.settled)
        self.last = max(self.last, self.settled)
        return count

    def rewind(self, accepted: int) -> None:
        """Note that everything behind a number has to be sent again.

        Parameters
        ----------
        accepted : int
            The last number that the broker has.
        """
        self.sent = min(max(accepted, self.settled, self.inherited), self.last)
        sent = sum(entry.charge for entry in self._entries if entry.number <= self.sent)
        self.in_flight_bytes = self._inherited_bytes + sent

    def copy_payload(self, number: int) -> None:
        """Copy an unsettled gradient's payload, whose memory its caller wants back; one in a slot is not the caller's.

        Parameters
        ----------
        number : int
            Its number.
        """
        entry = self._entries[number - self._entries[0].number]
        if entry.slot is None:
            entry.parts = [bytes(part) for part in entry.parts]

    def give_up_payloads(self, fingerprint: int) -> None:
        """Let go of the unsent payloads of any other layout; their numbers are sent without one, to be refused.

        A payload that is larger than the present gradients might never be covered by a grant.

        Parameters
        ----------
        fingerprint : int
            Of the present layout.
        """
        for entry in self._entries:
            if entry.number > self.sent and entry.header.fingerprint != fingerprint:
                self.kept_bytes += MIN_CHARGE_BYTES - entry.charge
                entry.parts, entry.charge, entry.slot = (), MIN_CHARGE_BYTES, None
