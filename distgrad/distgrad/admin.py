"""Control a running broker with the verbs of the in-process class.

Everything goes over the control channel, one request at a time; the broker stays the owner of the parameters.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distgrad import transfer
from distgrad.client import ControlClient
from distgrad.errors import Destroyed, InvalidMode, NoParameters
from distgrad.quantities import checked_timeout
from distgrad.requests_sent import Reply

if TYPE_CHECKING:
    from distgrad.keys import ClientKeys
    from distgrad.layout import Layout

# The longest wait that the protocol grants to one request; whoever wants to wait longer asks again.
_LONGEST_WAIT_S = 5.0
_MODES = ("descent", "ascent")


class Admin:
    """A connection to a broker that controls it.

    Nothing is sent before the first call. Threads of one process may share it; a child of ``fork`` may not.
    Every method raises `BrokerUnreachable` if no answer comes within `timeout`, `Forbidden` if the key's role does
    not allow the call, and `Destroyed` after `destroy`. Methods that change something raise `BrokerRestarted` if
    another broker process answers than the one spoken to before; nothing was done then, and calling again means the
    new one.

    Parameters
    ----------
    address : str
        The broker's control address: ``host``, ``host:port``, ``[v6]:port`` or ``tcp://…``; the port defaults to 5556.
    keys : path or ClientKeys, optional
        The admin's key file, for a broker that has keys.
    timeout : float, seconds, > 0
        How long a request may stay without an answer.

    Raises
    ------
    ConfigError
        If `address` is no address, or `timeout` is not above 0.

    Examples
    --------
    >>> with Admin("127.0.0.1:5556") as admin:  # doctest: +SKIP
    ...     admin.set_model_parameters({"w": numpy.zeros(3)})
    ...     admin.status()["version"]
    0
    """

    def __init__(
        self, address: str, keys: str | os.PathLike[str] | ClientKeys | None = None, timeout: float = 30.0
    ) -> None:
        self._client = ControlClient(address, keys, checked_timeout(timeout))
        self._layout: Layout | None = None
        self._is_destroyed = False

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the broker goes on. Idempotent."""
        self._client.close()

    @property
    def address(self) -> str:
        """The broker's control endpoint, such as ``tcp://127.0.0.1:5556``."""
        return self._client.address.endpoint

    def start(self) -> bool:
        """Let the broker apply gradients.

        Returns
        -------
        bool
            Whether it had been stopped; starting a running broker changes nothing.
        """
        return bool(self._change("start").header.get("changed"))

    def stop(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Stop applying gradients; what arrives from then on is queued within the workers' grants.

        Parameters
        ----------
        drain : bool
            Apply what is queued first.
        timeout : float, optional, seconds
            How long draining may take; by default as long as it takes.

        Returns
        -------
        bool
            Whether the broker had been running.

        Raises
        ------
        TimeoutError
            If the queue is not empty in time. The broker goes on draining and stops then.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        changed = False
        while True:
            wait_s = _LONGEST_WAIT_S if deadline is None else max(0.0, deadline - time.monotonic())
            wait_s = min(wait_s, _LONGEST_WAIT_S) if drain else 0.0
            reply = self._change("stop", drain=drain, wait_s=wait_s)
            changed = changed or bool(reply.header.get("changed"))
            if reply.header.get("drained", True):
                return changed
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the broker's queue is not empty after {timeout:g} s; it goes on draining")

    def clear_gradients(self) -> int:
        """Drop the gradients that are queued.

        Returns
        -------
        int
            How many there were.
        """
        return int(self._change("clear").header["cleared"])

    def get_model_parameters(self, like: Any = None) -> Any:
        """Fetch a consistent snapshot of the parameters.

        Parameters
        ----------
        like : nest, optional
            Gives its namedtuple classes to the result; without it a namedtuple comes back as a dict.

        Returns
        -------
        nest of ndarray, or None
            The nest as it was set, in fresh arrays; ``None`` while there are no parameters.

        Raises
        ------
        SnapshotRevoked
            If the broker had to take the snapshot back again and again: this reader is too slow.
        """
        fetched = self.fetch()
        if fetched is None:
            return None
        layout = fetched.layout
        return layout.nest(layout.views(fetched.arenas), like=like)

    def fetch(self) -> transfer.Fetched | None:
        """Fetch a snapshot of the parameters with the name of the state that it is of.

        Returns
        -------
        Fetched or None
            Layout, arenas and state; ``None`` while there are no parameters.

        Raises
        ------
        SnapshotRevoked
            As `get_model_parameters`.
        """
        self._check_alive()
        try:
            fetched = transfer.fetch(self._client, have=self._layout)
        except NoParameters:
            return None
        if fetched is not None:
            self._layout = fetched.layout
        return fetched

    def fetch_layout(self) -> Layout | None:
        """Fetch the layout of the parameters, without all of the parameters.

        Returns
        -------
        Layout or None
            Names, shapes, dtypes and structure; ``None`` while there are no parameters.
        """
        self._check_alive()
        try:
            return transfer.fetch_layout(self._client)
        except NoParameters:
            return None

    def set_model_parameters(self, parameters: Any) -> None:
        """Replace the parameters; also allowed while gradients are applied.

        The optimizer's state is reset, the version is kept. Queued gradients of another layout are refused.

        Parameters
        ----------
        parameters : nest of arrays, or None
            Copied. ``None`` takes the parameters away; gradients then wait for new ones.

        Raises
        ------
        LayoutError
            If they cannot be laid out.
        ConfigError
            If the broker's queue is too small for gradients of this size.
        """
        if parameters is None:
            self._change("set", absent=True, if_absent=False)
            return
        _, frames = transfer.payload(parameters)
        self._change("set", frames=frames, absent=False, if_absent=False)

    def set_parameters(
        self, gradient_change_mode: str | None = None, **numbers: float | bool | str | None
    ) -> dict[str, Any]:
        """Change how gradients are applied, from the next one on.

        Parameters
        ----------
        gradient_change_mode : {"descent", "ascent"}, optional
            In any case; ``None`` keeps the former one.
        **numbers : float, bool or str
            Numbers of the update rule, such as ``lr``, whose state is kept; the consistency policy by ``policy`` and
            its settings, such as ``policy="sync", quorum=3``. Another policy begins with its defaults; without a name
            the settings change the one in force.

        Returns
        -------
        dict
            The settings now in force.

        Raises
        ------
        InvalidMode
            If the mode is neither of the two.
        ConfigError
            If the rule has no such number, or the number is out of range.
        """
        settings: dict[str, Any] = dict(numbers)
        if gradient_change_mode is not None:
            mode = str(gradient_change_mode).lower()
            if mode not in _MODES:
                raise InvalidMode(gradient_change_mode)
            settings["mode"] = mode
        return _mapping(self._change("configure", settings=settings), "settings")

    def destroy(self) -> None:
        """End the broker: its queue and its parameters are gone. Every later call raises `Destroyed`."""
        self._change("destroy")
        self._is_destroyed = True

    def status(self) -> dict[str, Any]:
        """Ask what the broker is doing.

        Returns
        -------
        dict
            At least ``version``, ``running``, ``queued``, ``refused`` (a count for each reason), ``incarnation`` and
            ``workers``.
        """
        self._check_alive()
        return _mapping(self._client.request("status"), "status")

    def workers(self) -> list[dict[str, Any]]:
        """List the workers that the broker knows.

        Returns
        -------
        list of dict
            One for each, alive or not.
        """
        self._check_alive()
        workers: list[dict[str, Any]] = []
        first = 0
        while True:  # a reply holds a part of them
            header = self._client.request("workers", first=first).header
            workers += [dict(worker) for worker in header.get("workers", ())]
            following = header.get("next")
            if type(following) is not int or following <= first:
                return workers
            first = following

    def evict(self, worker: str) -> None:
        """End a worker's process: its requests are refused from now on, and its lease and grant are gone.

        What was accepted from it still counts. Another process may go on under the same id.

        Parameters
        ----------
        worker : str
            Its id, as `workers` tells it.

        Raises
        ------
        ConfigError
            If there is no such worker, or it has left.
        """
        self._change("evict", worker=worker)

    def save(self) -> str:
        """Have the broker write its parameters where it was told to.

        Returns
        -------
        str
            The path, on the broker's host.

        Raises
        ------
        ControlError
            With code ``failed`` if the broker could not write.
        """
        return str(self._change("save").header["path"])

    def _change(self, op: str, **keys: Any) -> Reply:
        self._check_alive()
        return self._client.request(op, mutating=True, **keys)

    def _check_alive(self) -> None:
        if self._is_destroyed:
            raise Destroyed("destroy() was called")


def _mapping(reply: Reply, key: str) -> dict[str, Any]:
    value = reply.header.get(key)
    return dict(value) if isinstance(value, Mapping) else {}
