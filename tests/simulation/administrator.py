"""Somebody who gives the broker commands, one after the other, and asks again until there is an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distgrad import wire
from simulation.clockwork import Violation
from simulation.network import Frames, Link

if TYPE_CHECKING:
    from simulation.world import World

RETRY_S = 0.5
# A command that a restart of the broker overtook is given again this often; then its cause is taken for gone.
MAX_TRIES = 3
CLIENT = b"administrator"


class Administrator:
    """A client of the control channel.

    Attributes
    ----------
    link : Link
        Its connection.
    """

    def __init__(self, world: World) -> None:
        self.link = Link()
        self._world = world
        self._commands: deque[tuple[str, list[bytes], dict[str, Any], int]] = deque()
        self._incarnation: str | None = None
        self._last_id = 0
        self._is_asking = False

    @property
    def is_idle(self) -> bool:
        """Whether all commands were answered."""
        return not self._commands

    def give(self, op: str, frames: Sequence[bytes] = (), **keys: Any) -> None:
        """Give a command, after those before."""
        self._commands.append((op, list(frames), keys, 0))
        if len(self._commands) == 1:
            self._ask()

    def receive(self, frames: Frames) -> None:
        """Take in a reply."""
        header = wire.unpack(frames[0])
        if header["id"] != self._last_id or not self._is_asking:
            return
        self._is_asking = False
        former, self._incarnation = self._incarnation, header["incarnation"]
        if self._world.trace is not None:
            told = {key: header[key] for key in header if key in ("error", "message", "cleared", "changed", "drained")}
            self._world.note("admin", f"is told: {told}")
        if former is None:
            self._ask()
            return
        op, payload, keys, tries = self._commands.popleft()
        if not header["ok"] and header["error"] == "restarted" and tries < MAX_TRIES:
            self._commands.appendleft((op, payload, keys, tries + 1))
        elif not header["ok"] and header["error"] not in ("failed", "pending", "restarted", "no_parameters"):
            raise Violation(f"{op} with {keys} is answered: {header['error']}, {header['message']}")
        if self._commands:
            self._ask()

    def _ask(self) -> None:
        self._last_id += 1
        op, frames, keys, _ = self._commands[0] if self._incarnation is not None else ("status", [], {}, 0)
        header = {"v": wire.PROTOCOL_VERSION, "op": op, "client": CLIENT, "id": self._last_id, **keys}
        if op != "status":
            header["incarnation"] = self._incarnation
            if self._world.trace is not None:
                self._world.note("admin", f"commands: {op} {keys}")
        self._is_asking = True
        self._send(self._last_id, [wire.pack(header), *frames])

    def _send(self, request_id: int, frames: Frames) -> None:
        if self._is_asking and request_id == self._last_id:
            self._world.network.send_request(self.link, (b"admin", b"command", b""), frames)
            self._world.at(RETRY_S, self._send, request_id, frames)
