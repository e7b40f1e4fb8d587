"""``distgrad worker``: run a training function in several processes on this machine."""

from __future__ import annotations

import os
import socket
import sys

import click

from distgrad.command import UNREACHABLE, USAGE
from distgrad.errors import BrokerUnreachable, ConfigError, DistgradError
from distgrad_worker.runner import split_target
from distgrad_worker.supervisor import Command, Report, RestartPolicy, Supervisor


@click.command(short_help="Run a training function in worker processes.")
@click.argument("address")
@click.argument("target", metavar="MODULE:FUNCTION")
@click.option("--processes", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes to start.")
@click.option("--keys", metavar="FILE", help="The worker's key file, made by 'distgrad keys new'.")
@click.option(
    "--id",
    "prefix",
    metavar="PREFIX",
    help="The workers are PREFIX-0, PREFIX-1, … by rank; give the same one to resume under the same ids. "
    "[default: host name and process number, new for every run]",
)
@click.option("--max-restarts", type=click.IntRange(0), default=3, show_default=True, help="Of each, in a row.")
@click.option("--gradients", metavar="ADDRESS", help="Where gradients go, if not where the broker says (tunnels).")
@click.option("--first-rank", type=click.IntRange(0), default=0, show_default=True, help="Rank of the first process.")
@click.option("--world", type=click.IntRange(1), help="Processes on all machines. [default: first rank + processes]")
def worker(
    address: str,
    target: str,
    processes: int,
    keys: str | None,
    prefix: str | None,
    max_restarts: int,
    gradients: str | None,
    first_rank: int,
    world: int | None,
) -> None:
    """Run MODULE:FUNCTION, from the current folder, against the broker at ADDRESS.

    Each process calls the function with one argument, a connected worker
    (distgrad_worker.Worker), and flushes it when the function returns.

    The function finds its place in DISTGRAD_RANK (0, 1, …) and the number of all processes in
    DISTGRAD_WORLD, for example to choose its part of the data. To use several machines, give each
    its --first-rank, and all the same --world. Where several processes share this machine and
    OMP_NUM_THREADS is not set, it is set so that they share the cores.

    A process that fails is started again, under the same id, after 0.5 s, then after twice as long
    each time up to 10 s; one that ran for a minute counts as new. A process is not started again if
    another one took its id, or if its key may not do what it asked. SIGINT and SIGTERM are
    passed on; a second one kills.

    The exit code is 0 if every process ended well, otherwise the highest of their codes: 1 refused
    by the broker, 2 wrong usage, 3 broker unreachable, 70 an exception in the function, 128 + n
    ended by signal n.
    """
    split_target(target)
    everyone = first_rank + processes if world is None else world
    if everyone < first_rank + processes:
        least = first_rank + processes
        raise ConfigError(f"--world must be at least --first-rank + --processes = {least}, got {everyone}")
    prefix = prefix or f"{socket.gethostname()}-{os.getpid()}"
    shared = {"DISTGRAD_WORLD": str(everyone)}
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    options = [f"--{name}={value}" for name, value in (("keys", keys), ("gradients", gradients)) if value]
    commands = [
        Command(
            name=f"{prefix}-{rank}",
            # -P: our imports must not see the user's folder; -u: their output is wanted when it is written.
            argv=(
                *(sys.executable, "-P", "-u", "-m", "distgrad_worker.runner"),
                *(f"--id={prefix}-{rank}", *options, "--", address, target),
            ),
            env={**shared, "DISTGRAD_RANK": str(rank)},
        )
        for rank in range(first_rank, first_rank + processes)
    ]
    outcome = Supervisor(commands, policy=RestartPolicy(max_restarts=max_restarts)).run()
    if outcome.report is not None:
        raise _error(outcome.report)
    sys.exit(outcome.code)


def _error(report: Report) -> DistgradError:
    """Make of what one process said on behalf of all an error as any other; print what is more than a line."""
    message, _, traceback = report.message.partition("\n")
    if traceback:
        click.echo(traceback, err=True)
    if report.code == USAGE:
        return ConfigError(message, hint=report.hint)
    if report.code == UNREACHABLE:
        return BrokerUnreachable(message, hint=report.hint)
    return DistgradError(message, hint=report.hint)
