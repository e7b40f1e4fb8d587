"""Users' code is told what happens, and whatever it does, the broker goes on."""

from __future__ import annotations

import ast
import contextlib
import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import distgrad_broker
from distgrad.admin import Admin
from distgrad.errors import ConfigError, GradientRefused
from distgrad_broker import Broker
from distgrad_broker.events import HooksCounted, Log
from distgrad_broker.hooks import EVERY, HOOKS, Happening, Hooks, load
from distgrad_worker import Worker
from support.broker_process import broker_process, wait_until

START = {"w": np.zeros(2, np.float32)}
# Lines of the log that tell of the shell, or of nothing that happened.
NOT_TOLD = {"message rejected"}


def joined(worker: str = "a") -> Log:
    return Log(20, "worker joined", {"worker": worker})


class Told:
    """An object that keeps what it is told."""

    def __init__(self) -> None:
        self.happenings: queue.SimpleQueue[Happening] = queue.SimpleQueue()

    def on_event(self, happening: Happening) -> None:
        self.happenings.put(happening)

    def next(self, hook: str) -> Happening:
        while (happening := self.happenings.get(timeout=60)).hook != hook:
            pass
        return happening


def push_refused(worker: Worker, times: int = 1) -> None:
    """Push what is refused; a worker is told so by its next calls."""
    for _ in range(times):
        with contextlib.suppress(GradientRefused):
            worker.push({"w": np.full(2, np.nan, np.float32)})
    settle(worker)


def settle(worker: Worker) -> None:
    while True:
        with contextlib.suppress(GradientRefused):
            worker.flush(60)
            return


def test_what_happens_in_a_broker_is_told_in_order(tmp_path: Path) -> None:
    told = Told()
    with (
        Broker(parameters=START, hooks=told, data=tmp_path, workers_silent_after=0.3) as broker,
        Admin(broker.address) as admin,
    ):
        with Worker(broker.address, worker_id="a") as worker:
            worker.pull()
            assert told.next("on_worker_joined").fields["worker"] == "a"
            for _ in range(2):
                push_refused(worker)
                refused = told.next("on_refused")
                assert (refused.fields["worker"], refused.fields["reason"]) == ("a", "not_finite")
        assert told.next("on_worker_left").phrase == "worker left"
        admin.save()
        assert told.next("on_checkpoint").fields["path"]
        admin.stop()
        admin.start()
        assert told.next("on_stopped").at <= told.next("on_started").at
        wait_until(lambda: admin.status()["hooks"] is not None)
        assert (admin.status()["hooks"]["failed"], admin.status()["hooks"]["dropped"]) == (0, 0)
    assert told.next("on_shutting_down")


def test_a_hook_that_raises_is_counted_and_the_next_one_is_called() -> None:
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()

    def fail(happening: Happening) -> None:
        calls.put(happening.fields["worker"])
        raise SystemExit("even this")

    counts: queue.SimpleQueue[HooksCounted] = queue.SimpleQueue()
    hooks = Hooks(SimpleNamespace(on_worker_joined=fail), counts.put)
    for name in "abc":
        hooks.tell(joined(name))
    hooks.close()

    assert [calls.get(timeout=30) for _ in "abc"] == ["a", "b", "c"]
    assert [counts.get(timeout=30) for _ in "abc"][-1] == HooksCounted(3, 3, 0)


def test_a_hook_that_hangs_costs_what_does_not_fit_and_nothing_else() -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(happening: Happening) -> None:
        hangs.set()
        goes_on.wait()

    with Broker(parameters=START, hooks=SimpleNamespace(on_refused=hang)) as broker, Admin(broker.address) as admin:
        with Worker(broker.address) as worker:
            worker.pull()
            while not (admin.status()["hooks"] or {}).get("dropped"):
                push_refused(worker, 200)
            assert hangs.is_set()
            worker.push({"w": np.ones(2, np.float32)})
            settle(worker)
        assert admin.status()["version"] == 1, "the broker goes on"
        goes_on.set()


def test_nothing_is_queued_for_hooks_that_are_not_there() -> None:
    counts: list[HooksCounted] = []
    hooks = Hooks(SimpleNamespace(on_checkpoint=print), counts.append, max_waiting=1)
    for _ in range(5):
        hooks.tell(joined())
    hooks.close()

    assert counts == []


@pytest.mark.parametrize(
    ("target", "what"),
    [
        (SimpleNamespace(), "no hooks"),
        (SimpleNamespace(on_worker_lots=print), "unknown hooks: on_worker_lots"),
    ],
)
def test_an_object_that_would_never_be_called_is_refused(target: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Hooks(target, print)
    with pytest.raises(ConfigError, match=what):
        Broker(parameters=START, hooks=target).start()


def test_every_line_that_the_core_logs_has_a_hook() -> None:
    """Whoever adds an event decides here what it is called."""
    phrases = set()
    for path in Path(distgrad_broker.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_log = isinstance(node, ast.Call) and ast.unparse(node.func) == "state.log"
            if is_log and isinstance(node, ast.Call):
                phrases |= {n.value for n in ast.walk(node.args[1]) if isinstance(n, ast.Constant)}

    assert phrases == set(HOOKS) - NOT_TOLD
    page = (Path(__file__).parents[2] / "docs" / "seeing.md").read_text()
    assert [hook for hook in (*HOOKS.values(), EVERY) if f"`{hook}`" not in page] == []


def test_hooks_are_loaded_from_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "class Alerts:\n"
        "    def on_worker_joined(self, event):\n"
        "        open('told', 'a').write(event.fields['worker'])\n"
    )
    monkeypatch.chdir(tmp_path)
    with broker_process("--hooks", "mine:Alerts") as (address, _), Worker(address, worker_id="a") as worker:
        with Admin(address) as admin:
            admin.set_model_parameters(START)
        worker.pull()
        wait_until(lambda: (tmp_path / "told").exists() and (tmp_path / "told").read_text() == "a")


@pytest.mark.parametrize("target", ["no_such_module_here:x", "json:no_such_name", "", "json:JSONDecodeError"])
def test_hooks_that_cannot_be_loaded_say_why(target: str) -> None:
    with pytest.raises(ConfigError, match="cannot load the hooks"):
        load(target)
