"""The worker's own thread: it keeps the lease, hears what is settled, and mends the connection.

It owns the REQ socket of the lease and both monitors, and it opens and closes the PUSH socket. Sending on PUSH is
done by whichever thread pushes, under the lock that guards the session: ZeroMQ lets a socket change threads across
a full fence, and the lock is one (``docs/decisions/0002``).
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import threading
import time
from typing import Any

import zmq

from distgrad import addresses, sockets, wire
from distgrad.errors import MalformedMessage, from_code
from distgrad.lanes import Lane
from distgrad.owned_sockets import Link, LinkMonitor, OwnedSocket
from distgrad_worker import asking
from distgrad_worker.bundles import Pace
from distgrad_worker.sending import Sender
from distgrad_worker.session import GREETING, Session

# A reply is due after 50 ms at the latest; a busy broker takes longer, and repeats are harmless.
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 5.0
# With nothing on the way, a sign of life this often, or four in the length of a lease.
IDLE_S = 1.0
# How long ZeroMQ may take to end.
_ENDING_S = 1.0
# Who has ended asks nothing; the pipe wakes it to be closed.
_ENDED_S = 60.0
# What waits for others of its kind is sent after this long, or twice this at most.
TAIL_S = 0.02
# ZeroMQ does not try again after a refused handshake; a revoked or late key may be let in later.
REFUSED_RETRY_S = 1.0
# A request whose connection broke is asked again at once, or nearly: a peer that hangs up on everybody must not
# make us spin.
LOST_RETRY_S = 0.02

_BROKEN = frozenset({Link.LOST, Link.REFUSED, Link.NO_KEYS})


class Asked:
    """The request that waits for its reply.

    Parameters
    ----------
    request_id : int
        Its id.
    is_hello : bool
        Whether it is a `hello`; else it is a `heartbeat`.
    hurry : int
        The number whose settling it waits for, 0 if none.
    sent_at : float
        When, in seconds on this process's clock.
    """

    __slots__ = ("hurry", "is_hello", "request_id", "sent_at")

    def __init__(self, request_id: int, is_hello: bool, hurry: int, sent_at: float) -> None:
        self.request_id = request_id
        self.is_hello = is_hello
        self.hurry = hurry
        self.sent_at = sent_at


class Driver:
    """One worker's connection to its broker.

    Parameters
    ----------
    session : Session
        Guarded by `lock`.
    changed : threading.Condition
        Notified whenever the session has changed.
    lock : threading.RLock
        Its lock.
    address : Address
        The broker's control channel.
    keys : ClientKeys or None
        For CURVE.
    gradients : str or None
        Where to send gradients, if not where the broker says.
    context : zmq.Context or None
        Where to make the sockets, which stays the caller's; None makes one.
    host : str or None
        This host's name, if memory is to be shared with a broker on it.

    Attributes
    ----------
    sender : Sender
        On its way gradients leave; used under `lock`.
    """

    def __init__(
        self,
        session: Session,
        changed: threading.Condition,
        lock: threading.RLock,
        address: addresses.Address,
        keys: Any,
        gradients: str | None,
        context: sockets.Context | None = None,
        host: str | None = None,
    ) -> None:
        self._session = session
        self._changed = changed
        self._lock = lock
        self._address = address
        self._keys = keys
        self._owns_context = context is None
        self.context = sockets.open_context() if context is None else context
        self.last_answer = time.monotonic()
        self.failure: BaseException | None = None
        self.link: Link | None = None
        self._was_up = False
        self.sender = Sender(self.context, address, keys, gradients, host)
        self._request: OwnedSocket | None = None
        self._request_links: LinkMonitor | None = None
        self._asked: Asked | None = None
        self._pace = Pace()
        self._retry_s = FIRST_RETRY_S
        self._requests_sent = 0
        self._next_beat = 0.0
        self._look_at = math.inf
        self._is_ending = False
        self._leaves = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._is_awake = False
        self._thread = threading.Thread(target=self._run, name="distgrad-lease", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def send_pushed(self, payload_bytes: int, *, may_wait: bool = True) -> None:
        """Send what was just pushed, or let it wait for more of its kind; the caller holds the lock.

        The thread will ask what became of it, when it is time.

        Parameters
        ----------
        payload_bytes : int
            Bytes of its payload.
        may_wait : bool
            Whether it may wait at all.
        """
        now = time.monotonic()
        patience_s = TAIL_S
        if not self._pace.may_wait(self._session.window, payload_bytes, now) or not may_wait:
            # Asking costs each side a thread's wake-up, beside a push that wants the same processor.
            patience_s = self._session.ask_s
            self.send_due()
        if self._asked is not None:
            return
        if self._look_at > now + 2 * patience_s:
            self._look_at = now + patience_s
            self.wake()
        elif self._session.is_urgent:
            self.wake()

    def send_due(self) -> None:
        """Send what the session has to send; the caller holds the lock."""
        session = self._session
        if not self.sender.is_open:
            return
        try:
            self.sender.send(session, session.sendable(time.monotonic()))
        except (zmq.Again, ConnectionResetError):
            # A connection that was refused for good takes nothing; a new attempt makes a new one.
            session.connection_lost()
            self.wake()
        except BaseException:
            # Ctrl-C between two frames of a message: what follows on this socket would be taken for its rest.
            session.connection_lost()
            self.wake()
            raise

    def lane_ended(self, lane: Lane) -> None:
        """Take note that a lane has ended, and with it perhaps what was sent on it.

        Parameters
        ----------
        lane : Lane
            The present one, or one that was closed here for another.
        """
        with self._lock:
            if self.sender.lane is lane:
                # Before it is forgotten: after a Ctrl-C in between nobody would find out.
                self._session.connection_lost()
                self.sender.lose_lane(lane)
                self.wake()

    def wake(self) -> None:
        """Have the thread look at the session now, if it is not going to anyway; the caller holds the lock."""
        if not self._is_awake:
            self._is_awake = True
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_write, b"x")

    def ask_now(self) -> None:
        """Have the thread ask at once, by a new connection if it waits for a reply; the caller holds the lock."""
        if self._asked is None:
            self._next_beat = 0.0
        else:
            self._asked.sent_at = -math.inf
        self.wake()

    def close(self, *, leaves: bool, timeout_s: float) -> None:
        """End the thread and close the sockets.

        Parameters
        ----------
        leaves : bool
            Say goodbye to the broker: nothing is unsettled.
        timeout_s : float
            How long the goodbye may take, seconds.
        """
        with self._lock:
            self._leaves = leaves
            self._leave_by = time.monotonic() + timeout_s
            self._is_ending = True
            self._is_awake = False
            self.wake()
        self._thread.join()
        with self._lock:
            self._is_awake = True  # nobody writes to the pipe any more
        os.close(self._wake_read)
        os.close(self._wake_write)
        if not self._owns_context:
            return
        # Ctrl-C may have kept a socket from being closed, for which the context would wait for ever.
        ending = threading.Thread(target=self.context.destroy, args=(0,), daemon=True)
        ending.start()
        ending.join(_ENDING_S)
        if ending.is_alive():
            gc.collect()
            ending.join(_ENDING_S)

    def _run(self) -> None:
        try:
            self._open_request()
            while not self._is_ending:
                self._turn()
            if self._leaves:
                self._say_goodbye()
        # The one place that catches everything: whoever uses the worker is told instead of waiting for ever.
        except BaseException as error:
            with self._lock:
                self.failure = error
                self._changed.notify_all()
        finally:
            with self._lock:
                self.sender.close()
            if self._request is not None:
                self._request.close()

    def _turn(self) -> None:
        now = time.monotonic()
        with self._lock:
            session = self._session
            if session.must_reopen:
                self.sender.open(session)
                session.reopened()
                self.send_due()
            if session.ended is None:
                self._ask_if_due(now)
            timeout_s = self._timeout_s(now)
            self._is_awake = False
            # Only this thread opens and closes these, so they stay valid outside the lock.
            push_links, request, request_links = self.sender.links, self._request, self._request_links
        # Opened before the first turn.
        assert request is not None
        assert request_links is not None
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        poller.register(request.raw(), zmq.POLLIN)
        poller.register(request_links.raw(), zmq.POLLIN)
        if push_links is not None:
            poller.register(push_links.raw(), zmq.POLLIN)
        ready = dict(poller.poll(math.ceil(timeout_s * 1000)))
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 64)
        if push_links is not None and push_links.raw() in ready and _BROKEN.intersection(push_links.drain()):
            with self._lock:
                self._session.connection_lost()
        if request.raw() in ready:
            self._receive(request)
        elif request_links.raw() in ready:
            for link in request_links.drain():
                self._note(link)
            if self.link in _BROKEN and self._asked is not None:
                pause_s = LOST_RETRY_S if self.link is Link.LOST else REFUSED_RETRY_S
                self._asked.sent_at = time.monotonic() + pause_s - self._retry_s

    def _note(self, link: Link) -> None:
        """Remember what became of the request socket's connection, for whoever must be told why nobody answers."""
        if link is Link.UP:
            self._was_up = True
        elif link is Link.UNFINISHED or (link is Link.LOST and not self._was_up):
            # Ended before it was up. A definite cause, once told, stays; else ZeroMQ tries again by itself.
            link = self.link if self.link in (Link.REFUSED, Link.NO_KEYS) else Link.UNFINISHED
        self.link = link

    def _timeout_s(self, now: float) -> float:
        if self._session.ended is not None:
            return _ENDED_S
        if self._asked is not None:
            return max(0.0, self._asked.sent_at + self._retry_s - now)
        return max(0.0, min(self._next_beat, self._look_at) - now)

    def _ask_if_due(self, now: float) -> None:
        session, asked = self._session, self._asked
        if asked is None:
            is_due = now >= self._next_beat or (session.is_busy and now >= self._look_at)
            if not (is_due or session.is_urgent):
                if now >= self._look_at:
                    self._look_at = math.inf  # pulls have told; the next push sets it
                return
        elif now >= asked.sent_at + self._retry_s:
            # Not all at once, when a broker comes back to many.
            self._retry_s = min(2 * self._retry_s, LAST_RETRY_S) * random.uniform(0.75, 1.0)
            self._open_request()
        elif asked.is_hello or asked.hurry == session.hurry or not session.hurry:
            return
        is_hello = session.phase == GREETING
        self.send_due()
        header = asking.hello(session) if is_hello else asking.heartbeat(session)
        session.told.clear()
        self._requests_sent += 1
        header["id"] = self._requests_sent
        assert self._request is not None  # opened before the first turn
        self._request.send_multipart([wire.pack(header)])
        self._asked = Asked(self._requests_sent, is_hello, session.hurry, now)

    def _receive(self, request: OwnedSocket) -> None:
        frames = request.recv_multipart(copy=True)
        asked = self._asked
        if not frames or asked is None:
            return
        try:
            header = wire.unpack(frames[0])
        except MalformedMessage as error:
            with self._lock:
                self._session.on_error(error, "malformed")
                self._changed.notify_all()
            return
        if header.get("id") != asked.request_id:
            return
        now = time.monotonic()
        with self._lock:
            session = self._session
            self._asked = None
            self._retry_s = FIRST_RETRY_S
            self.last_answer = now
            if not header.get("ok"):
                code = str(header.get("error"))
                session.on_error(from_code(code, str(header.get("message"))), code)
                if session.phase == GREETING and code == "failed":
                    # The broker is closing; ask its successor, but not in a tight loop.
                    self._asked = Asked(0, True, 0, now)
            elif asked.is_hello:
                session.on_hello(header, frames[1] if len(frames) > 1 else None, now)
            elif session.phase != GREETING:
                session.on_heartbeat(header, now)
            self._look_at = now + session.ask_s
            self._next_beat = now + min(max(IDLE_S, session.ask_s), session.lease_s / 4)
            if session.must_reopen:
                self.sender.open(session)
                session.reopened()
            self.send_due()
            self._changed.notify_all()

    def _open_request(self) -> None:
        if self._request is not None:
            self._request.close(0)
        self._was_up = False
        self._request = sockets.control_client(self.context, self._address.endpoint, keys=self._keys)
        self._request_links = sockets.monitor(self._request)

    def _say_goodbye(self) -> None:
        """Send `leave` and wait for its reply, within the time allowed."""
        client = os.urandom(16)
        while (left_s := self._leave_by - time.monotonic()) > 0:
            self._open_request()
            assert self._request is not None  # just opened
            self._request.send_multipart([wire.pack({**asking.leave(self._session), "client": client, "id": 1})])
            if self._request.poll(int(1000 * min(left_s, FIRST_RETRY_S))):
                return
