"""Read the parameters of a running broker: as they are now, or each new version as it appears.

For evaluators, servers of predictions, and whoever else wants parameters and changes nothing: a key of the role
``read`` is enough.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distgrad import transfer
from distgrad.client import ControlClient
from distgrad.errors import NoParameters, StateError
from distgrad.quantities import checked_timeout
from distgrad.shared_reading import SharedReading
from distgrad.snapshot import Snapshot

if TYPE_CHECKING:
    from distgrad.keys import ClientKeys
    from distgrad.layout import Layout
    from distgrad.wire import State

# The longest wait for news that the protocol grants to one request; then it is asked again.
_LONGEST_WAIT_S = 5.0
# A broker without parameters says so at once, whatever the wait, so the pauses are ours. They grow to a second: a
# thousand readers of a broker that nobody has set up yet then cost it a thousand small replies a second at most.
_FIRST_PAUSE_S = 0.05
_LAST_PAUSE_S = 1.0


class Reader:
    """A connection to a broker that reads its parameters.

    Nothing is sent before the first call. A reader serves one thread at a time; only `close` may be called from
    another one. A child of ``fork`` needs a reader of its own.

    Parameters
    ----------
    address : str
        The broker's control address: ``host``, ``host:port``, ``[v6]:port`` or ``tcp://…``; the port defaults to 5556.
    keys : path or ClientKeys, optional
        A key file of any role, for a broker that has keys.
    timeout : float, seconds
        How long the broker may be away.
    shares_memory : bool
        Whether to read the memory of a broker on the same host, which is faster and costs the broker nothing.

    Raises
    ------
    ConfigError
        If an argument is impossible.
    KeyFileError
        If the key file cannot be used.

    Examples
    --------
    >>> with Reader("127.0.0.1:5556") as reader:  # doctest: +SKIP
    ...     for snapshot in reader.follow():
    ...         print(snapshot.version, evaluate(snapshot.parameters))
    """

    def __init__(
        self,
        address: str,
        keys: str | os.PathLike[str] | ClientKeys | None = None,
        timeout: float = 30.0,
        *,
        shares_memory: bool = True,
    ) -> None:
        self._timeout = checked_timeout(timeout)
        self._client = ControlClient(address, keys, timeout)
        self._reading = SharedReading() if shares_memory else None
        self._layout: Layout | None = None
        self._closed = threading.Event()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a `follow` that waits in another thread ends within a second. Idempotent."""
        self._closed.set()
        self._client.close()
        self._reading = None

    def get(self, out: Snapshot | None = None) -> Snapshot:
        """Fetch the current version.

        Parameters
        ----------
        out : Snapshot, optional
            An earlier result whose memory is reused if the layout is the same; its arrays change, and hold a mixture
            if the call fails.

        Returns
        -------
        Snapshot
            A consistent version.

        Raises
        ------
        NoParameters
            If none were set yet.
        BrokerUnreachable
            If the broker does not answer in time.
        SnapshotRevoked
            If the broker had to take the snapshot back again and again: this reader is too slow.
        Destroyed
            If the broker was destroyed.
        StateError
            If this reader is closed.
        """
        snapshot = self._fetch(None, 0.0, out, self._timeout)
        assert snapshot is not None  # whoever names no state has nothing that could be unchanged
        return snapshot

    def follow(
        self, newer_than: Snapshot | State | None = None, timeout: float | None = None, *, reuse: bool = False
    ) -> Iterator[Snapshot]:
        """Receive each new version as it appears, without end.

        The current version comes at once, or the first one as soon as there are parameters. Whoever takes longer than
        the broker for an update gets the newest version then, and never those in between. Parameters that were
        replaced, and those of a broker that was restarted, count as new, whatever their version.

        Parameters
        ----------
        newer_than : Snapshot or State, optional
            Begin with something else than this: what was read last, to go on after an error.
        timeout : float, optional, seconds
            How long the broker may be away, instead of the reader's. A shorter absence goes unnoticed; a longer one
            is an error, at the latest 5 s after its time. Waiting for a broker that answers has no limit.
        reuse : bool
            Fetch each version into the arrays of the former one, which then changes. By default every snapshot has
            arrays of its own.

        Yields
        ------
        Snapshot
            A consistent version. The iteration ends when `close` is called, in the middle of a wait too.

        Raises
        ------
        BrokerUnreachable
            If the broker is away for longer than `timeout`.
        SnapshotRevoked
            If the broker had to take a snapshot back again and again: this reader is too slow.
        Destroyed
            If the broker was destroyed.
        ConfigError
            If `timeout` is impossible.
        StateError
            If this reader was closed before.
        """
        if self._closed.is_set():
            raise StateError("this reader is closed; make another one")
        known = newer_than.state if isinstance(newer_than, Snapshot) else newer_than
        return self._follow(known, self._timeout if timeout is None else checked_timeout(timeout), reuse)

    def _follow(self, known: State | None, timeout: float, reuse: bool) -> Iterator[Snapshot]:
        out: Snapshot | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            wait_s = 0.0 if known is None else min(_LONGEST_WAIT_S, timeout)
            try:
                snapshot = self._fetch(known, wait_s, out, timeout)
            except NoParameters:
                if self._closed.wait(pause_s):
                    return
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
                continue
            except StateError:
                if self._closed.is_set():
                    return
                raise
            pause_s = _FIRST_PAUSE_S
            if snapshot is None:
                continue
            yield snapshot
            known, out = snapshot.state, snapshot if reuse else None
            # What the caller has let go of must not stay in memory beside the next version.
            del snapshot

    def _fetch(self, known: State | None, wait_s: float, out: Snapshot | None, timeout: float) -> Snapshot | None:
        fetched = transfer.fetch(
            self._client,
            newer_than=known,
            wait_s=wait_s,
            have=self._layout,
            out_arenas=None if out is None else out.arenas,
            timeout=timeout,
            shared=self._reading,
        )
        if fetched is None:
            return None
        self._layout = fetched.layout
        return Snapshot(fetched.layout, fetched.arenas, fetched.state)
