"""Keep processes running: start, restart within bounds, pass signals on, name their output.

This module knows nothing about workers. It starts commands, each in a session of its own, so that
Ctrl-C in a terminal reaches them once, through us. It ends when all of them have ended for good.

One asyncio loop owns everything: the processes, their pipes, the signals and the delays, so that a
stop wakes whatever waits. A process talks to us in two ways besides its exit code. Its standard input is a pipe
that nothing is ever written to: it closes when we are gone, however we went. And a line on its standard
error that begins with `REPORT`, and holds one, is not output but a message that another attempt would be useless.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

#: First byte of a line on standard error that holds a report (ASCII record separator: hardly ever in text).
REPORT = b"\x1e"

#: Longest piece of one output line that is held back for its end, in bytes.
_LONGEST_LINE = 1 << 16

#: How long output may go on after its process has ended (a grandchild can hold the pipe), in seconds.
_LAST_OUTPUT_S = 2.0


@dataclass(frozen=True)
class Command:
    """One process to keep running.

    Attributes
    ----------
    name : str
        Stands before each of its output lines.
    argv : tuple of str
        The program and its arguments.
    env : mapping of str to str, optional
        Added to our own environment.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RestartPolicy:
    """How often and when a process that failed is started again.

    Attributes
    ----------
    max_restarts : int
        Restarts in a row, >= 0.
    first_delay_s, longest_delay_s : float
        The delay doubles from the one to the other, in seconds.
    reset_after_s : float
        A process that ran this long, in seconds, before it failed counts as new.
    """

    max_restarts: int = 3
    first_delay_s: float = 0.5
    longest_delay_s: float = 10.0
    reset_after_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        """Return the delay after that many failures in a row.

        Parameters
        ----------
        failures : int
            At least 1.

        Returns
        -------
        float
            Seconds until the next start.
        """
        # The exponent is bounded first: 2.0 ** 2000 would be an OverflowError.
        return min(self.first_delay_s * 2.0 ** min(failures - 1, 32), self.longest_delay_s)


@dataclass(frozen=True)
class Report:
    """What a process said on why it must not be started again.

    Attributes
    ----------
    code : int
        Its exit code.
    message : str
        What is wrong and what to do.
    hint : str or None
        The next command to try.
    for_all : bool
        True if every process would fail in the same way.
    """

    code: int
    message: str
    hint: str | None = None
    for_all: bool = False

    def line(self) -> bytes:
        """Return the line that tells it to the supervisor.

        Returns
        -------
        bytes
            To be written to standard error in one piece.
        """
        values = {"code": self.code, "message": self.message, "hint": self.hint, "for_all": self.for_all}
        return REPORT + json.dumps(values).encode() + b"\n"


@dataclass(frozen=True)
class Outcome:
    """How a run of all processes ended.

    Attributes
    ----------
    code : int
        The highest exit code; 128 + n for a process that signal n ended.
    report : Report or None
        Set if all were stopped because none could work; it was not printed.
    """

    code: int
    report: Report | None = None


class _Attempt(asyncio.SubprocessProtocol):
    """One run of one process: cuts its output into lines and notes its end.

    ``asyncio.subprocess.Process`` is not used because its ``wait`` goes on, in Python 3.11, until the pipes are closed,
    which a grandchild can put off for ever.
    """

    def __init__(self, emit: Callable[[bytes, int], None]) -> None:
        self.exited = asyncio.Event()
        self.silent = asyncio.Event()
        self.report: Report | None = None
        self._emit = emit
        self._pending = {1: b"", 2: b""}
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._pending[fd] + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        self._pending[fd] = rest
        for line in lines:
            self._take(line, fd)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open:
            self.silent.set()

    def process_exited(self) -> None:
        self.exited.set()

    def flush(self) -> None:
        """Pass on what was printed without the end of a line."""
        for fd, rest in self._pending.items():
            if rest:
                self._take(rest, fd)
        self._pending = {1: b"", 2: b""}

    def _take(self, line: bytes, fd: int) -> None:
        report = _report_in(line) if fd == 2 else None
        if report is None:
            self._emit(line, fd)
        else:
            self.report = report


