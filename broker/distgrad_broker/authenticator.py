"""Decide who may connect: the ZAP handler (ZeroMQ RFC 27), run by the broker's own loop.

ZeroMQ asks on ``inproc://zeromq.zap.01`` about every client that has proved to hold a key; until the answer the
connection can do nothing. Clients that fail before that (no key, or the key of another broker) are never asked about:
the listening sockets' monitors tell of them. There is no thread here, so a busy loop lets clients wait; after two
seconds they try again.
"""

from __future__ import annotations

import logging
from collections import Counter

import zmq
from zmq.utils import z85

from distgrad import log
from distgrad.errors import KeyFileError
from distgrad.keys import BrokerKeys, Client, Role
from distgrad.sockets import ZAP_DOMAIN, Context, Link, LinkMonitor, OwnedSocket, monitor

REFRESH_S = 1.0

_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
# version, request id, domain, address, identity, mechanism, and one credential for CURVE: its public key, raw.
_CURVE_FRAMES = 7

_REASONS = {Link.NO_KEYS: "no_key", Link.OTHER_KEYS: "other_broker", Link.UNFINISHED: "handshake"}

_logger = logging.getLogger(__name__)


class Authenticator:
    """Let the clients of a key folder in, count the others, and name the role of each sender.

    Made, used and closed on the thread of the loop, and before the sockets that it protects are bound: a client that
    came earlier would be refused.

    Parameters
    ----------
    context : zmq.Context
        The one of the sockets to protect.
    keys : BrokerKeys
        The broker's keys and clients; `refresh` follows their folder.

    Attributes
    ----------
    socket : zmq.Socket
        To poll: `handle` when it is readable.
    keys : BrokerKeys
        The table in force.
    """

    def __init__(self, context: Context, keys: BrokerKeys) -> None:
        self.keys = keys
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.bind(_ENDPOINT)
        self._owned = OwnedSocket(socket)
        self.socket = socket
        self._monitors: list[LinkMonitor] = []
        self._refused: Counter[str] = Counter()
        self._next_refresh = 0.0
        self._trouble: tuple[str, ...] = ()

    def watch(self, *sockets: OwnedSocket) -> None:
        """Count the failed handshakes of listening sockets, too.

        Parameters
        ----------
        *sockets : OwnedSocket
            Bound; their `OwnedSocket.close` ends the watch.
        """
        self._monitors.extend(monitor(socket, only_failures=True) for socket in sockets)

    def handle(self) -> None:
        """Answer all questions that wait, without waiting for more."""
        while frames := self._owned.recv_multipart(copy=True):
            # A ROUTER puts the asking connection in front, and ZAP an empty frame.
            origin, request = frames[:2], frames[2:]
            if len(request) < 2:
                self._refused["malformed"] += 1
                continue
            client = self._client_of(request)
            if client is None:
                answer = [b"400", b"unknown key", b""]
            else:
                answer = [b"200", b"OK", client.public]
            self._owned.send_multipart([*origin, _VERSION, request[1], *answer, b""], copy=True)

    def refresh(self, now: float) -> None:
        """Follow changes of the key folder, at most once a second; call it on every turn of the loop.

        Parameters
        ----------
        now : float, seconds
            Monotonic time.
        """
        if now < self._next_refresh:
            return
        self._next_refresh = now + REFRESH_S
        # Here as well, so that what is counted does not pile up in the monitors.
        self._count_failures()
        try:
            keys = self.keys.refreshed()
            trouble = keys.problems
        except KeyFileError as error:
            # A folder that cannot be read says nothing about who was revoked; work goes on as it was.
            keys, trouble = self.keys, (str(error),)
        if trouble != self._trouble:
            self._trouble = trouble
            for sentence in trouble:
                log.event(_logger, logging.ERROR, "key folder cannot be read", problem=sentence)
        if keys is not self.keys:
            self._tell_changes(keys)
            self.keys = keys

    def role_of(self, user_id: str | None) -> Role | None:
        """Tell what the sender of a message may do now.

        Parameters
        ----------
        user_id : str or None
            The message's ``User-Id``: the sender's public key.

        Returns
        -------
        Role or None
            None for a key that was revoked, whether its connection still stands or not.
        """
        client = self._find(user_id)
        return None if client is None else client.role

    def name_of(self, user_id: str | None) -> str | None:
        """Tell the name of a key.

        Parameters
        ----------
        user_id : str or None
            As for `role_of`.

        Returns
        -------
        str or None
            None for a key that is not in the table.
        """
        client = self._find(user_id)
        return None if client is None else client.name

    def refused(self) -> dict[str, int]:
        """Return how many connections were refused since the start.

        Returns
        -------
        dict
            By reason: ``unknown_key``, ``no_key``, ``other_broker`` (the client means another broker's key),
            ``handshake`` (too slow, or not ZeroMQ), ``malformed``. A client that tries again counts again.
        """
        self._count_failures()
        return dict(self._refused)

    def close(self) -> None:
        """Close the ZAP socket, after which nobody new gets in; close the protected sockets first. Idempotent."""
        self._owned.close()

    def _client_of(self, request: list[bytes]) -> Client | None:
        version, _id, domain, _address, _identity, mechanism = request[:6] if len(request) >= 6 else [b""] * 6
        if version != _VERSION or domain != ZAP_DOMAIN or len(request) < _CURVE_FRAMES:
            self._refused["malformed"] += 1
            return None
        if mechanism != b"CURVE" or len(request[6]) != 32:
            self._refused["no_key"] += 1
            return None
        client = self.keys.clients.get(z85.encode(request[6]))
        if client is None:
            self._refused["unknown_key"] += 1
        return client

    def _find(self, user_id: str | None) -> Client | None:
        # Z85 is ASCII; anything else is no key of ours and becomes one that is not in the table.
        return None if user_id is None else self.keys.clients.get(user_id.encode("ascii", "replace"))

    def _count_failures(self) -> None:
        for watch in self._monitors:
            for link in watch.drain():
                # What the ZAP handler refused was counted when it was asked.
                if link in _REASONS:
                    self._refused[_REASONS[link]] += 1

    def _tell_changes(self, keys: BrokerKeys) -> None:
        before, after = set(self.keys.clients.values()), set(keys.clients.values())
        for client in sorted(after - before):
            log.event(_logger, logging.INFO, "key added", name=client.name, role=client.role)
        for client in sorted(before - after):
            log.event(_logger, logging.INFO, "key revoked", name=client.name, role=client.role)
