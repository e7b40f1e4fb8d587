"""``distgrad admin ADDRESS COMMAND``: control a running broker from a shell.

Results go to standard output, errors to standard error; the exit codes are those of `distgrad.command`.
"""

from __future__ import annotations

import socket
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from distgrad import addresses, parameter_files, tables
from distgrad.admin import Admin
from distgrad.command import DONE, REFUSED, exit_code
from distgrad.errors import ConfigError, DistgradError, NoParameters
from distgrad.health import obstacles
from distgrad.json_line import json_line
from distgrad.log import escape
from distgrad.quantities import parse_seconds
from distgrad.reader import Reader
from distgrad.snapshot import Snapshot
from distgrad.tables import shown

# A broker that was destroyed is there for 5 seconds more.
GONE_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.1

# What is text whatever it looks like, and what may have a unit, as the broker's flags.
_TEXTS = ("mode", "policy")
_TIMES = ("grace",)
_WORDS = {"true": True, "false": False, "none": None}
# The whole numbers that a message can hold.
_LEAST_WHOLE, _MOST_WHOLE = -(2**63), 2**64 - 1


class _AdminGroup(click.Group):
    """A group with an argument of its own, whose commands end with a sentence instead of a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # click takes a group's options in front of its first argument only; people write them behind it, too, and
        # behind the command. No command has one of the same name.
        options, rest = self._split(args)
        if rest and rest[0] in self.commands and not (len(rest) > 1 and rest[1] in self.commands):
            if not {*ctx.help_option_names}.isdisjoint(args):
                return super().parse_args(ctx, ["ADDRESS", rest[0], ctx.help_option_names[-1]])
            raise click.UsageError(
                f"the broker's address comes before the command: expected ADDRESS {rest[0]}, got {' '.join(rest)}; "
                f"for a broker on this machine: distgrad admin 127.0.0.1 {rest[0]}",
                ctx,
            )
        return super().parse_args(ctx, [*options, *rest])

    def _split(self, args: list[str]) -> tuple[list[str], list[str]]:
        """Part the group's own options, with their values, from the address, the command and all that is its own."""
        with_value = {name for option in self.params if isinstance(option, click.Option) for name in option.opts}
        options: list[str] = []
        rest: list[str] = []
        words = list(args)
        while words and words[0] != "--":
            word = words.pop(0)
            name = word.partition("=")[0]
            # What stands before the command and is no option of ours is a mistake of which click tells.
            is_ours = name in with_value or (word.startswith("-") and len(rest) < 2)
            (options if is_ours else rest).append(word)
            if word in with_value and words:
                options.append(words.pop(0))
        return options, [*rest, *words]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DistgradError as error:
            if ctx.parent is not None:
                raise  # the command `distgrad` tells it
            click.echo(f"error: {escape(str(error))}", err=True)
            if error.hint:
                click.echo(f"hint: {escape(error.hint)}", err=True)
            ctx.exit(exit_code(error))


@click.group(cls=_AdminGroup)
@click.argument("address")
@click.option(
    "--keys", type=click.Path(path_type=Path, dir_okay=False), envvar="DISTGRAD_ADMIN_KEYS", show_envvar=True,
    help="Key file, for a broker that has keys.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
    help="Seconds that the broker may stay silent.",
)  # fmt: skip
@click.pass_context
def admin(ctx: click.Context, address: str, keys: Path | None, timeout: float) -> None:
    """Control the running broker at ADDRESS.

    ADDRESS is HOST, HOST:PORT or tcp://HOST:PORT, and stands before the command. The options may also stand behind it.
    """
    ctx.obj = ctx.with_resource(Admin(address, keys, timeout))


@admin.command()
@click.pass_obj
def start(broker: Admin) -> None:
    """Apply gradients."""
    click.echo("started" if broker.start() else "was running already")


