"""The user's function is found or its absence explained, runs with a worker that is closed, and its end gets a code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distgrad.command import BUG, DONE, INTERRUPTED, REFUSED, UNREACHABLE, USAGE
from distgrad.errors import (
    BrokerUnreachable,
    ConfigError,
    ControlError,
    Fenced,
    Forbidden,
    GradientRefused,
    HistoryLost,
    KeyFileError,
    LayoutError,
)
from distgrad_worker.runner import load_function, run, split_target

Write = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the user's module ``users_code`` into the current folder; return its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> str:
        (tmp_path / "users_code.py").write_text(code)
        return "users_code"

    yield write
    sys.modules.pop("users_code", None)


class FakeWorker:
    """Notes how it was closed, and can fail to close."""

    def __init__(self, error: Exception | None = None) -> None:
        self.ended_by: list[type[BaseException] | None] = []
        self.closed_within: list[float] = []
        self._error = error

    def close(self, timeout: float) -> None:
        self.closed_within.append(timeout)
        if self._error is not None:
            raise self._error

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        self.ended_by.append(kind)
        if self._error is not None and kind is None:
            raise self._error


def explain(target: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_function(target)
    return str(caught.value)


# Which function


@pytest.mark.parametrize(
    ("target", "parts"),
    [("worker:train", ("worker", "train")), ("a.b_1:C.run", ("a.b_1", "C.run")), ("größe:lerne", ("größe", "lerne"))],
)
def test_a_target_is_a_module_and_a_function(target: str, parts: tuple[str, str]) -> None:
    assert split_target(target) == parts


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("worker", "write for example worker:train"),
        ("worker.py:train", "write for example worker:train"),
        ("worker:", "write for example worker:train"),
        ("jobs/worker:fit", "write for example worker:fit in the folder jobs"),
        ("", "write for example train:train"),
        ("my-file:train", "write for example train:main"),
        ("a:b:c", "write for example train:main"),
    ],
)
def test_a_target_of_another_form_gets_an_example_of_the_right_one(target: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_target(target)

    assert str(caught.value).endswith(advice)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        "def train(worker): return 7",
        "def train(worker, epochs=3): return 7",
        "def train(*args): return 7",
        "train = lambda worker: 7",
        "class train:\n    def __new__(cls, worker): return 7",
    ],
)
def test_whatever_can_be_called_with_a_worker_is_a_function(module: Write, code: str) -> None:
    assert load_function(f"{module(code)}:train")(object()) == 7


def test_a_function_may_be_inside_a_class(module: Write) -> None:
    assert load_function(module("class Job:\n    run = staticmethod(lambda worker: 7)") + ":Job.run")(object()) == 7


@pytest.mark.parametrize("target", ["no_such_module:train", "no_such_module.inside:train"])
def test_a_missing_module_is_told_with_the_folder_that_was_looked_in(
    module: Write, target: str, tmp_path: Path
) -> None:
    message = explain(target)

    assert message.startswith(f"there is no module 'no_such_module' in {tmp_path}: run this in the folder")
    assert "\n" not in message


def test_a_missing_function_is_told_with_those_that_are_there(module: Write, tmp_path: Path) -> None:
    module("from os.path import join\ndef fit(worker): ...\ndef load(path): ...")

    assert explain("users_code:train") == f"{tmp_path / 'users_code.py'} has no 'train'; it defines fit, load"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def train(): ...", "write def train(worker)"),
        ("def train(worker, lr): ...", "is train(worker, lr); write def train(worker)"),
        ("async def train(worker): ...", "is async"),
        ("train = 3", "is int, not a function"),
        ("def train(worker)\n    pass", "users_code.py, line 1"),
        ("import no_such_library", "no module named 'no_such_library'; install it in"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_line_that_says_why(module: Write, code: str, words: str) -> None:
    message = explain(f"{module(code)}:train")

    assert words in message
    assert "\n" not in message


def test_an_error_while_importing_is_shown_from_the_users_first_line_on(module: Write) -> None:
    message = explain(module("def read():\n    raise ValueError('no data')\nread()") + ":train")

    assert message.startswith("importing users_code failed: ValueError: no data\nTraceback")
    assert message.count("users_code.py") == 2
    assert "runner.py" not in message
    assert "importlib" not in message


# How it ends


def test_the_function_gets_the_worker_and_the_worker_is_closed(module: Write) -> None:
    worker = FakeWorker()
    target = module("got = []\ntrain = got.append") + ":train"

    assert run(target, lambda: worker) == (DONE, None)
    assert sys.modules["users_code"].got == [worker]
    assert worker.ended_by == [None]


def test_a_worker_is_not_connected_for_a_function_that_is_missing(module: Write) -> None:
    def connect() -> Any:
        pytest.fail("connected")

    code, report = run("no_such_module:train", connect)

    assert code == USAGE
    assert report is not None
    assert report.for_all
    assert report.code == code


ENDS: list[tuple[BaseException, int]] = [
    (ValueError("a bug"), BUG),
    (LayoutError("leaf missing"), BUG),
    (GradientRefused("not_finite", "NaN in w"), REFUSED),
    (ControlError("invalid", "no"), REFUSED),
    (BrokerUnreachable("no answer"), UNREACHABLE),
]


@pytest.mark.parametrize(("error", "code"), ENDS, ids=lambda value: type(value).__name__)
def test_an_error_in_the_function_is_shown_and_another_attempt_may_be_better(
    module: Write, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    worker = FakeWorker()
    target = module("def train(worker): raise error") + ":train"
    load_function(target)
    vars(sys.modules["users_code"])["error"] = error

    assert run(target, lambda: worker) == (code, None)
    assert "in train" in capsys.readouterr().err
    assert worker.ended_by == [type(error)]


@pytest.mark.parametrize(
    "error", [Fenced("fenced", "taken"), Forbidden("forbidden", "no"), HistoryLost("lost", "gone")]
)
def test_an_error_that_another_attempt_would_repeat_is_reported_for_this_process_alone(
    module: Write, capsys: pytest.CaptureFixture[str], error: ControlError
) -> None:
    target = module("def train(worker): raise error") + ":train"
    load_function(target)
    vars(sys.modules["users_code"])["error"] = error

    code, report = run(target, FakeWorker)

    assert code == REFUSED
    assert report is not None
    assert (report.message, report.for_all) == (str(error), False)
    assert capsys.readouterr().err == "", "the supervisor says it"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BrokerUnreachable("no broker answers at tcp://127.0.0.1:5556"), UNREACHABLE),
        (ConfigError("bad address"), USAGE),
        (KeyFileError("loose"), USAGE),
        (ControlError("too_many_workers", "full"), REFUSED),
    ],
)
def test_a_worker_that_cannot_connect_is_reported_for_all(module: Write, error: Exception, code: int) -> None:
    def connect() -> Any:
        raise error

    ended, report = run(module("def train(worker): ...") + ":train", connect)

    assert ended == code
    assert report is not None
    assert (report.message, report.for_all) == (str(error), True)


def test_a_gradient_that_is_refused_in_the_last_flush_is_an_error(module: Write) -> None:
    worker = FakeWorker(GradientRefused("not_finite", "NaN in w"))

    assert run(module("def train(worker): ...") + ":train", lambda: worker) == (REFUSED, None)


def test_ctrl_c_delivers_what_was_pushed_without_a_traceback(module: Write, capsys: pytest.CaptureFixture[str]) -> None:
    worker = FakeWorker()

    code, report = run(module("def train(worker): raise KeyboardInterrupt") + ":train", lambda: worker)

    assert (code, report) == (INTERRUPTED, None)
    assert len(worker.closed_within) == 1
    assert worker.ended_by == [KeyboardInterrupt]
    assert capsys.readouterr().err == ""


def test_an_exit_of_the_function_passes_through_a_closed_worker(module: Write) -> None:
    worker = FakeWorker()

    with pytest.raises(SystemExit, match="4"):
        run(module("def train(worker): raise SystemExit(4)") + ":train", lambda: worker)

    assert len(worker.closed_within) == 1
    assert worker.ended_by == [SystemExit]


@pytest.mark.parametrize("error", [TimeoutError("2 are not settled"), GradientRefused("not_finite", "NaN in w")])
def test_what_a_stop_could_not_deliver_is_told_and_the_stop_goes_on(
    module: Write, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    code, _ = run(module("def train(worker): raise KeyboardInterrupt") + ":train", lambda: FakeWorker(error))

    assert code == INTERRUPTED
    assert capsys.readouterr().err == f"distgrad: stopped before everything was delivered: {error}\n"
