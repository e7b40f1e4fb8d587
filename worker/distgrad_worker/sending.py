"""The ways on which a worker's gradients leave: ZeroMQ's PUSH, and on the broker's host a lane beside it.

A lane takes a gradient that somebody waits for: there a message's way is most of the time. All others go through PUSH,
which holds more, and where small ones share messages. Both ways reach the same loop, which looks into the lanes before
it takes what came through PUSH; so order is kept as long as a gradient takes the lane only when nothing is under way
through PUSH.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distgrad import addresses, lanes, sockets, wire
from distgrad.owned_sockets import LinkMonitor, OwnedSocket
from distgrad_worker.bundles import messages
from distgrad_worker.session import Session
from distgrad_worker.window import Entry


class Sender:
    """Sends a session's gradients; used under the lock that guards the session.

    Parameters
    ----------
    context : zmq.Context
        Where to make the socket.
    address : Address
        The broker's control channel.
    keys : ClientKeys or None
        For CURVE.
    gradients : str or None
        Where to send gradients, if not where the broker says.
    host : str or None
        This host's name, if memory is to be shared with a broker on it.

    Attributes
    ----------
    links : LinkMonitor or None
        Tells what becomes of the PUSH connection.
    lane : Lane or None
        On which the broker answers what asks for an answer. Who waits for the answers opens it: the broker must know
        of none that nobody looks at.
    """

    def __init__(
        self, context: sockets.Context, address: addresses.Address, keys: Any, gradients: str | None, host: str | None
    ) -> None:
        self._context = context
        self._address = address
        self._keys = keys
        self._override = gradients
        self._host = host
        self.links: LinkMonitor | None = None
        self.lane: lanes.Lane | None = None
        self._push: OwnedSocket | None = None
        self._raw: Any = None
        # The last number that went through PUSH.
        self._last_pushed = 0
        # The session whose lane has brought nothing so far: if it ends, the broker has no place for another one.
        self._tried: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a way to the broker."""
        return self._raw is not None

    def open(self, session: Session) -> None:
        """Open new ways, for a session that was just greeted.

        Parameters
        ----------
        session : Session
            Whose gradients they are.
        """
        self.close()
        if not session.gradients:
            return
        endpoint = addresses.gradients_endpoint(self._address, session.gradients, self._override)
        self._push = sockets.gradient_client(self._context, endpoint, keys=self._keys)
        self.links = sockets.monitor(self._push)
        self._raw = self._push.raw()

    def may_open_lane(self, session: Session) -> bool:
        """Tell whether there is no lane, and one might be had.

        Parameters
        ----------
        session : Session
            Whose it would be.

        Returns
        -------
        bool
            Whether to call `open_lane`. Need not be asked under the lock.
        """
        return (
            self._host is not None
            and self.lane is None
            and session.host == self._host
            and session.name != self._tried
            and self._raw is not None
            and not session.must_reopen
        )

    def open_lane(self, session: Session) -> lanes.Lane | None:
        """Open a lane if there may be one.

        Parameters
        ----------
        session : Session
            Whose it is.

        Returns
        -------
        Lane or None
            The present one; the caller looks at it from now on.
        """
        if self.may_open_lane(session):
            self._tried = session.name
            lane = lanes.connect(session.lane)
            header = {"v": wire.PROTOCOL_VERSION, "worker": session.worker_id, "session": session.name}
            if lane is not None and lane.send([wire.pack(header)]):
                self.lane = lane
        return self.lane

    def lose_lane(self, lane: lanes.Lane) -> bool:
        """Take note that a lane has ended.

        Parameters
        ----------
        lane : Lane
            Which.

        Returns
        -------
        bool
            Whether it was the present one, and not one that was closed here.
        """
        if self.lane is not lane:
            return False
        self.lane = None
        if lane.has_received:
            self._tried = None
        return True

    def send(self, session: Session, entries: Sequence[Entry]) -> None:
        """Send gradients.

        Parameters
        ----------
        session : Session
            Whose.
        entries : sequence of Entry
            From `Session.sendable`.

        Raises
        ------
        zmq.Again
            If PUSH takes nothing: its connection was refused for good.
        ConnectionResetError
            If the lane has ended, and with it perhaps what was sent on it.
        """
        if not entries:
            return
        raw, lane = self._raw, self.lane
        if entries[0].asks is None or len(entries) > 1 or session.window.settled < self._last_pushed:
            lane = None
        for frames in messages(entries, session.shared):
            if lane is not None:
                if lane.send(frames):
                    return
                if not lane.is_open:
                    self.lose_lane(lane)
                    raise ConnectionResetError
            self._last_pushed = entries[-1].number
            if len(frames) == 1:
                raw.send(frames[0])
            else:
                raw.send_multipart(frames, copy=False)

    def close(self) -> None:
        """Close all; who reads the lane finds its end."""
        if self.lane is not None:
            if self.lane.is_open:
                self._tried = None
            self.lane.end()
            self.lane = None
        if self._push is not None:
            self._push.close(0)
        self._push = self._raw = self.links = None