@admin.command()
@click.option("--drain/--no-drain", default=True, show_default=True, help="Apply what is queued first.")
@click.pass_obj
def stop(broker: Admin, drain: bool) -> None:
    """Stop applying gradients; workers then wait."""
    click.echo("stopped" if broker.stop(drain=drain) else "was stopped already")


@admin.command()
@click.pass_obj
def clear(broker: Admin) -> None:
    """Drop the gradients that are queued."""
    click.echo(f"dropped {broker.clear_gradients()} gradients")


@admin.command()
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help=".safetensors or .npz")
@click.option("--follow", is_flag=True, help="Write each new version, until Ctrl-C; the file is always a whole one.")
@click.option(
    "--every", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="Seconds between, with --follow, as long as there is news.",
)  # fmt: skip
@click.pass_context
def get(ctx: click.Context, out: Path, follow: bool, every: float) -> None:
    """Write the parameters to a file."""
    parameter_files.check_suffix(out)
    if not follow:
        fetched = ctx.obj.fetch()
        if fetched is None:
            raise NoParameters("the broker has no parameters yet")
        _write(out, Snapshot(fetched.layout, fetched.arenas, fetched.state))
        return
    assert ctx.parent is not None  # the group that was given address, keys and timeout
    for snapshot in ctx.with_resource(Reader(**ctx.parent.params)).follow(reuse=True):
        _write(out, snapshot)
        time.sleep(every)


@admin.command(name="set")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def set_(broker: Admin, file: Path) -> None:
    """Replace the parameters by those of FILE (.safetensors or .npz).

    If the broker's parameters have the same names, they keep their structure; otherwise they become a flat dict.
    """
    arrays = parameter_files.read(file)
    broker.set_model_parameters(parameter_files.as_nest(arrays, like=broker.fetch_layout()))
    click.echo(f"set {_leaves(len(arrays))} from {file}")


@admin.command()
@click.argument("settings", nargs=-1, metavar="KEY=VALUE...")
@click.pass_obj
def configure(broker: Admin, settings: Sequence[str]) -> None:
    """Change the mode, the policy or numbers of the update rule; print what is in force.

    \b
    mode=ascent            the direction of an update
    lr=0.01 beta1=0.95     numbers of the update rule
    policy=sync quorum=3   when a gradient counts; without policy=, settings
                           change the one in force, and none unsets one
    reduction=sum          how the gradients of a step are combined
    """  # noqa: D301 (the backspace has click keep the lines as they are)
    chosen = dict(_setting(text) for text in settings)
    mode = chosen.pop("mode", None)
    in_force = broker.set_parameters(mode, **chosen)
    for name, value in in_force.items():
        click.echo(f"{name}={shown(value)}")


@admin.command()
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C.")
@click.option(
    "--every", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="Seconds between, with --watch."
)
@click.pass_obj
def status(broker: Admin, as_json: bool, watch: bool, every: float) -> None:
    """Show what the broker is doing."""
    states = _repeat(broker, every) if watch else iter([broker.status()])
    if as_json:
        for state in states:
            click.echo(json_line(state))
        return
    console = Console()
    if not watch:
        console.print(_status_table(broker, next(states)))
        return
    with Live(console=console, auto_refresh=False) as live:
        for state in states:
            live.update(_status_table(broker, state), refresh=True)


@admin.command()
@click.option("--ready", is_flag=True, help="Also ask whether it settles gradients: it is not stopped, its disk works.")
@click.pass_context
def health(ctx: click.Context, ready: bool) -> None:
    """Tell in one line, and by exit code 0 or 1, whether the broker answers."""
    try:
        status = ctx.obj.status()
    except DistgradError as error:
        found = [str(error)]
    else:
        found = obstacles(status) if ready else []
    click.echo(f"not {'ready' if ready else 'healthy'}: {escape('; '.join(found))}" if found else _well(status, ready))
    ctx.exit(REFUSED if found else DONE)


