"""The terminal's view, driven by key presses, of a real broker with a real worker."""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from distgrad.admin import Admin
from distgrad.errors import Fenced
from distgrad.seeing.watcher import Watcher
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.processes import Process

pytest.importorskip("textual", reason="needs the extra `top`: textual")

from textual.pilot import Pilot
from textual.widgets import DataTable, Sparkline, Static

from distgrad.seeing.top import COLUMNS, Top

# Where somebody wants the pictures of the documentation made anew.
PICTURES = os.environ.get("PICTURES")
NOISE = np.random.default_rng(0)
VICTIM = """
import signal, sys
import numpy as np
from distgrad_worker import Worker

with Worker(sys.argv[1], worker_id="victim") as worker:
    worker.pull()
    worker.push({"w": np.zeros(1000, np.float32)})
    worker.flush(30)
    print("settled", flush=True)
    signal.pause()
"""
Drive = Callable[[Top, Pilot[None]], Awaitable[None]]


def driven(broker: Broker, drive: Drive, every_s: float = 0.05, size: tuple[int, int] = (150, 40)) -> None:
    async def run() -> None:
        app = Top(watcher, every_s)
        async with app.run_test(size=size) as pilot:
            await drive(app, pilot)

    with Watcher(broker.address) as watcher:
        asyncio.run(run())


def go_on(worker: Worker) -> None:
    """Push until the worker is told, with its next sign of life, that it may not."""
    while True:
        worker.push({"w": np.ones(2, np.float32)})
        worker.flush(30)


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    while not condition():
        await pilot.pause(0.01)


def text(app: Top, name: str) -> str:
    return str(app.screen_stack[0].query_one(f"#{name}", Static).render())


def cells(app: Top, worker: str) -> dict[str, str]:
    row = app.screen_stack[0].query_one("#workers", DataTable).get_row(worker)
    return {column: str(cell) for column, cell in zip(COLUMNS, row, strict=True)}


def test_it_shows_who_works_how_fast_and_that_nothing_is_lost() -> None:
    with Broker(parameters={"w": np.zeros(2, np.float32)}) as broker, Worker(broker.address, worker_id="a") as worker:

        async def drive(app: Top, pilot: Pilot[None]) -> None:
            await until(pilot, lambda: bool(app.screen_stack[0].query_one("#workers", DataTable).row_count))
            worker.pull()
            for loss in (3.0, 2.0, 1.0):
                worker.push({"w": np.ones(2, np.float32)}, loss=loss)
                await asyncio.to_thread(worker.flush, 30)
                await until(pilot, lambda loss=loss: cells(app, "a")["last loss"] == f"{loss:g}")  # type: ignore[misc]
            await until(pilot, lambda: len(list(app.query_one("#loss", Sparkline).data or [])) >= 2)

            assert cells(app, "a")["state"] == "● live"
            assert (cells(app, "a")["accepted"], cells(app, "a")["settled"]) == ("3", "3")
            assert cells(app, "a")["staleness"] == "2"
            assert "accepted 3 / settled 3 / repeated 0 / refused 0 / lost: 0" in text(app, "numbers")
            assert "running" in text(app, "head")
            assert "policy async" in text(app, "head")
            assert "no data folder" in text(app, "disk")

        driven(broker, drive)


def test_keys_stop_start_and_save(tmp_path: Path) -> None:
    saved = tmp_path / "model.npz"
    with Broker(parameters={"w": np.zeros(2, np.float32)}, save=saved) as broker:

        async def drive(app: Top, pilot: Pilot[None]) -> None:
            await pilot.press("p")
            await until(pilot, lambda: "STOPPED" in text(app, "head"))
            await until(pilot, lambda: text(app, "message") == "stopped")
            await pilot.press("s")
            await until(pilot, lambda: text(app, "message") == "started")
            await until(pilot, lambda: "running" in text(app, "head"))
            await pilot.press("c")
            await until(pilot, lambda: text(app, "message") == f"saved to {saved}")
            await pilot.press("q")

        driven(broker, drive)
    assert saved.exists()


