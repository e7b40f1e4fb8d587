"""The tables that commands print: nothing in them steers the terminal, and no name is broken where it can be helped."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from distgrad.json_line import json_line
from distgrad.log import escape

# Wide enough for every table: what is not a terminal has no width.
_ANY_WIDTH = 100_000

# What a person asks first of a worker, with the broker's name for it; the rest is there with `--all`.
_FIRST = {
    "id": "id",
    "state": "state",
    "applied": "applied",
    "superseded": "superseded",
    "refused": "refused",
    "queued": "queued_bytes",
    "staleness": "staleness",
    "loss": "loss",
    "seen": "last_seen_s",
}


def shown(value: Any) -> str:
    """Write a value from a peer without letting it move the cursor or colour the terminal.

    Parameters
    ----------
    value : object
        As msgpack gives it.

    Returns
    -------
    str
        One line; ``-`` for None.
    """
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, Mapping | list | tuple | bytes):
        text = json_line(value)
    else:
        text = "-" if value is None else str(value)
    return escape(text)


def of_pairs(title: str, pairs: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> Table:
    """Make a table of names and values.

    Parameters
    ----------
    title : str
        Above it.
    pairs : mapping, or sequence of tuple
        What is in an inner mapping gets a row for each of its entries, named ``outer.inner``.

    Returns
    -------
    rich.table.Table
        Long values are folded.
    """
    table = Table(title=Text(escape(title)), title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(dict(pairs)):
        table.add_row(Text(key), Text(value))
    return table


def of_rows(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Make a table whose first column names things, and whose others are numbers.

    Parameters
    ----------
    title : str, optional
        Above it.
    columns : sequence of str
        The columns' names.
    rows : sequence of sequence
        What stands in them.

    Returns
    -------
    rich.table.Table
        Without lines, which would take the room of a column.
    """
    above = None if title is None else Text(escape(title))
    table = Table(title=above, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        # Only names are folded, and only where the terminal leaves no choice: half a number is a wrong number.
        table.add_column(Text(shown(column)), overflow="fold", no_wrap=place > 0, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(Text(shown(value)) for value in row))
    return table


def of_workers(rows: Sequence[Mapping[str, Any]], *, with_all: bool) -> Table:
    """Make the table of workers.

    Parameters
    ----------
    rows : sequence of mapping
        As `distgrad.Admin.workers` gives them.
    with_all : bool
        Everything that is known; else what fits on a terminal.

    Returns
    -------
    rich.table.Table
        One row for each.
    """
    if with_all:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        return of_rows(None, keys, [[row.get(key) for key in keys] for row in rows])
    return of_rows(None, list(_FIRST), [[_short(key, row.get(key)) for key in _FIRST.values()] for row in rows])


def print_whole(table: Table) -> None:
    """Print a table without breaking anything in it, however narrow the terminal is: that folds lines itself.

    Parameters
    ----------
    table : rich.table.Table
        The table.
    """
    console = Console()
    widest = Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum
    console.width = max(console.width, widest)
    console.print(table)


def print_fitted(table: Table) -> None:
    """Print a table as wide as the terminal; whole into a file or a pipe, where nobody folds names back.

    Parameters
    ----------
    table : rich.table.Table
        The table.
    """
    if sys.stdout.isatty():
        Console().print(table)
    else:
        print_whole(table)


def _short(key: str, value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.1f}s" if key == "last_seen_s" else f"{value:.3g}"
    return value


def _rows(pairs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in pairs.items():
        if isinstance(value, Mapping) and value:
            yield from _rows(value, f"{prefix}{shown(key)}.")
        else:
            yield prefix + shown(key), shown(value)
