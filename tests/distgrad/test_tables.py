"""Tables fit on a terminal, or are printed whole; nothing in them steers it."""

from __future__ import annotations

import pytest
from rich.console import Console

from distgrad import tables

WORKER = {
    "id": "worker-c7ca4e9125d8",
    "state": "silent",
    "session": "748f6967d8a17237:1",
    "accepted": 1234567,
    "applied": 1234567,
    "superseded": 12,
    "refused": 0,
    "queued_bytes": 123456,
    "staleness": 3,
    "loss": 0.0123456,
    "last_seen_s": 0.92345,
    "user": None,
}
NAME = "checkpoint-00000000000000000209-200.safetensors"


def test_the_first_columns_of_workers_fit_on_80_columns_and_break_no_number() -> None:
    console = Console(width=80, record=True)
    console.print(tables.of_workers([WORKER, WORKER | {"loss": float("nan")}], with_all=False))
    text = console.export_text()

    assert all(len(line) <= 80 for line in text.splitlines())
    for part in (
        "id",
        "state",
        "superseded",
        "staleness",
        "seen",
        "1234567",
        "123456",
        "silent",
        "0.0123",
        "0.9s",
        "nan",
    ):
        assert part in text.split()


@pytest.mark.parametrize("columns", ["30", "80"])
def test_a_whole_table_breaks_no_name(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    tables.print_whole(tables.of_rows("checkpoints", ["file", "sequence"], [[NAME, 10**12]]))

    assert [NAME, str(10**12)] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_what_goes_into_a_pipe_is_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    tables.print_fitted(tables.of_workers([WORKER], with_all=False))

    assert len(capsys.readouterr().out.splitlines()) == 2


def test_all_that_is_known_of_workers(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_whole(tables.of_workers([WORKER, {"id": "two", "new": 1}], with_all=True))
    head, one, two = [line.split() for line in capsys.readouterr().out.splitlines()]

    assert head == [*WORKER, "new"]
    assert one[2] == WORKER["session"]
    assert (two[0], two[1], two[-1]) == ("two", "-", "1")


def test_nothing_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[2J[red]x\r\n"
    tables.print_whole(tables.of_rows(hostile.strip(), [hostile], [[hostile]]))
    tables.print_whole(tables.of_pairs("told", {hostile: {hostile: hostile}}))
    out = capsys.readouterr().out

    assert "\x1b" not in out
    assert "\\x1b[2J[red]x\\r\\n" in out
