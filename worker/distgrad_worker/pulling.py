"""What happens in `Worker.pull`: a version is fetched, or seen where the broker has it, and remembered as a base.

On the broker's host a worker may compute on the broker's own memory (``copy=False``). The broker leaves that version
alone until the worker pushes or pulls again; but nobody can hold a broker up for ever, so it may take the version back.
That shows in its stamp, and what was computed on it is then not pushed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from distgrad.errors import ConfigError, NoParameters, SnapshotRevoked, StateError
from distgrad.layout import Layout
from distgrad.shared_reading import Lease, SharedReading
from distgrad.snapshot import Snapshot
from distgrad.transfer import fetch
from distgrad.wire import INT64_MAX, State
from distgrad_worker.connection import Connection

# The most that a pull waits in one request; the broker's own limit.
_WAIT_S = 5.0


class Puller:
    """The pulling side of one worker.

    Parameters
    ----------
    connection : Connection
        Its connection.
    shares_memory : bool
        Whether to read the memory of a broker on the same host.

    Attributes
    ----------
    like : tuple of (int or None, nest)
        Fingerprint and skeleton of what `initialize` was given: a nest comes over the wire without its namedtuples.
    """

    def __init__(self, connection: Connection, *, shares_memory: bool) -> None:
        self.like: tuple[int | None, Any] = (None, None)
        self._connection = connection
        self._reading = SharedReading() if shares_memory else None
        self._last: State | None = None
        self._lease: tuple[State, Lease] | None = None

    def pull(
        self,
        newer_than: Snapshot | State | int | None,
        timeout: float | None,
        out: Snapshot | None,
        *,
        copies: bool,
        own: bool,
        push: Callable[[int | None], int] | None = None,
    ) -> Snapshot:
        """Fetch the parameters.

        Parameters
        ----------
        newer_than, timeout, out : object
            As for `Worker.pull`.
        copies : bool
            Whether the caller wants arrays of its own.
        own : bool
            As for `Worker.pull`.
        push : callable, optional
            Pushes something first, as for `fetch`.

        Returns
        -------
        Snapshot
            A consistent version.
        """
        since = self.state_of(newer_than)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            snapshot = self._fetch(since, deadline, out, push, copies=copies, own=own)
            if snapshot is not None:
                return snapshot
            push = None
            if time.monotonic() >= deadline:
                raise TimeoutError(f"nothing{'' if since is None else f' newer than {since}'} within {timeout} s")
            self._connection.check()

    def close(self) -> None:
        """Let go of the broker's memory; snapshots that are lent keep theirs."""
        self._reading = self._lease = None

    def base_of(self, what: Snapshot | State | int | None) -> State | None:
        """Name the state that a gradient was computed on, by default the one pulled last.

        Parameters
        ----------
        what : Snapshot, State, int or None
            As for `Worker.push`.

        Returns
        -------
        State or None
            None if nothing was pulled.

        Raises
        ------
        SnapshotRevoked
            If it is the broker's own memory and was taken back: the gradient is of no version.
        """
        base = self._last if what is None else self.state_of(what)
        if self._lease is not None and base == self._lease[0]:
            lease, self._lease = self._lease[1], None
            if not lease.is_good():
                raise SnapshotRevoked(
                    "revoked",
                    "the broker took the version back on which this gradient was computed, which is not pushed; "
                    "pull again, with copy=True if computing takes long",
                )
        return base

    def like_of(self, layout: Layout) -> Any:
        """Give a nest whose namedtuples the parameters take over.

        Parameters
        ----------
        layout : Layout
            Theirs.

        Returns
        -------
        nest or None
            None if none is known.
        """
        fingerprint, like = self.like
        return like if layout.fingerprint == fingerprint else None

    def state_of(self, what: Snapshot | State | int | None) -> State | None:
        """Name the state that a caller means; a bare number means the incarnation and generation last pulled.

        Parameters
        ----------
        what : Snapshot, State, int or None
            The state.

        Returns
        -------
        State or None
            None for None.

        Raises
        ------
        StateError
            If a number comes before the first pull.
        ConfigError
            If no version has such a number.
        """
        if what is None:
            return None
        if isinstance(what, Snapshot):
            return what.state
        if isinstance(what, State):
            state = what
        else:
            known = self._last or self._connection.session.state
            if known is None:
                raise StateError("a bare version number means nothing before the first pull; pull first")
            state = known._replace(version=int(what))
        if not (0 <= state.generation <= INT64_MAX and 0 <= state.version <= INT64_MAX):
            raise ConfigError(f"a version must be a whole number from 0 to 2**63 - 1, got {what!r:.80}")
        return state

    def _fetch(
        self,
        since: State | None,
        deadline: float,
        out: Snapshot | None,
        push: Callable[[int | None], int] | None,
        *,
        copies: bool,
        own: bool,
    ) -> Snapshot | None:
        connection = self._connection
        session = connection.session
        name, known = session.name, connection.incarnation
        if session.window.sent < session.window.last:
            with connection.lock:
                connection.driver.send_due()
        ways, sender = connection.puller.ways, connection.driver.sender
        if ways.lane is not sender.lane or (push is not None and sender.may_open_lane(session)):
            with connection.puller.conversation(), connection.lock:
                ways.use(sender.open_lane(session), connection.driver.lane_ended)
        try:
            fetched = fetch(
                connection.puller,
                newer_than=since,
                wait_s=max(0.0, min(_WAIT_S, deadline - time.monotonic())),
                have=session.layout if out is None else out.layout,
                out_arenas=None if out is None or out.is_lent else out.arenas,
                worker=session.worker_id,
                pushed=session.window.last,
                session=name,
                shared=self._reading,
                leases=not copies,
                own=own,
                push=push,
            )
        except NoParameters:
            connection.catch_up(known)
            connection.check()
            raise
        if fetched is None:
            return None
        if known is not None and fetched.state.incarnation != known:
            connection.catch_up(known, deadline - time.monotonic())
        with connection.lock:
            if fetched.settled is not None and session.on_pulled(name, *fetched.settled, time.monotonic()):
                connection.changed.notify_all()
            if session.on_pulled_layout(fetched.state, fetched.layout.fingerprint):
                connection.driver.ask_now()
            self._last = fetched.state
            self._lease = None if fetched.lease is None else (fetched.state, fetched.lease)
        like = self.like_of(fetched.layout)
        return Snapshot(fetched.layout, fetched.arenas, fetched.state, like, is_lent=fetched.lease is not None)
