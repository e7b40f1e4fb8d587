"""``distgrad top``, ``distgrad dashboard`` and ``distgrad metrics``: look on at a running broker."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from distgrad import addresses
from distgrad.errors import ConfigError
from distgrad.keys import ClientKeys
from distgrad.seeing.watcher import Watcher

METRICS_PORT = 9469
DASHBOARD_PORT = 8420

_every = click.option(
    "--every", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between two looks."
)


def _looks_on(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command what all of them need to find their broker."""
    keys = click.option(
        "--keys", type=click.Path(path_type=Path, dir_okay=False), help="Key file, for a broker that has keys."
    )
    return click.argument("address")(keys(command))


@click.command(short_help="Watch and control a broker in the terminal.")
@_looks_on
@_every
def top(address: str, keys: Path | None, every: float) -> None:
    """Watch the broker at ADDRESS in the terminal, and control it with keys.

    s starts it, p stops it, c saves a checkpoint, e evicts the worker under the cursor, q leaves. With a key of role
    read it only looks on.
    """
    module = _extra("distgrad.seeing.top", "top")
    with Watcher(address, keys) as watcher:
        watcher.look()  # what is wrong with the address or the key is told before the screen is taken
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ConfigError(
                "`distgrad top` needs a terminal for what it shows and for its keys, got a pipe or a file",
                hint=f"distgrad admin {address} status --json tells the same to a program",
            )
        module.Top(watcher, every).run()


@click.command(short_help="Serve a page that shows a broker live.")
@_looks_on
@_every
@click.option(
    "--listen", default=f"127.0.0.1:{DASHBOARD_PORT}", show_default=True, help="Where to serve; port 0: a free one."
)
@click.option("--insecure", is_flag=True, help="Allow an address that others can reach: all goes unencrypted.")
@click.option("--no-control", is_flag=True, help="Only show: nobody can start, stop, save or evict.")
def dashboard(address: str, keys: Path | None, every: float, listen: str, insecure: bool, no_control: bool) -> None:
    """Serve a page that shows the broker at ADDRESS live, on this machine only unless told otherwise.

    Two links are printed: one to watch with, one that can also start, stop, save and evict. Whoever has a link can do
    that, with the key that this command was given; with a key of role read there is only the first. Ctrl-C ends it.
    """
    place = addresses.parse(listen, DASHBOARD_PORT)
    if not place.is_loopback and not insecure:
        raise ConfigError(
            f"{place} can be reached by others, and the page is not encrypted",
            hint="keep 127.0.0.1 and come through `ssh -L`, or pass --insecure if the network is yours alone",
        )
    module = _extra("distgrad.seeing.dashboard_server", "dashboard")
    key = None if keys is None else ClientKeys.load(keys)
    with Watcher(address, key) as watcher:
        watcher.look()
        # A link that the broker refuses whatever it asks for would only mislead.
        controls = not no_control and (key is None or key.role == "admin")
        module.serve(watcher, place, every, controls=controls, on_ready=_print_links)


@click.command(short_help="Serve a broker's numbers to Prometheus.")
@_looks_on
@click.option(
    "--listen", default=f"127.0.0.1:{METRICS_PORT}", show_default=True, help="Where to serve; port 0: a free one."
)
@click.option("--once", is_flag=True, help="Print the metrics and end.")
def metrics(address: str, keys: Path | None, listen: str, once: bool) -> None:
    """Serve the numbers of the broker at ADDRESS to Prometheus, under /metrics; Ctrl-C ends it."""
    from distgrad.seeing.metrics import render
    from distgrad.seeing.metrics_server import MetricsServer

    place = addresses.parse(listen, METRICS_PORT)
    with Watcher(address, keys) as watcher:
        if once:
            sight = watcher.look()
            click.echo(render(None if sight.error else sight.status, sight.workers), nl=False)
            return
        with MetricsServer(watcher, place) as server:
            click.echo(f"distgrad metrics {server.url}")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()


def _print_links(watch: str, control: str | None) -> None:
    click.echo(f"distgrad dashboard watch={watch}")
    if control is not None:
        click.echo(f"distgrad dashboard control={control}")


def _extra(module: str, extra: str) -> Any:
    """Import a module that needs an extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("distgrad"):
            raise
        raise ConfigError(
            f"`distgrad {extra}` needs the module {(error.name or module).partition('.')[0]!r}, which is missing",
            hint=f"in the clone of distgrad: pip install '.[{extra}]'",
        ) from error