class Supervisor:
    """Runs commands until each has ended for good.

    Parameters
    ----------
    commands : sequence of Command
        At least one.
    policy : RestartPolicy, optional
        When to restart.
    grace_s : float, optional
        From the first signal to the kill of what still runs, in seconds.
    out, err : binary file, optional
        Where output goes; by default our own standard output and standard error.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        *,
        policy: RestartPolicy | None = None,
        grace_s: float = 45.0,
        out: BinaryIO | None = None,
        err: BinaryIO | None = None,
    ) -> None:
        self._commands = commands
        self._policy = policy or RestartPolicy()
        self._grace_s = grace_s
        self._out = out or sys.stdout.buffer
        self._err = err or sys.stderr.buffer
        self._running: set[int] = set()  # process ids
        self._stopping = asyncio.Event()
        self._signal = signal.SIGTERM
        self._failure: Report | None = None

    def run(self) -> Outcome:
        """Run until the end; SIGINT and SIGTERM are passed on, a second one kills.

        Must be called on the main thread, once.

        Returns
        -------
        Outcome
            The worst exit code, and why nothing could run if so.
        """
        return asyncio.run(self._run())

    async def _run(self) -> Outcome:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C then arrives as an exception
                loop.add_signal_handler(number, self._stop, number)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._keep(command)) for command in self._commands]
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(NotImplementedError):
                    loop.remove_signal_handler(number)
        code = max(task.result() for task in tasks)
        return Outcome(self._failure.code if self._failure else code, self._failure)

    async def _keep(self, command: Command) -> int:
        """Run one command, again and again, and return the code of its last end."""
        clock = asyncio.get_running_loop().time
        failures = restarts = 0
        while True:
            started = clock()
            code, report = await self._once(command)
            if code == 0 or self._stopping.is_set():
                return code
            # Who has worked before may find the broker away for a while; who never did has a wrong address.
            if report is not None and (restarts == 0 or not report.for_all):
                self._give_up(command, report)
                return code
            failures = 1 if clock() - started >= self._policy.reset_after_s else failures + 1
            why = report.message if report else _describe(code)
            if failures > self._policy.max_restarts:
                self._say(command, f"{why}; not restarted" + (f" again after {restarts} restarts" if restarts else ""))
                return code
            delay_s = self._policy.delay_s(failures)
            self._say(command, f"{why}; restart {failures} of {self._policy.max_restarts} in {delay_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
                return code
            restarts += 1

    async def _once(self, command: Command) -> tuple[int, Report | None]:
        """Run one command to its end and pass its output on."""
        pipe = subprocess.PIPE
        transport, attempt = await asyncio.get_running_loop().subprocess_exec(
            lambda: _Attempt(lambda line, fd: self._print(command, line, fd)),
            *command.argv,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={**os.environ, **command.env},
            start_new_session=True,
        )
        pid = transport.get_pid()
        self._running.add(pid)
        if self._stopping.is_set():  # the signal came while the process was being made
            _send(pid, self._signal)
        try:
            await attempt.exited.wait()
            self._running.discard(pid)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(attempt.silent.wait(), _LAST_OUTPUT_S)
            attempt.flush()
        finally:
            self._running.discard(pid)
            transport.close()  # kills it, should we fail ourselves
        code = transport.get_returncode()
        assert code is not None
        return (128 - code if code < 0 else code), attempt.report

    def _print(self, command: Command, line: bytes, fd: int) -> None:
        sink = self._out if fd == 1 else self._err
        # Of a line that was redrawn with carriage returns, only the last state is worth a log's line.
        text = line.rstrip(b"\r").rpartition(b"\r")[2]
        try:
            sink.write(command.name.encode() + b" | " + text + b"\n")
            sink.flush()
        except BrokenPipeError:
            # Nobody reads any more (`| head`). The descriptor is pointed elsewhere, so that neither this nor the
            # interpreter's last flush fails again.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sink.fileno())
            self._stop(signal.SIGTERM)

    def _say(self, command: Command, text: str) -> None:
        self._print(command, f"distgrad: {text}".encode(), 2)

    def _give_up(self, command: Command, report: Report) -> None:
        if report.for_all:
            self._failure = self._failure or report
            self._stop(signal.SIGTERM)
        else:
            hint = f" ({report.hint})" if report.hint else ""
            self._say(command, f"{report.message}{hint}; not restarted")

    def _stop(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            for pid in self._running:
                _kill(pid)
            return
        self._stopping.set()
        self._signal = number
        for pid in self._running:
            _send(pid, number)
        asyncio.get_running_loop().call_later(self._grace_s, self._stop, number)


def _report_in(line: bytes) -> Report | None:
    """Read a line; None if it is output. Some logs begin each line with the same byte (RFC 7464)."""
    if not line.startswith(REPORT):
        return None
    try:
        values = json.loads(line[len(REPORT) :])
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.keys() != {"code", "message", "hint", "for_all"}:
        return None
    code, message, hint, for_all = (values[key] for key in ("code", "message", "hint", "for_all"))
    is_report = type(code) is int and isinstance(message, str) and isinstance(hint, str | None)
    return Report(code, message, hint, for_all) if is_report and type(for_all) is bool else None


def _describe(code: int) -> str:
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(code - 128).name}"
    return f"ended with code {code}"


# Not the transport's send_signal: it asks the system whether the process has ended, and so takes the answer away from
# the loop's own watcher, which then reports code 255 (Python 3.11 to 3.13).
def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill(pid: int) -> None:
    """Kill a process and all that it started in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
