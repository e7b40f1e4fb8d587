"""The terminal's view of a broker: a table of workers, curves, and keys that control it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Label, Sparkline, Static

from distgrad.errors import DistgradError
from distgrad.seeing import words
from distgrad.seeing.history import Sight
from distgrad.seeing.watcher import Watcher

COLUMNS = (
    "worker",
    "state",
    "rate/s",
    "staleness",
    "last loss",
    "last seen",
    "bytes",
    "accepted",
    "settled",
    "repeated",
    "refused",
)
# What a stop waits for the queue to drain before it says that it goes on doing so.
DRAIN_WITHIN_S = 3.0


class Confirm(ModalScreen[bool]):
    """Asks whether to go on.

    Parameters
    ----------
    question : str
        To be answered with y or n.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,q", "answer(False)", "no"),
    ]
    CSS = """
    Confirm { align: center middle; }
    Confirm > Label { border: round $warning; padding: 1 2; background: $surface; }
    """

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """Show the question.

        Yields
        ------
        Widget
            One label.
        """
        yield Label(Text(f"{self._question}   y / n"))

    def action_answer(self, answer: bool) -> None:
        """Close with an answer.

        Parameters
        ----------
        answer : bool
            Whether to go on.
        """
        self.dismiss(answer)


class Top(App[None]):
    """``distgrad top``.

    Parameters
    ----------
    watcher : Watcher
        Asks the broker; closed by who made it.
    every_s : float, seconds
        Between two looks.
    """

    TITLE = "distgrad top"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "start", "start"),
        Binding("p", "stop", "stop"),
        Binding("c", "save", "checkpoint"),
        Binding("e", "evict", "evict"),
        Binding("q", "quit", "quit"),
    ]
    CSS = """
    #head, #numbers, #disk { height: auto; padding: 0 1; }
    #curves { height: 6; }
    #curves > Vertical { padding: 0 1; }
    Sparkline { height: 1fr; }
    #workers { height: 1fr; }
    #message { height: auto; padding: 0 1; }
    """

    def __init__(self, watcher: Watcher, every_s: float = 1.0) -> None:
        super().__init__()
        self._watcher = watcher
        self._every_s = every_s
        # Looks may end while a question covers the screen, or while the screen is taken down: nothing is searched then.
        self._head, self._numbers, self._disk, self._message = (
            Static(id=name) for name in ("head", "numbers", "disk", "message")
        )
        self._now = {name: Static(name) for name in ("rate", "loss")}
        self._curves = {name: Sparkline([], id=name, summary_function=max) for name in self._now}
        self._workers_table: DataTable[Text] = DataTable(id="workers", cursor_type="row")

    def compose(self) -> ComposeResult:
        """Lay out the screen.

        Yields
        ------
        Widget
            From top to bottom.
        """
        yield self._head
        yield self._numbers
        with Horizontal(id="curves"):
            for name, now in self._now.items():
                with Vertical():
                    yield now
                    yield self._curves[name]
        yield self._workers_table
        yield self._disk
        yield self._message
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        table = self._workers_table
        for column in COLUMNS:
            table.add_column(column, key=column)
        table.focus()
        self._show(self._watcher.history.sight)
        self._look()
        self.set_interval(self._every_s, self._look)

    def _look(self) -> None:
        self.run_worker(self._look_once, thread=True, group="look", exclusive=True)

    def _look_once(self) -> None:
        try:
            sight = self._watcher.look()
        except DistgradError as error:
            self._later(self._say, f"the broker refuses: {error}")
        else:
            self._later(self._show, sight)

    def _later(self, show: Callable[[Any], None], what: Any) -> None:
        """Have something shown by the thread that owns the screen, unless that has ended by now."""
        with contextlib.suppress(RuntimeError):
            self.call_from_thread(show, what)

    def _show(self, sight: Sight) -> None:
        """Put a look on the screen; text of peers is shown as it is, never read as markup."""
        status, points = sight.status, list(self._watcher.history.points)
        self._head.update(_head(self._watcher.address, sight))
        if not status:
            return
        self._numbers.update(Text(words.numbers(status, sight.workers)))
        self._disk.update(Text(words.disk(status)))
        for name, values in (("rate", [p.rate for p in points]), ("loss", [p.loss for p in points])):
            known = [value for value in values if value is not None]
            now = words.decimal(known[-1]) if known else "-"
            self._now[name].update(Text(f"{name} {now}" + (" gradients/s" if name == "rate" else "")))
            self._curves[name].data = known
        self._show_workers(sight)

    def _show_workers(self, sight: Sight) -> None:
        table = self._workers_table
        known = {key.value for key in table.rows}
        for worker in sight.workers:
            cells = _cells(worker)
            if worker["id"] not in known:
                table.add_row(*cells, key=worker["id"])
                continue
            known.discard(worker["id"])
            for column, cell in zip(COLUMNS, cells, strict=True):
                table.update_cell(worker["id"], column, cell, update_width=True)  # numbers grow
        for gone in known:
            if gone is not None:
                table.remove_row(gone)

    def _say(self, text: str) -> None:
        self._message.update(Text(text))

    def _do(self, what: Callable[[], str]) -> None:
        """Carry out a command on a thread, and say what came of it."""

        def carry_out() -> None:
            try:
                said = what()
            except (DistgradError, TimeoutError) as error:
                said = f"error: {error}"
            self._later(self._say, said)
            self._look_once()

        self.run_worker(carry_out, thread=True, group="do")

    def action_start(self) -> None:
        """Let the broker apply gradients."""
        self._do(lambda: "started" if self._watcher.admin.start() else "was running already")

    def action_stop(self) -> None:
        """Stop applying, after what is queued."""
        self._do(lambda: "stopped" if self._watcher.admin.stop(timeout=DRAIN_WITHIN_S) else "was stopped already")

    def action_save(self) -> None:
        """Have the parameters, or a checkpoint, written."""
        self._do(lambda: f"saved to {self._watcher.admin.save()}")

    def action_evict(self) -> None:
        """Evict the worker under the cursor, once that is confirmed."""
        table = self._workers_table
        if not table.row_count:
            self._say("there is no worker to evict")
            return
        worker = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
        assert worker is not None  # every row has a key

        def evict() -> str:
            self._watcher.admin.evict(worker)
            return f"evicted {worker}"

        def answered(is_sure: bool | None) -> None:
            if is_sure:
                self._do(evict)

        self.push_screen(Confirm(f"End the process of worker {worker}?"), answered)


def _head(address: str, sight: Sight) -> Text:
    text = Text(f"broker {address}  ")
    if sight.error:
        text.append(f"NO ANSWER: {sight.error}", "bold red")
    elif sight.status:
        is_running = sight.status["running"]
        text.append("running" if is_running else "STOPPED", "bold green" if is_running else "bold yellow")
        text.append(f"  {words.policy(sight.status)}")
    return text


def _cells(worker: Mapping[str, Any]) -> list[Text]:
    colour = {"live": "green", "silent": "bold red"}.get(worker["state"], "dim")
    cells = [Text(worker["id"]), Text(words.state(worker), colour)]
    return cells + [Text(cell, justify="right") for cell in words.worker(worker)]
