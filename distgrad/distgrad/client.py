"""One client of the control channel: requests go out, their replies come back, whatever happens in between.

A request is sent again, with the same client nonce and id, until it is answered or the time is over; the broker
answers a repeat of a mutating request from memory, so nothing is done twice (``docs/wire.md``). Each try has a
socket of its own: a connection that died without notice (a router that forgot it, a host that changed its address)
would swallow every repeat, and a reply to a former try can never be taken for the present one.

Several requests may be under way, so that a link need not idle between large replies. Each try then sends all of them
that are not answered, and a reply is a request's by its id.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distgrad import addresses, sockets, wire
from distgrad.errors import BrokerRestarted, BrokerUnreachable, Forked, MalformedMessage, StateError, from_code
from distgrad.link_history import LinkHistory
from distgrad.link_pace import LinkPace
from distgrad.requests_sent import Pending, Reply
from distgrad.two_ways import TwoWays

# A reply takes a round trip, so half a second without one means a lost connection or a busy broker; repeats slow
# down to one in five seconds, which a broker with a thousand waiting clients still shrugs off.
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 5.0
# Ctrl-C interrupts a poll by itself unless the signal lands on another thread; then the end of a slice notices it.
_SLICE_S = 0.25


class ControlClient:
    """Ask one broker, over one socket.

    Threads of one process may share a client: a lock lets one exchange, or one conversation, at a time through.

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
    last_pull : object
        What the broker knows of this client's last pull, and by which connection it came; `distgrad.transfer`'s.
    ways : TwoWays
        Where replies come in.
    lock : threading.RLock
        Held in a `conversation`.
    """

    def __init__(
        self,
        address: str,
        keys: str | os.PathLike[str] | sockets.PeerKeys | None = None,
        timeout: float = 30.0,
        *,
        context: sockets.Context | None = None,
    ) -> None:
        self.address = addresses.parse(address, addresses.CONTROL_PORT)
        self.timeout = timeout
        self.incarnation: str | None = None
        self.last_pull: Any = None
        self._keys = sockets.client_keys(keys)
        self._nonce = os.urandom(16)
        self._last_id = 0
        self._pace = LinkPace()
        self.lock = threading.RLock()
        self._closed, self._pid = False, os.getpid()
        self._owns_context = context is None
        self._context = sockets.open_context() if context is None else context
        self._socket: sockets.OwnedSocket | None = None
        self.ways = TwoWays()
        self._links = LinkHistory()
        self._unanswered: dict[int, Pending] = {}  # by rising id
        self._answered_at = 0.0

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
        with self.lock:
            self.adopt()
            self._drop_socket()
            self.ways = TwoWays()
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
            Every `send` in the block has its `receive` there; what an exception leaves unanswered is given up.

        Raises
        ------
        StateError
            If the client is closed.
        Forked
            If it was made by another process.
        """
        self.check_alive()
        with self.lock:
            self.adopt()
            try:
                yield
            except BaseException:
                self.give_up()
                raise

    def adopt(self) -> None:
        """Make the socket this thread's, which has just taken `lock`: that has ordered it behind the last one's."""
        if self._socket is not None:
            self._socket.adopt()

    def give_up(self) -> None:
        """Wait for no request of this conversation any more; nothing is done if none is under way."""
        if self._unanswered:
            self._unanswered.clear()
            self._drop_socket()

    def send(
        self,
        op: str,
        *,
        frames: Sequence[Any] = (),
        mutating: bool = False,
        timeout: float | None = None,
        reply_bytes: int = 0,
        reserved: int | None = None,
        **keys: Any,
    ) -> Pending:
        """Send a request within a `conversation`, without waiting; parameters and errors are those of `request`.

        Parameters
        ----------
        op, frames, mutating, timeout, reply_bytes
            See `request`.
        reserved : int, optional
            From `reserve`: something else has asked for the reply, and this is sent if none comes.
        **keys : object
            See `request`.

        Returns
        -------
        Pending
            For `receive`. Others may be sent before it, unless one of them is mutating.
        """
        self.check_alive()
        if mutating:
            # The broker remembers its last reply to a mutating request, so a repeat can only be of the last one.
            assert not self._unanswered
            if self.incarnation is None:
                self.receive(self.send("status", timeout=timeout))
            keys["incarnation"] = self.incarnation
        number = self.reserve() if reserved is None else reserved
        header = {"v": wire.PROTOCOL_VERSION, "op": op, "client": self._nonce, "id": number, **keys}
        timeout_s, wait_s = self.timeout if timeout is None else timeout, float(keys.get("wait_s") or 0.0)
        transfer_bytes = reply_bytes + sum(memoryview(frame).nbytes for frame in frames)
        patience_s = timeout_s + wait_s + transfer_bytes / self._pace.bytes_per_s
        now = time.monotonic()
        pending = Pending(op, number, header, frames, timeout_s, wait_s, transfer_bytes, patience_s, now, FIRST_RETRY_S)
        self._unanswered[number] = pending
        if reserved is None:
            self._transmit(pending)
        else:
            self._note_sent(pending)
        return pending

    def reserve(self) -> int:
        """Give the number of a request that something else asks for, by the present connection.

        Returns
        -------
        int
            For `send`, in the same conversation, if that has succeeded.
        """
        self._last_id += 1
        return self._last_id

    @property
    def connection(self) -> int:
        """Number of the present connection, as last looked at; whoever knows the way back on it knows it by this."""
        if not self.ways.has_answered:  # else it is not the way back
            self._links.note()
        return self._links.number

    def receive(self, pending: Pending) -> Reply:
        """Wait for the reply to a request that `send` sent, repeating what is unanswered as needed.

        Parameters
        ----------
        pending : Pending
            What `send` returned; each is received once.

        Returns
        -------
        Reply
            The broker's answer; errors are those of `request`.
        """
        while pending.reply is None or self._is_put_off(pending):
            # While replies to other requests come, one after the other, this one's was not waited for in vain.
            deadline = max(pending.asked_at, self._answered_at) + pending.patience_s
            before = sum(other.transfer_bytes for other in self._unanswered.values() if other.id <= pending.id)
            retry_s = pending.retry_s + (0.0 if pending.is_reserved else pending.wait_s)
            retry_at = max(pending.sent_at, self._answered_at) + retry_s + before / self._pace.bytes_per_s
            if self._poll(min(retry_at, deadline)):
                self._read()
                continue
            self._links.note()
            if time.monotonic() >= deadline:
                raise self._unreachable(pending)
            if pending.is_reserved:
                # What was to ask for it is late, or was lost: that is not the connection's fault.
                self._transmit(pending)
                continue
            # A connection that broke says nothing about the pace of broker and link.
            if not self._links.was_cut:
                pending.retry_s = min(2 * pending.retry_s, LAST_RETRY_S)
                self._pace.miss(pending.transfer_bytes)
            self._drop_socket()
            self._transmit(*self._unanswered.values())
        reply, pending.reply = pending.reply, None
        if not reply.header.get("ok"):
            raise self._error(reply.header)
        return reply

    def _is_put_off(self, pending: Pending) -> bool:
        """Ask again for what was done and only waits for the broker's disk, as long as there is time."""
        is_late = time.monotonic() >= pending.asked_at + pending.patience_s
        if pending.reply is None or is_late or pending.reply.header.get("error") != "pending":
            return False
        pending.reply, self._unanswered[pending.id] = None, pending
        self._transmit(pending)
        return True

    def check_alive(self) -> None:
        """Raise if nothing can be asked; before `lock` is taken, which in a forked child might be for ever.

        Raises
        ------
        StateError
            If the client is closed.
        Forked
            If it was made by another process.
        """
        if os.getpid() != self._pid:
            raise Forked("this connection belongs to the parent process; make a new one after fork")
        if self._closed:
            raise StateError(f"the connection to {self.address.endpoint} is closed")

    def _transmit(self, *requests: Pending) -> None:
        if self._socket is None:
            self._socket = sockets.pipelined_control_client(self._context, self.address.endpoint, keys=self._keys)
            self._links.follow(sockets.monitor(self._socket))
        self._links.note()
        if len(requests) == len(self._unanswered):
            # What happened to the connection while nothing was under way is no reason to repeat what is sent now.
            self._links.was_cut = False
        for pending in requests:
            pending.is_reserved = False
            self._socket.send_multipart(pending.message)
            self._note_sent(pending)

    def _note_sent(self, pending: Pending) -> None:
        pending.sent_at = time.monotonic()
        pending.received_before = self._pace.received_bytes

    def _poll(self, until: float) -> bool:
        while True:
            self.check_alive()
            remaining = until - time.monotonic()
            timeout_ms = math.ceil(1000 * max(0.0, min(remaining, _SLICE_S)))
            if self._socket is not None and self.ways.poll(self._socket, timeout_ms):
                return True
            # What was under way on a connection that broke is gone: no use to wait for it.
            self._links.note()
            # Not "was this the last slice": ZeroMQ's clock counts whole milliseconds, and it may return one too early.
            if remaining <= 0 or self._links.was_cut:
                return False

    def _read(self) -> None:
        assert self._socket is not None  # something was just polled
        frames = self.ways.receive(self._socket)
        if self.ways.has_lost:
            self.ways.has_lost = False
            self._transmit(*self._unanswered.values())
        if not frames:
            return
        try:
            header = wire.unpack(frames[0])
        except MalformedMessage as error:
            raise MalformedMessage(f"{self.address.endpoint} does not answer as a broker: {error}") from error
        key = header.get("id")
        if key is None and not header.get("ok"):
            # A broker that could not read a request does not know its id either.
            key = next(iter(self._unanswered), None)
        pending = self._unanswered.pop(key, None) if type(key) is int else None
        if pending is None:
            return
        if isinstance(incarnation := header.get("incarnation"), str):
            self.incarnation = incarnation
        pending.reply = Reply(header, list(frames[1:]))
        self._answered_at = time.monotonic()
        received = sum(part.nbytes for part in pending.reply.frames)
        self._pace.note(received, pending.received_before, self._answered_at - pending.sent_at)

    def _error(self, header: Mapping[str, Any]) -> Exception:
        error = from_code(str(header.get("error")), str(header.get("message")))
        if isinstance(error, BrokerRestarted) and "incarnation" not in header:
            self.incarnation = None
        return error

    def _unreachable(self, pending: Pending) -> BrokerUnreachable:
        cause, hint = self._links.explain(has_keys=self._keys is not None)
        limit = f"to {pending.op!r} within {pending.timeout_s:g} s"
        return BrokerUnreachable(f"no answer from {self.address.endpoint} {limit}: {cause}", hint=hint)

    def _drop_socket(self) -> None:
        socket, self._socket = self._socket, None
        self._links.follow(None)
        if socket is not None:
            socket.close()
