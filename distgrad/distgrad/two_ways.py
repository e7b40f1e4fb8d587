"""Where a client's replies come in: by its control socket, and perhaps by a lane beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distgrad.lanes import MAX_BYTES, Lane
from distgrad.owned_sockets import OwnedSocket
from distgrad.spinning import Spinner


class TwoWays:
    """What one client waits at; used under its lock.

    Attributes
    ----------
    lane : Lane or None
        Beside the socket.
    has_lost : bool
        Whether a lane has ended since this was last made false: replies that were to come by it have to be asked for.
    has_answered : bool
        Whether what came last came by the lane.
    """

    def __init__(self) -> None:
        self.lane: Lane | None = None
        self.has_lost = False
        self.has_answered = False
        self._on_end: Callable[[Lane], None] | None = None
        self._buffer = memoryview(b"")
        self._spinner = Spinner()

    def use(self, lane: Lane | None, on_end: Callable[[Lane], None]) -> None:
        """Take another lane.

        Parameters
        ----------
        lane : Lane or None
            From which nobody else receives.
        on_end : callable
            Called with it when it has ended.
        """
        if lane is not None and not self._buffer:
            self._buffer = memoryview(bytearray(MAX_BYTES))
        self.has_answered = False
        self.lane, self._on_end = lane, on_end

    def poll(self, socket: OwnedSocket, timeout_ms: int) -> bool:
        """Wait for a message.

        Parameters
        ----------
        socket : OwnedSocket
            The control socket.
        timeout_ms : int, milliseconds, >= 0
            How long.

        Returns
        -------
        bool
            Whether to `receive`.
        """
        socket.watch(None if self.lane is None else self.lane.fd)
        return socket.poll(timeout_ms) if self.lane is None else self._spinner.poll(socket.poll, timeout_ms)

    def receive(self, socket: OwnedSocket) -> Sequence[Any]:
        """Take a message.

        Parameters
        ----------
        socket : OwnedSocket
            The control socket.

        Returns
        -------
        sequence of buffers
            Its frames from the header on; empty if there is none. What came by the lane is overwritten by the next.
        """
        lane = self.lane
        if lane is not None:
            frames = lane.receive(self._buffer)
            if frames:
                self.has_answered = True
                return frames
            if not lane.is_open:
                self.lane, self.has_lost = None, True
                if self._on_end is not None:
                    self._on_end(lane)
        self.has_answered = False
        received = socket.recv_multipart()
        if len(received) < 2 or len(received[0]):
            return ()
        return [frame.buffer for frame in received[1:]]
