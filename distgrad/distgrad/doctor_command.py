"""``distgrad doctor``: what is wrong here, and how to mend it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from distgrad import addresses
from distgrad.command import DONE, REFUSED
from distgrad.doctor import Finding, Grade, Subject, examine
from distgrad.json_line import json_line
from distgrad.log import escape


@click.command()
@click.argument("address", required=False)
@click.option("--keys", type=click.Path(path_type=Path), help="A client's key file, or a broker's key folder.")
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="DIR", help="A broker's data folder, present or future."
)
@click.option("--control", default=f"127.0.0.1:{addresses.CONTROL_PORT}", show_default=True, help="As for the broker.")
@click.option(
    "--gradients", default=f"127.0.0.1:{addresses.GRADIENTS_PORT}", show_default=True, help="As for the broker."
)
@click.option("--workers", type=click.IntRange(1), default=100, show_default=True, help="That the broker is to serve.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def doctor(
    ctx: click.Context,
    address: str | None,
    keys: Path | None,
    data: Path | None,
    control: str,
    gradients: str,
    workers: int,
    as_json: bool,
) -> None:
    """Look for what is wrong on this machine, and say how to mend it.

    With ADDRESS it also asks the running broker there; without, it looks whether a broker could listen here. It
    changes nothing. The exit code is 1 if there is a fault; warnings do not count.
    """
    subject = Subject(address, keys, data, control, gradients, workers)
    found = set()
    for finding in examine(subject):
        found.add(finding.grade)
        click.echo(json_line(dataclasses.asdict(finding)) if as_json else _told(finding))
    ctx.exit(REFUSED if Grade.FAULT in found else DONE)


def _told(finding: Finding) -> str:
    line = f"{finding.grade:<8} {finding.about}: {escape(finding.text)}"
    return line if finding.mend is None else f"{line}\n{'':<9}mend: {escape(finding.mend)}"
