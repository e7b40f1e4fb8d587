"""A broker with a data folder, in a process of its own, that can be killed and started again where it was."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from distgrad import Admin
from support.processes import Process


class DurableBroker:
    """``distgrad broker --data …``, again and again on the same ports.

    Parameters
    ----------
    data : Path
        The data folder.
    *options : str
        More options.
    """

    def __init__(self, data: Path, *options: str) -> None:
        self.data = data
        self._options = options
        self._control = self._gradients = "tcp://127.0.0.1:0"
        self.process: Process
        self.start()

    def start(self, *more: str) -> None:
        """Start it; ports are those of the first time."""
        self.launch(*more)
        self.wait_until_ready()

    def launch(self, *more: str) -> None:
        """Start it, and do not wait for it."""
        addresses = ("--control", self._control, "--gradients", self._gradients, "--log-level", "warning")
        self.process = Process("broker", *addresses, "--data", self.data, *self._options, *more)

    def wait_until_ready(self) -> None:
        """Wait until both channels are bound."""
        line = self.process.wait_for_line(r"control=(\S+) gradients=(\S+)")
        self._control, self._gradients = line[1], line[2]

    @property
    def address(self) -> str:
        """The control address."""
        return self._control

    @property
    def gradients(self) -> str:
        """The gradients address."""
        return self._gradients

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()
        self.process.close()

    def stop(self) -> None:
        """End it cleanly."""
        self.process.terminate()
        assert self.process.wait() == 0, self.process.output()
        self.process.close()

    def admin(self) -> Admin:
        """Connect an admin."""
        return Admin(self._control, timeout=30)

    def wait_for_version(self, version: int, timeout: float = 120) -> None:
        """Wait until the parameters have a version; fail with what it printed if that takes too long."""
        deadline = time.monotonic() + timeout
        with self.admin() as admin:
            while admin.status()["version"] < version:
                assert time.monotonic() < deadline, f"{admin.status()}\n{self.process.output()}"

    def __enter__(self) -> DurableBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.__exit__(kind, error, trace)
