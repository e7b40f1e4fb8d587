"""One client of the control channel: a request goes out, its reply comes back, whatever happens in between.

A request is sent again, with the same client nonce and id, until it is answered or the time is over; the broker
answers a repeat of a mutating request from memory, so nothing is done twice (``docs/wire.md``). Each try has a
socket of its own: a connection that died without notice (a router that forgot it, a host that changed its address)
would swallow every repeat, and a reply to a former try can never be taken for the present one.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from distgrad import addresses, sockets, wire
from distgrad.errors import BrokerRestarted, BrokerUnreachable, Forked, MalformedMessage, StateError, from_code
from distgrad.keys import ClientKeys

# A reply takes a round trip, so half a second without one means a lost connection or a busy broker; repeats slow
# down to one in five seconds, which a broker with a thousand waiting clients still shrugs off.
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 5.0
# A repeat that overtakes a slow transfer doubles the load of the slow link. So repeats wait as long as the bytes
# take at this pace, which then follows what was measured on this link: half of it, and no slower than the floor.
PACE_BYTES_PER_S = 10e6
_SLOWEST_BYTES_PER_S = 64 * 1024.0
_LARGE_BYTES = 1024 * 1024
# Ctrl-C interrupts a poll by itself unless the signal lands on another thread; then the end of a slice notices it.
_SLICE_S = 0.25

# What the last change of the connection says about silence; the sentence goes into the error, then a hint.
_SILENT = ("the broker is silent", "is it stopped, overloaded, or is something else listening there?")
_CAUSES: dict[sockets.Link | None, tuple[str, str]] = {
    None: ("no connection came about", "is the host right, and does a firewall drop packets to the port?"),
    sockets.Link.ABSENT: ("nobody listens there", "is the broker running, and is this its control address?"),
    sockets.Link.LOST: ("the connection was lost", "is the broker still running?"),
    sockets.Link.REFUSED: ("the broker does not accept the key", "was it made for this broker, or revoked?"),
    sockets.Link.NO_KEYS: ("one side has keys and the other has none: {}", "keys are given as keys= or --keys FILE"),
    sockets.Link.UNFINISHED: (
        "the handshake was not finished",
        "is it a broker's control address, and do both sides have keys, this broker's, or neither?",
    ),
}
_DEFINITE = frozenset({sockets.Link.REFUSED, sockets.Link.NO_KEYS})


class Reply(NamedTuple):
    """A successful reply.

    Attributes
    ----------
    header : dict
        Its header; values are not checked beyond ``v``, ``id`` and ``ok``.
    frames : list of memoryview
        Its raw frames, still in the memory that ZeroMQ received them into.
    """

    header: dict[str, Any]
    frames: list[memoryview]

    @property
    def state(self) -> wire.State:
        """Name of the parameters' state when the reply was written."""
        return wire.parse_state([self.header.get(key) for key in wire.State._fields])


@dataclass(slots=True, eq=False)
class Pending:
    """A request that was sent and is not answered yet; made by `ControlClient.send`, and to be given back as it is."""

    op: str
    id: int
    message: list[Any]
    timeout_s: float
    wait_s: float
    transfer_bytes: int
    retry_s: float = FIRST_RETRY_S
    sent_at: float = 0.0
    deadline: float = 0.0


