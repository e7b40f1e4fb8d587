"""What happens in `Worker.push`: the numbers get a place to lie in, and the gradient its number.

Where worker and broker share a host, the place is a slot of memory that both see, and only the header is sent. Else the
caller's numbers are copied into arrays of their own, or lent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distgrad.codec import LENT_BYTES, cut
from distgrad.errors import ControlError, NoParameters, StateError
from distgrad.layout import Layout
from distgrad.shared_pages import host_name
from distgrad.transfer import fetch_layout
from distgrad.wire import MAX_FRAME_BYTES, State
from distgrad_worker.connection import Connection
from distgrad_worker.headers import Header
from distgrad_worker.slots import SHARED_BYTES, Slots, Taken


class Pusher:
    """The pushing side of one worker.

    Parameters
    ----------
    connection : Connection
        Its connection.
    shares_memory : bool
        Whether to share memory with a broker on the same host.
    """

    def __init__(self, connection: Connection, *, shares_memory: bool) -> None:
        self._connection = connection
        self._slots = Slots()
        self._host = host_name() if shares_memory else None
        # The session in which the broker could not attach to a slot.
        self._refused: str | None = None
        # The last push's; the next one's is mostly the same.
        self._header = Header(connection.session.worker_id, 0, None)

    def layout(self) -> Layout:
        """Give the layout of the parameters that the broker has.

        Returns
        -------
        Layout
            As last heard.

        Raises
        ------
        NoParameters
            If it has none.
        """
        connection = self._connection
        layout = connection.session.layout
        if layout is not None:
            return layout
        # The heartbeat that tells of new parameters may still be under way; the broker itself knows.
        known = connection.incarnation
        try:
            return fetch_layout(connection.puller)
        except NoParameters:
            connection.catch_up(known)
            connection.check()  # a new broker has none, and that is the news
            raise

    def push(
        self,
        layout: Layout,
        gradients: Any,
        details: Mapping[str, Any],
        base: State | None,
        *,
        copies: bool,
        asks: int | None = None,
    ) -> int:
        """Queue a gradient from the caller's arrays.

        Parameters
        ----------
        layout : Layout
            From `layout`.
        gradients : nest of array_like
            As for `Worker.push`.
        details : mapping
            From `checked_details`.
        base : State or None
            What it was computed on.
        copies : bool
            Whether the caller may change the arrays at once.
        asks : int, optional
            The pull that its message stands for.

        Returns
        -------
        int
            Its number.
        """
        if layout.gradient_bytes >= SHARED_BYTES and self._shares:
            slot = self.take(layout)
            try:
                layout.pack_gradient(gradients, out=slot.memory.arenas)
            except BaseException:
                slot.give_back()
                raise
            return self.push_slot(layout, slot, details, base, asks)
        pieces = layout.pack_gradient(gradients) if copies else layout.lend_gradient(gradients, LENT_BYTES)
        return self._queue(layout, cut(pieces, MAX_FRAME_BYTES), details, base, None, asks)

    def push_slot(
        self, layout: Layout, slot: Taken, details: Mapping[str, Any], base: State | None, asks: int | None = None
    ) -> int:
        """Queue the gradient that a slot holds.

        Parameters
        ----------
        layout : Layout
            That the slot was taken for.
        slot : Taken
            From `take`; not the caller's any more.
        details : mapping
            From `checked_details`.
        base : State or None
            What it was computed on.
        asks : int, optional
            The pull that its message stands for.

        Returns
        -------
        int
            Its number.
        """
        return self._queue(layout, slot.memory.parts, details, base, slot, asks)

    def reclaim(self, number: int, incarnation: str) -> None:
        """Let the caller write again to the arrays of a gradient that was lent, though it may not be settled.

        Parameters
        ----------
        number : int
            Its number.
        incarnation : str
            Of a broker that has it, all of it: takes no notice of what is still sent to it under that number.

        Raises
        ------
        DistgradError
            If the session is with another broker by now, and waiting until that has it is in vain.
        """
        connection = self._connection
        window = connection.session.window
        if window.settled >= number:
            return
        with connection.lock:
            if connection.incarnation != incarnation:
                connection.wait_settled(number)
            elif window.settled < number:
                window.copy_payload(number)

    def take(self, layout: Layout) -> Taken:
        """Take a slot, waiting for one to become free.

        Parameters
        ----------
        layout : Layout
            From `layout`.

        Returns
        -------
        Taken
            For `push_slot`, or to be given back; the broker knows it, if it can.

        Raises
        ------
        StateError
            If all slots are in callers' hands.
        BrokerUnreachable
            If nothing is settled in time.
        """
        while True:
            slot = self._take(layout)
            if slot.memory.pages is None or slot.memory.index in self._connection.session.shared or not self._shares:
                return slot
            try:
                if self._share(slot, layout):
                    return slot
            except BaseException:
                slot.give_back()
                raise

    def close(self) -> None:
        """Let go of the slots; what is unsettled keeps those that it lies in."""
        self._slots = Slots()

    @property
    def _shares(self) -> bool:
        session = self._connection.session
        return self._host is not None and session.host == self._host and session.name != self._refused

    def _take(self, layout: Layout) -> Taken:
        connection, slots = self._connection, self._slots
        session, driver = connection.session, connection.driver
        window = session.window
        connection.check_open()
        with connection.lock:
            shares = self._shares and layout.gradient_bytes >= SHARED_BYTES
            slot = slots.take(layout, window.settled, session.grant, shares=shares)
            if slot is None:
                if slots.is_waiting_in_vain:
                    raise StateError("every slot is being filled; leave one with-block before the next begins")
                first = window.settled + 1
                session.awaited.append(first)
                driver.wake()

                def is_free() -> bool:
                    nonlocal slot
                    connection.check_open()
                    slot = slots.take(layout, window.settled, session.grant, shares=shares)
                    return slot is not None

                try:
                    connection.wait(is_free)
                finally:
                    session.awaited.remove(first)
            assert slot is not None  # waited for
        return slot

    def _share(self, slot: Taken, layout: Layout) -> bool:
        """Tell the broker of a slot; if it cannot attach to it, what lies in it goes through sockets.

        Returns False if the slot was given back instead, because the broker has no room for it.
        """
        session = self._connection.session
        pages = slot.memory.pages
        assert pages is not None  # the caller has looked
        name = session.name
        try:
            self._connection.puller.request(
                "share",
                worker=session.worker_id,
                session=name,
                slot=slot.memory.index,
                address=list(pages.address),
                fingerprint=layout.fingerprint,
            )
        except ControlError as error:
            if error.code == "crowded":
                with self._connection.lock:
                    return not self._slots.crowd(slot, session.grant)
            if error.code == "unavailable":
                self._refused = name
            return True
        with self._connection.lock:
            if session.name == name:
                session.shared.add(slot.memory.index)
                session.told.add(slot.memory.index)
        return True

    def _queue(
        self,
        layout: Layout,
        parts: Sequence[Any],
        details: Mapping[str, Any],
        base: State | None,
        slot: Taken | None,
        asks: int | None,
    ) -> int:
        header = self._header
        if header.base is not base or header.fingerprint != layout.fingerprint:
            header = self._header = Header(self._connection.session.worker_id, layout.fingerprint, base)
        size = layout.gradient_bytes
        connection = self._connection
        session, driver = connection.session, connection.driver
        try:
            connection.check_open()
            with connection.lock:
                connection.check_open()
                if not session.can_push(size, layout.fingerprint):
                    self._wait_for_room(size, layout.fingerprint)
                if slot is not None:
                    # Before it has its number: Ctrl-C may come when it has, and what is pushed must not be written to.
                    slot.keep(session.window.last + 1)
                index = None if slot is None else slot.memory.index
                number = session.push(header, details, parts, size, index, asks)
                driver.send_pushed(size, may_wait=asks is None)
        except BaseException:
            if slot is not None:
                slot.give_back(session.window.last)
            raise
        return number

    def _wait_for_room(self, size: int, fingerprint: int) -> None:
        connection = self._connection
        session, driver = connection.session, connection.driver

        def has_room() -> bool:
            connection.check_open()
            return session.can_push(size, fingerprint)

        driver.send_due()
        driver.wake()
        try:
            connection.wait(has_room)
        finally:
            session.stop_wanting()
