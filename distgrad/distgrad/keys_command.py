"""The command ``distgrad keys``: make, list and revoke the keys that a broker lets in."""

from __future__ import annotations

from pathlib import Path

import click

from distgrad.keys import BrokerKeys, Role, add_client, revoke_client
from distgrad.sockets import curve_pair

_folder = click.option(
    "--dir", "folder", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The broker's key folder."
)


@click.group()
def keys() -> None:
    """Make, list and revoke the keys of workers, admins and readers."""


@keys.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    required=True,
    help="worker: push gradients; admin: control the broker; read: pull parameters and status.",
)
@_folder
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write the client's secret key.  [default: NAME.key beside the folder]",
)
def new(name: str, role: str, folder: Path, out: Path | None) -> None:
    """Make a key for a new client, and the broker's own at first use."""
    _, path = add_client(folder, name, Role(role), curve_pair, out=out)
    click.echo(f"wrote {path}: the {role} key of {name}, for its --keys and for nobody else")
    click.echo(f"the broker takes the folder: distgrad broker --keys {folder}")


@keys.command("list")
@_folder
def list_(folder: Path) -> None:
    """List the keys that the broker lets in."""
    for client in sorted(BrokerKeys.load(folder).clients.values()):
        click.echo(f"{client.name:<24} {client.role:<8} {client.public.decode()}")


@keys.command()
@click.argument("name")
@_folder
def revoke(name: str, folder: Path) -> None:
    """Take a key away; a running broker follows within seconds."""
    revoke_client(folder, name)
    click.echo(f"revoked {name}")