class ControlClient:
    """Ask one broker, over one socket, one request at a time.

    Threads of one process may share a client: a lock lets one exchange at a time through.

    Parameters
    ----------
    address : str
        Where the broker's control channel listens: ``host``, ``host:port``, ``[v6]:port`` or ``tcp://…``.
    keys : path or ClientKeys, optional
        This client's secret key and the broker's public one.
    timeout : float, seconds
        How long a request may stay without an answer. Waits that a request asks for, and the time that its bytes
        take, are added.
    context : zmq.Context, optional
        Where to make the socket. By default the client makes a context and ends it on `close`.

    Attributes
    ----------
    incarnation : str or None
        The broker's incarnation as the last reply told it.
    """

    def __init__(
        self,
        address: str,
        keys: str | os.PathLike[str] | ClientKeys | None = None,
        timeout: float = 30.0,
        *,
        context: sockets.Context | None = None,
    ) -> None:
        self.address = addresses.parse(address, addresses.CONTROL_PORT)
        self.timeout = timeout
        self.incarnation: str | None = None
        self._keys = ClientKeys.of(keys)
        self._nonce = os.urandom(16)
        self._last_id = 0
        self._pace = PACE_BYTES_PER_S
        self._lock = threading.RLock()
        self._closed = False
        self._pid = os.getpid()
        self._owns_context = context is None
        self._context = sockets.open_context() if context is None else context
        self._socket: sockets.OwnedSocket | None = None
        self._links: sockets.LinkMonitor | None = None
        self._link: sockets.Link | None = None
        self._was_up = self._was_cut = False
        self._is_asking = False

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket, at once; a request that waits in another thread ends with an error. Idempotent."""
        self._closed = True
        # A child of fork shares descriptors with its parent: touching them here would close the parent's connection.
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._socket is not None:
                self._socket.adopt()
            self._drop_socket()
            if self._owns_context and not self._context.closed:
                self._context.term()

    def request(
        self,
        op: str,
        *,
        frames: Sequence[Any] = (),
        mutating: bool = False,
        timeout: float | None = None,
        reply_bytes: int = 0,
        **keys: Any,
    ) -> Reply:
        """Send one request and wait for its reply.

        Parameters
        ----------
        op : str
            The operation (``docs/wire.md``).
        frames : sequence of buffers
            Raw frames behind the header; they must not change before the call returns.
        mutating : bool
            The operation changes something: it then names the incarnation that it means.
        timeout : float, optional
            Instead of the client's.
        reply_bytes : int
            Size of the reply that is expected, which only makes the client more patient.
        **keys : object
            The operation's own keys. A ``wait_s`` makes the client more patient by as much.

        Returns
        -------
        Reply
            The broker's answer.

        Raises
        ------
        BrokerUnreachable
            If no answer came in time.
        BrokerRestarted
            If a mutating request meant another incarnation. Nothing was done; a second call means the new one.
        DistgradError
            The error that the broker answered with, by `errors.from_code`.
        MalformedMessage
            If what answers does not speak this protocol.
        StateError
            If the client is closed.
        Forked
            If it was made by another process.
        """
        with self.conversation():
            pending = self.send(op, frames=frames, mutating=mutating, timeout=timeout, reply_bytes=reply_bytes, **keys)
            return self.receive(pending)

    @contextmanager
    def conversation(self) -> Iterator[None]:
        """Keep other threads out for several `send` and `receive` in a row.

        Yields
        ------
        None
            What is unanswered when an exception leaves the block is given up.

        Raises
        ------
        StateError
            If the client is closed.
        Forked
            If it was made by another process.
        """
        # Before the lock is asked for: in a forked child another thread's hold on it would last for ever.
        self._check_alive()
        with self._lock:
            if self._socket is not None:
                # The lock has ordered this thread behind the last one that used the socket.
                self._socket.adopt()
            try:
                yield
            except BaseException:
                if self._is_asking:
                    self._drop_socket()
                raise

    def send(
        self,
        op: str,
        *,
        frames: Sequence[Any] = (),
        mutating: bool = False,
        timeout: float | None = None,
        reply_bytes: int = 0,
        **keys: Any,
    ) -> Pending:
        """Send a request within a `conversation`, without waiting; parameters and errors are those of `request`.

        Parameters
        ----------
        op, frames, mutating, timeout, reply_bytes, **keys
            See `request`.

        Returns
        -------
        Pending
            For `receive`, which must come before the next `send`.
        """
        self._check_alive()
        if mutating:
            if self.incarnation is None:
                self.receive(self.send("status", timeout=timeout))
            keys["incarnation"] = self.incarnation
        self._last_id += 1
        header = {"v": wire.PROTOCOL_VERSION, "op": op, "client": self._nonce, "id": self._last_id, **keys}
        pending = Pending(
            op,
            self._last_id,
            [wire.pack(header), *frames],
            timeout_s=self.timeout if timeout is None else timeout,
            wait_s=float(keys.get("wait_s") or 0.0),
            transfer_bytes=reply_bytes + sum(memoryview(frame).nbytes for frame in frames),
        )
        pending.deadline = time.monotonic() + pending.timeout_s + pending.wait_s + self._transfer_s(pending)
        self._transmit(pending)
        return pending

    def receive(self, pending: Pending) -> Reply:
        """Wait for the reply to a request that `send` sent, repeating the request as needed.

        Parameters
        ----------
        pending : Pending
            What `send` returned.

        Returns
        -------
        Reply
            The broker's answer; errors are those of `request`.
        """
        while True:
            retry_at = pending.sent_at + pending.retry_s + pending.wait_s + self._transfer_s(pending)
            if self._poll(min(retry_at, pending.deadline)):
                reply = self._read(pending)
                if reply is not None:
                    return reply
                continue
            self._note_links()
            if time.monotonic() >= pending.deadline:
                raise self._unreachable(pending)
            # A connection that broke says nothing about the pace of broker and link.
            if not self._was_cut:
                pending.retry_s = min(2 * pending.retry_s, LAST_RETRY_S)
                if pending.transfer_bytes >= _LARGE_BYTES:
                    self._pace = max(self._pace / 2, _SLOWEST_BYTES_PER_S)
            self._drop_socket()
            self._transmit(pending)

    def _check_alive(self) -> None:
        if os.getpid() != self._pid:
            raise Forked("this connection belongs to the parent process; make a new one after fork")
        if self._closed:
            raise StateError(f"the connection to {self.address.endpoint} is closed")

    def _transfer_s(self, pending: Pending) -> float:
        return pending.transfer_bytes / self._pace

    def _transmit(self, pending: Pending) -> None:
        if self._socket is None:
            self._socket = sockets.control_client(self._context, self.address.endpoint, keys=self._keys)
            self._links = sockets.monitor(self._socket)
            self._was_up = False
        # What happened to the connection between two requests is no reason to repeat the second one.
        self._note_links()
        self._was_cut = False
        self._is_asking = True
        self._socket.send_multipart(pending.message)
        pending.sent_at = time.monotonic()

    def _poll(self, until: float) -> bool:
        while True:
            self._check_alive()
            remaining = until - time.monotonic()
            if self._socket is not None and self._socket.poll(math.ceil(1000 * max(0.0, min(remaining, _SLICE_S)))):
                return True
            # What was under way on a connection that broke is gone: no use to wait for it.
            self._note_links()
            if remaining <= _SLICE_S or self._was_cut:
                return False

    def _read(self, pending: Pending) -> Reply | None:
        frames = self._socket.recv_multipart() if self._socket is not None else []
        if not frames:
            return None
        try:
            header = wire.unpack(frames[0].buffer)
        except MalformedMessage as error:
            raise MalformedMessage(f"{self.address.endpoint} does not answer as a broker: {error}") from error
        # A broker that could not read a request does not know its id either.
        if header.get("id") != pending.id and (header.get("ok") or header.get("id") is not None):
            return None
        self._is_asking = False
        self._learn(header)
        if not header.get("ok"):
            raise self._error(header)
        parts = [frame.buffer for frame in frames[1:]]
        received = sum(part.nbytes for part in parts)
        if received >= _LARGE_BYTES:
            measured = received / max(time.monotonic() - pending.sent_at, 1e-6)
            self._pace = min(max(measured / 2, _SLOWEST_BYTES_PER_S), PACE_BYTES_PER_S)
        return Reply(header, parts)

    def _learn(self, header: Mapping[str, Any]) -> None:
        incarnation = header.get("incarnation")
        if isinstance(incarnation, str):
            self.incarnation = incarnation

    def _error(self, header: Mapping[str, Any]) -> Exception:
        error = from_code(str(header.get("error")), str(header.get("message")))
        if isinstance(error, BrokerRestarted) and "incarnation" not in header:
            self.incarnation = None
        return error

    def _unreachable(self, pending: Pending) -> BrokerUnreachable:
        cause, hint = _CAUSES.get(self._link, _SILENT)
        if self._link is sockets.Link.NO_KEYS:
            cause = cause.format("this client has none" if self._keys is None else "only this client has them")
        return BrokerUnreachable(
            f"no answer from {self.address.endpoint} to {pending.op!r} within {pending.timeout_s:g} s: {cause}",
            hint=hint,
        )

    def _note_links(self) -> None:
        if self._links is not None:
            for link in self._links.drain():
                if link is sockets.Link.UP:
                    self._was_up = True
                elif link is sockets.Link.LOST and self._was_up:
                    self._was_cut = True
                elif link is sockets.Link.LOST:
                    # Lost before it was up. If a definite cause was told, on this try or a former one, it stays.
                    link = self._link if self._link in _DEFINITE else sockets.Link.UNFINISHED
                self._link = link

    def _drop_socket(self) -> None:
        socket, self._socket, self._links = self._socket, None, None
        self._is_asking = False
        if socket is not None:
            socket.close()