def test_a_worker_is_evicted_only_after_a_yes() -> None:
    with (
        Broker(parameters={"w": np.zeros(2, np.float32)}) as broker,
        contextlib.suppress(Fenced),
        Worker(broker.address, worker_id="a") as worker,
    ):  # closing it raises once more what it was told
        worker.pull()

        async def drive(app: Top, pilot: Pilot[None]) -> None:
            await until(pilot, lambda: bool(app.screen_stack[0].query_one("#workers", DataTable).row_count))
            await pilot.press("e")
            await until(pilot, lambda: len(app.screen_stack) == 2)
            await pilot.press("n")
            await until(pilot, lambda: len(app.screen_stack) == 1)
            assert cells(app, "a")["state"] == "● live"
            await pilot.press("e", "y")
            await until(pilot, lambda: text(app, "message") == "evicted a")
            await until(pilot, lambda: cells(app, "a")["state"] == "▲ lost")

        driven(broker, drive)
        with pytest.raises(Fenced, match="evicted"):
            go_on(worker)


def test_it_says_when_the_broker_is_gone_and_that_a_command_failed() -> None:
    broker = Broker(parameters={"w": np.zeros(2, np.float32)})
    broker.start()

    async def drive(app: Top, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "running" in text(app, "head"))
        await pilot.press("c")
        await until(pilot, lambda: text(app, "message").startswith("error: "))
        with Admin(broker.address) as admin:
            await asyncio.to_thread(admin.destroy)
        await until(pilot, lambda: "NO ANSWER" in text(app, "head"))

    driven(broker, drive)
    broker.close()


def test_text_of_peers_is_shown_as_it_is() -> None:
    with (
        Broker(parameters={"w": np.zeros(2)}) as broker,
        Worker(broker.address, worker_id="[red]a[/]") as worker,
    ):
        worker.pull()

        async def drive(app: Top, pilot: Pilot[None]) -> None:
            await until(pilot, lambda: bool(app.screen_stack[0].query_one("#workers", DataTable).row_count))
            assert cells(app, "[red]a[/]")["worker"] == "[red]a[/]"

        driven(broker, drive)


def test_its_picture_shows_curves_and_a_worker_that_was_killed() -> None:
    """The picture of the documentation is made anew by ``PICTURES=docs/images`` and this test."""
    start = {"w": np.full(1000, 2.0, np.float32)}
    with (
        Broker(parameters=start, workers_silent_after=2.0) as broker,
        Worker(broker.address, worker_id="steady") as steady,
        Worker(broker.address, worker_id="quick") as quick,
        Process(broker.address, program=(sys.executable, "-c", VICTIM)) as victim,
    ):

        def learn() -> None:
            for worker in (quick, steady, quick):
                w = worker.pull().parameters["w"]
                worker.push(
                    {"w": 0.004 * w + NOISE.normal(0, 0.002, 1000).astype(np.float32)}, loss=float((w**2).mean())
                )
                worker.flush(30)

        async def drive(app: Top, pilot: Pilot[None]) -> None:
            victim.wait_for_line("settled")
            victim.kill()
            await until(pilot, lambda: app.screen_stack[0].query_one("#workers", DataTable).row_count == 3)
            while cells(app, "victim")["state"] != "▲ lost" or len(list(app.query_one("#loss", Sparkline).data)) < 50:  # type: ignore[arg-type]
                await asyncio.to_thread(learn)
            await pilot.pause()
            # Letters of the reader's machine, not of somebody's server.
            picture = re.sub(r"@font-face {.*?}\s*", "", app.export_screenshot(), flags=re.DOTALL)

            assert re.findall(r"https?://(?!www\.w3\.org/)[^\"<]*", re.sub("<!--.*?-->", "", picture)) == []
            shown = html.unescape(re.sub("<[^>]+>", "", picture)).replace("\xa0", " ")
            told = ("▲ lost", " KiB ", "● live", "lost: 0", "loss ", "stop", "evict")
            assert [words for words in told if words not in shown] == [], shown
            if PICTURES:
                (Path(PICTURES) / "top.svg").write_text(picture)

        driven(broker, drive, 0.1, size=(110, 22))
