"""Run ``python -m distgrad …`` as a user does, and read what it prints with time-outs."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

DISTGRAD = (sys.executable, "-m", "distgrad")
START_S = 60.0


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without ``DISTGRAD_*`` and with unbuffered output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DISTGRAD_")}
    return kept | {"PYTHONUNBUFFERED": "1"} | more


def run(
    *arguments: object,
    timeout: float = START_S,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command of ``distgrad`` to its end; the caller looks at the exit code."""
    return subprocess.run(
        [*DISTGRAD, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=clean_environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        check=False,
    )


class Process:
    """A running command of ``distgrad``; leaving the ``with`` block kills what is left of it and of its children.

    Parameters
    ----------
    *arguments : object
        Behind ``python -m distgrad``.
    cwd : Path, optional
        Where it runs.
    env : mapping, optional
        More variables.
    program : sequence of str
        Instead of ``python -m distgrad``.

    Attributes
    ----------
    lines : list of str
        All that was read so far, of both streams.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        program: tuple[str, ...] = DISTGRAD,
    ) -> None:
        self.lines: list[str] = []
        self._unread: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A session of its own: a signal for it does not reach the tests, and all its children can be ended at once.
        self._command = [*program, *map(str, arguments)]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=cwd,
            env=clean_environment(**(env or {})),
            start_new_session=True,
        )
        streams = (self._process.stdout, self._process.stderr)
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True, name="reads-a-process")
            for stream in streams
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def wait_for_line(self, pattern: str, timeout: float = START_S) -> re.Match[str]:
        """Read on until a line matches; fail with all that was printed if none does in time."""
        deadline = time.monotonic() + timeout
        ended = 0
        while True:
            try:
                line = self._unread.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line matches {pattern!r} within {timeout} s\n{self.output()}") from None
            if line is None:
                ended += 1
                if ended == len(self._readers):
                    raise AssertionError(f"it ended without a line that matches {pattern!r}\n{self.output()}")
                continue
            match = re.search(pattern, line)
            if match is not None:
                return match

    def wait(self, timeout: float = START_S) -> int:
        """Wait for the end and return the exit code; fail with all that was printed if it does not end."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s\n{self.output()}") from None
        for reader in self._readers:
            reader.join(timeout)
        return code

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self._process.kill()
        self._process.wait()

    def output(self) -> str:
        """Return all lines so far, for messages."""
        return "\n".join(f"    | {line}" for line in list(self.lines))

    def close(self) -> None:
        """End the process and its children, whatever they do, and wait for them."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None:
            error.add_note(f"output of {' '.join(self._command)}:\n{self.output()}")

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line.rstrip("\n"))
            self._unread.put(line.rstrip("\n"))
        self._unread.put(None)
