"""The class that a training program imports: pull parameters, push gradients."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from distgrad.errors import DistgradError
from distgrad.nests import skeleton
from distgrad.shared_pages import host_name
from distgrad.snapshot import Snapshot
from distgrad.sockets import client_keys
from distgrad.transfer import offer
from distgrad.wire import State
from distgrad_worker.connection import Connection, new_session
from distgrad_worker.headers import checked_details
from distgrad_worker.pulling import Puller
from distgrad_worker.pushing import Pusher
from distgrad_worker.session import OPEN
from distgrad_worker.slot import Slot

if TYPE_CHECKING:
    from types import TracebackType

    from distgrad.keys import ClientKeys, KeyPath
    from distgrad.sockets import Context

# An unfinished worker is given this long to deliver when its with-block ends by an exception.
_ABORT_FLUSH_S = 1.0


class Worker:
    """Connection of one worker to a broker.

    A gradient that was pushed is *queued*, not applied: it is kept here, and sent again if need be, until the
    broker says that it is settled. `flush` waits for that. The methods may be called from several threads of the
    process that made the worker, not from a child of ``fork``.

    Parameters
    ----------
    address : str
        The broker's control channel: ``host``, ``host:port`` or ``tcp://…``; `hello` tells the rest.
    worker_id : str, optional
        Unique among the workers that run. One that comes back under its id goes on with its numbers and is told its
        last cursor. By default one is made up, and forgotten after `close`.
    keys : path or ClientKeys, optional
        File made by ``distgrad keys new``; needed if the broker has keys.
    window_bytes : int, optional
        The most that unsettled gradients may take here, bytes; by default 64 MiB or two gradients, whichever is more.
        Where memory is shared there are also at most 16 slots, or 3 of more than 21 MiB.
    timeout : float
        How long the broker may be unreachable before a call gives up, seconds. Waiting for a broker that answers
        (because it is stopped, say) is not limited by it.
    gradients : str, optional
        Where to send gradients, if not where the broker says: for forwarded ports.
    shares_memory : bool
        Whether to share memory with a broker on the same host, which is faster and has the same results.
    context : zmq.Context, optional
        For many workers in one process, which then have one thread of ZeroMQ in all instead of one each. It stays the
        caller's, to be ended after all of them were closed. Each needs six of its sockets (`zmq.MAX_SOCKETS`).

    Raises
    ------
    BrokerUnreachable
        If no broker answers in time; names the address that was tried.
    ConfigError
        If an argument is impossible.
    KeyFileError
        If the key file cannot be used.
    ControlError
        If the broker does not take the worker (`Fenced`, `Forbidden`, …).

    Examples
    --------
    >>> with Worker("127.0.0.1:5556") as worker:  # doctest: +SKIP
    ...     snapshot = worker.initialize({"w": np.zeros(3, np.float32)})
    ...     worker.push({"w": gradient(snapshot.parameters)})
    """

    def __init__(
        self,
        address: str,
        *,
        worker_id: str | None = None,
        keys: KeyPath | ClientKeys | None = None,
        window_bytes: int | None = None,
        timeout: float = 30.0,
        gradients: str | None = None,
        shares_memory: bool = True,
        context: Context | None = None,
    ) -> None:
        self._session = new_session(worker_id, window_bytes)
        host = host_name() if shares_memory else None
        self._connection = Connection(self._session, address, client_keys(keys), timeout, gradients, context, host)
        self._lock = self._connection.lock
        self._pusher = Pusher(self._connection, shares_memory=shares_memory)
        self._puller = Puller(self._connection, shares_memory=shares_memory)
        # A worker that nobody has any more delivers what it has and leaves; else it would count as one for ever.
        self._finalizer = weakref.finalize(self, self._connection.abandon)
        self._finalizer.atexit = False  # the connection sees to the end of the program
        try:
            with self._lock:
                self._connection.wait(lambda: self._session.phase == OPEN)
        except BaseException:
            self._finalizer.detach()
            self._connection.shut(leaves=False)
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close(timeout=_ABORT_FLUSH_S)
        except (DistgradError, TimeoutError) as lesser:
            if error is not None:
                error.add_note(f"closing the worker failed as well: {lesser}")

    @property
    def worker_id(self) -> str:
        """Name of this worker at the broker."""
        return self._session.worker_id

    @property
    def cursor(self) -> bytes | str | None:
        """Where this worker id stood in its data when this process came: the last accepted cursor, or None."""
        return self._session.cursor

    @property
    def settled(self) -> int:
        """Highest number up to which every gradient of this worker is settled, as last heard; `flush` makes sure."""
        return self._session.window.settled

    @property
    def superseded(self) -> int:
        """How many gradients of this worker id the broker's policy has superseded so far, as last heard."""
        return self._session.superseded

    def initialize(self, parameters: Any) -> Snapshot:
        """Offer the first parameters; the first offer wins and all workers get the winner.

        Parameters
        ----------
        parameters : nest of ndarray
            Dict, list, tuple or namedtuple with array leaves, or one bare array. Copied.

        Returns
        -------
        Snapshot
            The parameters that the broker has now.

        Raises
        ------
        LayoutError
            If `parameters` cannot be laid out.
        ControlError
            If one gradient does not fit in the broker's queue, or the key's role does not allow it.
        BrokerUnreachable
            If the broker does not answer in time.
        """
        self._connection.check()
        layout = offer(self._connection.puller, parameters)
        snapshot = self.pull()
        if snapshot.layout.fingerprint != layout.fingerprint:
            return snapshot
        # A nest comes over the wire without its namedtuple classes; this process knows them.
        self._puller.like = (layout.fingerprint, skeleton(parameters))
        return snapshot.shaped_like(self._puller.like[1])

    def pull(
        self,
        newer_than: Snapshot | State | int | None = None,
        timeout: float | None = None,
        out: Snapshot | None = None,
        *,
        own: bool = False,
        copy: bool = True,
    ) -> Snapshot:
        """Fetch the parameters.

        Parameters
        ----------
        newer_than : Snapshot, State or int, optional
            Wait until the parameters are newer than this (replaced ones are). Without it they come as soon as the
            broker's policy allows: at once under ``async``, when this worker's step is done under ``sync``.
        timeout : float, optional
            How long to wait, seconds; None waits as long as the broker answers.
        out : Snapshot, optional
            An earlier result whose memory is reused if the layout is the same; its arrays change.
        own : bool
            Wait until all that this worker has pushed was decided on: what was applied of it is in the parameters.
        copy : bool
            Whether to give arrays of the caller's own. Without, on the broker's host, they may be the broker's:
            read-only, and valid until this worker's next push or pull. `push` raises `SnapshotRevoked` if the broker
            had to take them back before that. Elsewhere up to 4 MiB of a dtype stay where they were received (and so
            they do without `out`): they are the caller's own.

        Returns
        -------
        Snapshot
            A consistent version.

        Raises
        ------
        NoParameters
            If none were set yet; see `initialize`.
        TimeoutError
            If nothing (newer) came in time, or (as `BrokerUnreachable`) the broker does not answer.
        GradientRefused
            If a gradient pushed earlier was refused; nothing was pulled.
        BrokerRestarted
            Once, if the broker was restarted and lost what it had.
        SnapshotRevoked
            If reading is too slow for the rate of updates.
        """
        self._connection.check()
        return self._puller.pull(newer_than, timeout, out, copies=copy, own=own)

    def push(
        self,
        gradients: Any,
        *,
        loss: float | None = None,
        examples: int = 1,
        cursor: bytes | str | None = None,
        base_version: Snapshot | State | int | None = None,
        copy: bool = True,
    ) -> int:
        """Queue a gradient for the broker; waits while there is no grant for it.

        Parameters
        ----------
        gradients : nest of ndarray
            One array for each trained leaf, found by its path; copied, cast to the parameter's dtype (``same_kind``).
        loss : float, optional
            For display.
        examples : int
            Training examples behind it, at least 0.
        cursor : bytes or str, optional
            Where this worker stands in its data after this gradient; told to whoever comes back under this id. At
            most 4 KiB.
        base_version : Snapshot, State or int, optional
            What it was computed on; by default the last pull's.
        copy : bool
            Whether to copy the gradient. Without, contiguous arrays of 256 KiB or more that have the parameter's dtype
            are sent from where they are, and must not change until the gradient is settled; anything else is copied all
            the same, and so is everything where memory is shared (see `slot`).

        Returns
        -------
        int
            The gradient's number. It is queued, not applied: see `flush`.

        Raises
        ------
        LayoutError
            If it does not fit the parameters; nothing was queued.
        NoParameters
            If the broker has no parameters yet.
        GradientRefused
            If a gradient pushed earlier was refused (this one was not queued), or if this one can never fit.
        ConfigError
            If an argument is impossible.
        BrokerUnreachable
            If a grant was waited for and the broker does not answer in time.
        BrokerRestarted
            Once, if the broker was restarted and lost what it had; this gradient was not queued.
        SnapshotRevoked
            If it was computed on the broker's memory (``pull(copy=False)``), which was taken back; it was not queued.
        """
        return self._push(gradients, (loss, examples, cursor), base_version, copy, None)

    def push_pull(
        self,
        gradients: Any,
        out: Snapshot | None = None,
        *,
        copy: bool = True,
        loss: float | None = None,
        examples: int = 1,
        cursor: bytes | str | None = None,
        base_version: Snapshot | State | int | None = None,
    ) -> Snapshot:
        """Push a gradient, and pull parameters that it is in; one round trip.

        Parameters
        ----------
        gradients : nest of ndarray
            As for `push`.
        out : Snapshot, optional
            As for `pull`.
        copy : bool
            As for `pull`. Without, the gradient is not copied either, as by `push`: when the call returns, its arrays
            may be used again; if it raises, not before `flush` has returned.
        loss, examples, cursor, base_version : object
            As for `push`.

        Returns
        -------
        Snapshot
            A consistent version. If the gradient was refused, the next call raises that.
        """
        number = 0
        # What comes back may not be on the disk yet of a broker that settles what is there.
        copies = copy or self._connection.session.window.keeps_all

        def push(asks: int | None) -> int:
            nonlocal number
            number = self._push(gradients, (loss, examples, cursor), base_version, copies, asks)
            return number

        snapshot = self._puller.pull(None, None, out, copies=copy, own=True, push=push)
        if not copies:
            self._pusher.reclaim(number, snapshot.state.incarnation)
        return snapshot

    def _push(self, gradients: Any, details: tuple[Any, Any, Any], base: Any, copies: bool, asks: int | None) -> int:
        self._connection.check()
        layout = self._pusher.layout()
        checked = checked_details(*details)
        return self._pusher.push(layout, gradients, checked, self._puller.base_of(base), copies=copies, asks=asks)

    def slot(self) -> Slot:
        """Give memory to compute the next gradient into; it is pushed at the end of the with-block.

        On the broker's host it is shared with it: nothing is copied or sent. Elsewhere it saves `push` its copy.

        Returns
        -------
        Slot
            A context manager. Its block gets a nest with an array for each trained leaf, all of which must be written;
            an exception within it pushes nothing. Errors are those of `push`.
        """
        self._connection.check()
        return Slot(self._pusher, self._puller)

    def status(self) -> dict[str, Any]:
        """Ask what the broker is doing.

        Returns
        -------
        dict
            As `distgrad.Admin.status`: ``version``, ``optimizer``, ``policy``, ``workers`` and more.

        Raises
        ------
        BrokerUnreachable
            If the broker does not answer in time.
        """
        self._connection.check()
        return dict(self._connection.puller.request("status").header["status"])

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything pushed so far is settled.

        Settled means: decided, visible to `pull` if it was applied, and as durable as the broker was told to be.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits as long as the broker answers.

        Raises
        ------
        TimeoutError
            If something is unsettled after `timeout`, or (as `BrokerUnreachable`) the broker does not answer.
        GradientRefused
            If a gradient was refused; everything is settled nevertheless.
        BrokerRestarted
            Once, if the broker was restarted and lost what it had.
        """
        self._connection.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Flush, say goodbye, and close the connection. Idempotent.

        Parameters
        ----------
        timeout : float, optional
            For the flush, seconds; None waits as long as the broker answers.

        Raises
        ------
        TimeoutError
            If something is unsettled after `timeout`; the connection is closed all the same.
        GradientRefused
            If a gradient was refused; the connection is closed all the same.
        """
        try:
            self._connection.close(timeout)
        finally:
            self._finalizer.detach()
            self._pusher.close()
            self._puller.close()
