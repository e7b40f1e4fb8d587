"""``distgrad replay DIR`` and ``distgrad journal DIR``: look into a data folder, also while a broker uses it.

Nothing in the folder is locked or changed. Results go to standard output, warnings and errors to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from distgrad import parameter_files, tables
from distgrad.command import REFUSED
from distgrad.durable import described
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import OsDisk
from distgrad.durable.inspection import ShownRecord, Survey, survey
from distgrad.durable.rebuild import rebuild
from distgrad.executor import EXECUTORS
from distgrad.json_line import json_line
from distgrad.log import Event, escape

# A long replay tells how far it is this often.
PROGRESS_S = 2.0
# What `--records` shows without a number.
SHOWN_RECORDS = 20


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--until", type=click.IntRange(min=0), metavar="VERSION", help="Version to rebuild.  [default: newest]")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help=".safetensors or .npz")
@click.option(
    "--executor", type=click.Choice(EXECUTORS), help="What repeats the updates.  [default: numba if it is installed]"
)
def replay(folder: Path, until: int | None, out: Path, executor: str | None) -> None:
    """Rebuild a version of the parameters, bit for bit, from the data folder DIR.

    Any version can be had that is not older than the oldest checkpoint in it. The folder may be in use by a broker; it
    is only read. The same bits are promised where the same executor of the same distgrad repeats the updates; if
    another one does, you are warned.
    """
    parameter_files.check_suffix(out)
    rebuilt = rebuild(OsDisk(), str(folder), until, executor=executor, on_progress=_progress())
    holder, recovered = rebuilt.holder, rebuilt.recovered
    try:
        for path, error in recovered.damaged:
            _warn(f"{path} is damaged, an older checkpoint was used: {error}")
        others = " and ".join(rebuilt.other_executors)
        if others:
            _warn(
                f"the updates were computed by {others} and repeated by {holder.executor}: bits may differ by rounding;"
                f" --executor names the one to use"
            )
        parameter_files.write(out, holder.nest(copy=False))
    finally:
        holder.close()
    began = "the beginning" if recovered.checkpoint is None else f"the checkpoint of version {recovered.checkpoint[1]}"
    computed = " and ".join(sorted(recovered.executors)) or "nothing"
    click.echo(
        f"wrote {out}: version {holder.version}, from {began} and {recovered.records} records; computed by {computed}"
    )


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every byte of the checkpoints, too; exit code 1 if any is damaged.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
@click.option(
    "--records", "n_records", type=click.IntRange(min=1), is_flag=False, flag_value=SHOWN_RECORDS, metavar="[N]",
    help=f"Show the last N records, {SHOWN_RECORDS} without a number.",
)  # fmt: skip
def journal(folder: Path, verify: bool, as_json: bool, n_records: int | None) -> None:
    """Show what the data folder DIR holds: segments, checkpoints, and what was recorded.

    The folder may be in use by a broker; it is only read. The exit code is 1 if something is damaged.
    """
    disk = OsDisk()
    found = survey(disk, DataFolder(disk, str(folder), read_only=True), verify=verify, keep_last=n_records or 0)
    if as_json:
        click.echo(json_line(_as_map(folder, found, verify)))
    elif n_records is not None:
        for record in found.last:
            click.echo(_line(record))
    else:
        for table in (_segments(found), _checkpoints(found), _statistics(found)):
            tables.print_whole(table)
        if verify and not found.damages:
            click.echo("verified: every byte of the journal and of the checkpoints is as it was written")
    if found.torn is not None and not as_json:
        _warn(f"the end of {found.torn.path} is torn at byte {found.torn.offset}: what was being written is not whole")
    for damage in found.damages:
        click.echo(f"damaged: {escape(damage.message)}", err=True)
    if found.damages:
        click.get_current_context().exit(REFUSED)


def _progress() -> Callable[[int, int], None]:
    told_at = time.monotonic()

    def tell(records: int, version: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= PROGRESS_S and sys.stderr.isatty():
            told_at = now
            click.echo(f"{records} records, version {version}", err=True)

    return tell


def _warn(text: str) -> None:
    click.echo(f"warning: {escape(text)}", err=True)


def _line(record: ShownRecord) -> str:
    fields = described.fields(record.told, record.payload_bytes)
    return escape(f"{record.sequence} {Event(record.told.kind, fields)}")


def _as_map(folder: Path, found: Survey, verify: bool) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "segments": [
            {
                "path": content.segment.path,
                "first": content.segment.first,
                "last": content.last,
                "size": content.segment.size,
                "end": content.end,
                "versions": content.versions,
            }
            for content in found.segments
        ],
        "checkpoints": [
            {"path": name.path, "sequence": name.sequence, "version": name.version, "size": size}
            for name, size in found.checkpoints
        ],
        "records": dict(found.kinds),
        "gradients": dict(found.workers),
        "outcomes": dict(found.outcomes),
        "payload_bytes": found.payload_bytes,
        "versions": found.versions,
        "incarnations": found.incarnations,
        "last": [
            {
                "sequence": record.sequence,
                "kind": record.told.kind,
                "fields": described.fields(record.told, record.payload_bytes),
            }
            for record in found.last
        ],
        "torn": None if found.torn is None else found.torn._asdict(),
        "verified": verify,
        "damaged": [damage._asdict() for damage in found.damages],
    }


def _segments(found: Survey) -> Table:
    rows = []
    for content in found.segments:
        segment = content.segment
        name, versions = Path(segment.path).name, _span(content.versions)
        rows.append([name, segment.first, content.last, versions, content.end, segment.size])
    return tables.of_rows("journal", ["file", "first", "last", "versions", "bytes", "of"], rows)


def _checkpoints(found: Survey) -> Table:
    rows = [[Path(name.path).name, name.sequence, name.version, size] for name, size in found.checkpoints]
    return tables.of_rows("checkpoints", ["file", "sequence", "version", "bytes"], rows)


def _statistics(found: Survey) -> Table:
    rows: list[tuple[str, object]] = [("versions", _span(found.versions)), ("payload bytes", found.payload_bytes)]
    rows += _prefixed("records", found.kinds)
    rows += _prefixed("gradients of", found.workers)
    rows += _prefixed("decisions", found.outcomes)
    rows += [
        (f"incarnation {begun['incarnation']}", f"{begun['executor']}, distgrad {begun['distgrad']}")
        for begun in found.incarnations
    ]
    return tables.of_pairs("recorded", rows)


def _prefixed(prefix: str, counts: Mapping[str, int]) -> Iterable[tuple[str, object]]:
    return ((f"{prefix} {name}", count) for name, count in sorted(counts.items()))


def _span(versions: tuple[int, int] | None) -> str | None:
    return None if versions is None else f"{versions[0]} to {versions[1]}"
