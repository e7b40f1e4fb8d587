"""The processes of one contender: how the harness has them run rounds, and how they check what came out.

Each process of a contender holds a connection to the harness beside whatever it measures. A number on it means: do so
many exchanges (a server: with each worker). Zero means: do one more and check everything. Between rounds all of
them wait for that connection, so that a contender that spins while it waits does not slow the others down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks import harness
from benchmarks.peers.processes import cpu_s
from benchmarks.peers.update import zeros
from benchmarks.peers.work import Array, Cell, Gradients

PATIENCE_S = 120.0
_END = -1


class Member(Protocol):
    """A process of a contender, as the harness sees it; `harness.Child` is one."""

    def tell(self, count: int) -> None:
        """Have it do `count` exchanges, or check if that is 0."""

    def hear(self, timeout_s: float = ...) -> Any:
        """Wait for what it tells next."""


@dataclasses.dataclass
class Report:
    """What a worker found when it checked.

    Parameters
    ----------
    problem : str or None
        What is wrong with the parameters.
    lag : int
        The most of its own gradients that were ever missing in what came back.
    notes : dict
        More for the record.
    """

    problem: str | None
    lag: int = 0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: seconds on the clock and of processors for all of it, and each exchange's seconds under W4."""

    seconds: float
    cpu_s: float
    exchanges_s: list[float]


@dataclasses.dataclass(frozen=True)
class Team:
    """All processes of a contender, ready.

    Parameters
    ----------
    cell : Cell
        What they do.
    workers : sequence of Member
        In the order of their ranks. A contender whose driver speaks for all workers has one here.
    servers : sequence of Member
        Told of each round as well, and before.
    pids : sequence of int
        Processes that, with all that they started, count as the contender's.
    """

    cell: Cell
    workers: Sequence[Member]
    servers: Sequence[Member] = ()
    pids: Sequence[int] = ()

    def run(self, count: int) -> Round:
        """Do `count` exchanges for each worker and wait for the last one's end."""
        members = [*self.servers, *self.workers]
        before = cpu_s(self.pids)
        started = time.perf_counter()
        for member in members:
            member.tell(count)
        told = [member.hear(PATIENCE_S) for member in members]
        seconds = time.perf_counter() - started
        exchanges_s = [each for one in told for each in one or ()]
        return Round(seconds, cpu_s(self.pids) - before, exchanges_s)

    def check(self) -> Report:
        """Have every worker do one more exchange and compare all parameters with what they must be."""
        for server in self.servers:
            server.tell(1)
        if self.cell.steps_together:
            for worker in self.workers:
                worker.tell(0)
        reports: list[Report] = []
        for worker in self.workers:
            if not self.cell.steps_together:
                worker.tell(0)
            reports.append(worker.hear(PATIENCE_S))
        for server in self.servers:
            server.hear(PATIENCE_S)
        problems = [report.problem for report in reports if report.problem]
        notes = {key: value for report in reports for key, value in report.notes.items()}
        return Report(problems[0] if problems else None, max(report.lag for report in reports), notes)

    def end(self) -> None:
        """Have all members end; at once, because ending takes some of them seconds."""
        for member in [*self.servers, *self.workers]:
            with contextlib.suppress(OSError):  # it has ended
                member.tell(_END)


def take_part(connection: Connection, run: Callable[[int], Any], check: Callable[[], Report] | None = None) -> None:
    """In a process of a contender: say that it is ready, then do as it is told until the harness ends it."""
    connection.send("ready")
    with contextlib.suppress(EOFError):  # the harness is gone
        while (count := connection.recv()) is not None and count != _END:
            connection.send(run(count) if count or check is None else check())


class Link:
    """One worker's way to the parameters; what a contender is, on the worker's side.

    Parameters
    ----------
    cell : Cell
        What is done.
    """

    def __init__(self, cell: Cell) -> None:
        self.gradient = zeros(cell.size)

    def buffer(self) -> Array:
        """Give the array to write the next gradient to."""
        return self.gradient

    def exchange(self) -> Array:
        """Send what was written, and give the parameters that came back."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait until everything that was sent is applied; the last act of a round."""

    def last_exchange(self) -> Array:
        """Exchange, and give parameters that hold all that was applied before."""
        return self.exchange()

    def notes(self) -> dict[str, Any]:
        """Tell what else belongs in the record."""
        return {}


def work(connection: Connection, cell: Cell, rank: int, link: Link) -> None:
    """Be a worker until the harness ends it."""
    gradients = Gradients(cell, rank)
    lag = 0

    def run(count: int) -> list[float]:
        nonlocal lag
        exchanges_s = []
        for _ in range(count):
            gradients.write(link.buffer())
            started = time.perf_counter()
            parameters = link.exchange()
            if cell.work == "W4":
                exchanges_s.append(time.perf_counter() - started)
            lag = max(lag, gradients.lag(parameters))
        link.finish()
        return exchanges_s

    def check() -> Report:
        sent = gradients.sent
        gradients.write(link.buffer())
        parameters = link.last_exchange()
        # Where there is no step that all do together, workers do their last exchange one after the other.
        before = cell.workers if cell.steps_together else rank + 1
        counts = [sent + 1] * before + [sent] * (cell.workers - before)
        return Report(cell.problem(parameters, counts), lag, link.notes())

    take_part(connection, run, check)


def serve(connection: Connection, cell: Cell, receive: Callable[[], Any], reply: Callable[[Any], None]) -> None:
    """Be a server until the harness ends it.

    Parameters
    ----------
    connection : Connection
        To the harness.
    cell : Cell
        What is done.
    receive : callable
        Waits for a gradient, applies it, and tells whose it was.
    reply : callable
        Sends that worker the parameters.
    """

    def run(count: int) -> None:
        if not cell.steps_together:
            for _ in range(count * cell.workers):
                reply(receive())
            return
        for _ in range(count):
            for who in [receive() for _ in range(cell.workers)]:
                reply(who)

    take_part(connection, run)


@contextlib.contextmanager
def team_of(
    cell: Cell,
    worker: Callable[..., None],
    arguments: Sequence[Any] = (),
    *,
    server: Callable[..., None] | None = None,
) -> Iterator[Team]:
    """Start one process for each worker, and one for the server before.

    Parameters
    ----------
    cell : Cell
        What is done.
    worker : callable
        Run as ``worker(connection, cell, rank, *arguments)``.
    arguments : sequence
        Are pickled.
    server : callable, optional
        Run as ``server(connection, cell, *arguments)``. If it first tells a list, workers get its elements as further
        arguments.

    Yields
    ------
    Team
        Ready.
    """
    with contextlib.ExitStack() as stack:
        servers = []
        told: Sequence[Any] = ()
        if server is not None:
            servers.append(stack.enter_context(harness.Child(server, cell, *arguments)))
            first = servers[0].hear()
            if isinstance(first, list):
                told = first
        workers = [
            stack.enter_context(harness.Child(worker, cell, rank, *arguments, *told)) for rank in range(cell.workers)
        ]
        for worker_process in workers:
            worker_process.hear()
        if told:
            servers[0].hear()
        yield Team(cell, workers, servers, [child.pid for child in [*servers, *workers]])
