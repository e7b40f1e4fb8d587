"""Reading requests and remembering replies: roles, retries, and what was answered already (PROTOCOL 12, 13).

A client names itself by a nonce and its requests by a rising id. For each client only the last reply to a mutating
request is remembered: a client has nothing else under way beside such a request, so a repeat can only be of the last
one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

WORKER, ADMIN, READ = "worker", "admin", "read"
ANY = frozenset({WORKER, ADMIN, READ})

# A reply is a small map; this many clients cost a few megabytes at most.
MAX_REMEMBERED_CLIENTS = 4096

# Client as the core knows it: the key's user, so that nobody can pass for another key's client, and its nonce.
ClientKey = tuple[str | None, bytes]


class RequestError(Exception):
    """A request is answered with an error.

    Parameters
    ----------
    code : str
        One of the codes in ``docs/wire.md``.
    message : str
        A sentence for the person who made the request.
    detail : dict, optional
        Values that a program may want.
    """

    def __init__(self, code: str, message: str, detail: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail = detail


class RememberedReplies:
    """The last reply to a mutating request of each client."""

    def __init__(self) -> None:
        self._last: OrderedDict[ClientKey, tuple[int, dict[str, Any] | None]] = OrderedDict()

    def find(self, client: ClientKey, request_id: int) -> tuple[bool, dict[str, Any] | None]:
        """Look for a request among those already taken in.

        Parameters
        ----------
        client : tuple
            Who asks.
        request_id : int
            The request.

        Returns
        -------
        seen : bool
            Whether it was taken in before.
        header : dict or None
            Its reply, or None while there is none yet.

        Raises
        ------
        RequestError
            ``invalid`` if the request is older than the last one: it was given up and must not be executed now.
        """
        last = self._last.get(client)
        if last is None or request_id > last[0]:
            return False, None
        if request_id < last[0]:
            raise RequestError("invalid", f"request {request_id} is older than {last[0]}; ids must rise")
        return True, last[1]

    def begin(self, client: ClientKey, request_id: int) -> ClientKey | None:
        """Note that a request is being carried out, before there is a reply.

        Parameters
        ----------
        client : tuple
            Who asks.
        request_id : int
            The request.

        Returns
        -------
        tuple or None
            The client that is forgotten for this one, if there are too many.
        """
        self._last[client] = (request_id, None)
        self._last.move_to_end(client)
        return self._last.popitem(last=False)[0] if len(self._last) > MAX_REMEMBERED_CLIENTS else None

    def finish(self, client: ClientKey, request_id: int, header: dict[str, Any]) -> None:
        """Keep the reply to a request, unless a newer request came meanwhile.

        Parameters
        ----------
        client : tuple
            Who asked.
        request_id : int
            The request.
        header : dict
            The reply.
        """
        last = self._last.get(client)
        if last is not None and last[0] == request_id:
            self._last[client] = (request_id, header)