@admin.command()
@click.option("--all", "with_all", is_flag=True, help="Everything that is known of each, however wide.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON, with everything that is known.")
@click.pass_obj
def workers(broker: Admin, with_all: bool, as_json: bool) -> None:
    """List the workers that the broker knows.

    queued is in bytes, seen the time since the last sign of life; staleness and loss are those of the last gradient.
    """
    rows = broker.workers()
    if as_json:
        click.echo(json_line(rows))
    elif not rows:
        click.echo("no workers yet")
    elif with_all:
        tables.print_whole(tables.of_workers(rows, with_all=True))
    else:
        tables.print_fitted(tables.of_workers(rows, with_all=False))


@admin.command()
@click.argument("worker")
@click.pass_obj
def evict(broker: Admin, worker: str) -> None:
    """End the process of WORKER, and give its grant to the others; its id may be used again."""
    broker.evict(worker)
    click.echo(f"evicted {shown(worker)}")


@admin.command()
@click.pass_obj
def save(broker: Admin) -> None:
    """Have the broker write its parameters to the file that it was started with."""
    click.echo(f"saved to {shown(broker.save())}")


@admin.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def destroy(broker: Admin, yes: bool) -> None:
    """End the broker, and wait until it is gone; its queue and its parameters are gone, too."""
    if not yes:
        click.confirm(f"End the broker at {broker.address} and drop its parameters?", abort=True)
    broker.destroy()
    # It goes on for some seconds, to tell it to whoever asks; a script that begins another one needs the ports.
    if _is_gone(broker.address):
        click.echo("destroyed")
    else:
        click.echo(f"destroyed; something still listens at {broker.address}, so the ports may not be free yet")


def _is_gone(endpoint: str) -> bool:
    """Wait until nobody listens there any more; False if somebody does for too long, such as a proxy or a successor."""
    address = addresses.parse(endpoint, addresses.CONTROL_PORT)
    give_up_at = time.monotonic() + GONE_WITHIN_S
    while True:
        try:
            socket.create_connection((address.host, address.port), timeout=1.0).close()
        except OSError:
            return True
        if time.monotonic() >= give_up_at:
            return False
        time.sleep(_LOOK_EVERY_S)


def _well(status: Mapping[str, Any], ready: bool) -> str:
    version, workers = shown(status.get("version")), shown(status.get("workers_live"))
    return f"{'ready' if ready else 'healthy'}: version {version}, {workers} workers"


def _repeat(broker: Admin, every: float) -> Iterator[dict[str, Any]]:
    while True:
        yield broker.status()
        time.sleep(every)


def _write(out: Path, snapshot: Snapshot) -> None:
    parameter_files.write(out, snapshot.parameters)
    click.echo(f"wrote {out}: version {snapshot.version}, {_leaves(len(snapshot.layout.leaves))}")


def _setting(text: str) -> tuple[str, Any]:
    """Read one ``key=value``; what each key may be is the broker's to say, which knows its rule and its policies."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise click.BadParameter(
            f"must look like lr=0.01, mode=ascent or policy=sync, got {text!r}", param_hint="KEY=VALUE"
        )
    if key in _TEXTS:
        return key, value
    if value.lower() in _WORDS:
        return key, _WORDS[value.lower()]
    if key in _TIMES:
        try:
            return key, parse_seconds(value)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    if value.startswith("{"):
        try:
            return key, tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{key} must be a TOML inline table such as '{{cooldown = 3}}': {error}") from error
    return key, _number_or_text(value)


def _number_or_text(value: str) -> int | float | str:
    try:
        if _LEAST_WHOLE <= int(value) <= _MOST_WHOLE:
            return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        return value


def _leaves(count: int) -> str:
    return "1 array" if count == 1 else f"{count} arrays"


def _status_table(broker: Admin, status: Mapping[str, Any]) -> Table:
    return tables.of_pairs(f"broker at {broker.address}", status)
