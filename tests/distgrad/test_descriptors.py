"""Descriptors are kept back for files: in a process that asked for it, and for no longer than an opening takes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

import pytest

from distgrad import descriptors
from distgrad.descriptors import keep_spare, with_spare
from support.gates import Gate, Running

INFINITY = -1


class Limits:
    """Stands for the module `resource`.

    Parameters
    ----------
    hard : int
        The hard limit; the soft one is 10.
    highest : int
        What the system takes at most, whatever the hard limit says.
    """

    RLIMIT_NOFILE, RLIM_INFINITY = "files", INFINITY

    def __init__(self, hard: int, highest: int = 1 << 30) -> None:
        self.soft, self.hard, self.highest = 10, hard, highest

    def getrlimit(self, which: str) -> tuple[int, int]:
        assert which == "files"
        return self.soft, self.hard

    def setrlimit(self, which: str, limits: tuple[int, int]) -> None:
        assert which == "files"
        if limits[0] > self.highest or limits[1] != self.hard:
            raise ValueError("not allowed to raise maximum limit")
        self.soft = limits[0]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process, whose limits are not changed, not remember what the tests do."""
    monkeypatch.setattr(descriptors, "_limit", descriptors._Limit())


def limits(monkeypatch: pytest.MonkeyPatch, *arguments: int) -> Limits:
    made = Limits(*arguments)
    monkeypatch.setitem(sys.modules, "resource", made)
    return made


@pytest.mark.parametrize(
    ("hard", "highest", "soft"),
    [
        (1000, 1 << 30, 936),
        (100, 1 << 30, 75),
        (INFINITY, 1 << 30, (1 << 20) - 64),
        (INFINITY, 50_000, 10_240 - 64),
        (INFINITY, 5_000, 10),
        (1000, 5, 10),
    ],
)
def test_the_limit_is_raised_as_far_as_the_system_lets_it(
    monkeypatch: pytest.MonkeyPatch, hard: int, highest: int, soft: int
) -> None:
    made = limits(monkeypatch, hard, highest)

    keep_spare()

    assert made.soft == soft


def test_where_there_is_no_such_limit_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)

    keep_spare()

    assert with_spare(lambda: "opened") == "opened"


def test_where_limits_cannot_even_be_asked_for_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = limits(monkeypatch, 1000)

    def filtered(which: str) -> tuple[int, int]:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(made, "getrlimit", filtered)

    keep_spare()

    assert made.soft == 10


def crowded(made: Limits, at: int, seen: list[int]) -> str:
    seen.append(made.soft)
    if made.soft <= at:
        raise OSError(errno.EMFILE, "Too many open files")
    return "opened"


def test_who_finds_none_left_has_the_spare_ones_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = limits(monkeypatch, 1000), list[int]()
    keep_spare()

    assert with_spare(lambda: crowded(made, 936, seen)) == "opened"
    assert (seen, made.soft) == ([936, 1000], 936)
    with pytest.raises(OSError, match="Too many"):
        with_spare(lambda: crowded(made, 1000, seen))
    assert made.soft == 936


def test_the_limit_goes_down_when_the_last_of_several_has_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    made = limits(monkeypatch, 1000)
    keep_spare()
    gates = [Gate(lambda: None) for _ in range(2)]

    def opening(gate: Gate) -> None:
        if made.soft < 1000 or not gate_was_tried.pop(gate, False):
            gate_was_tried[gate] = True
            raise OSError(errno.EMFILE, "Too many open files")
        gate()

    gate_was_tried: dict[Gate, bool] = {}
    running = [Running(lambda gate=gate: with_spare(lambda: opening(gate))) for gate in gates]  # type: ignore[misc]
    for gate in gates:
        gate.wait_for_arrival()

    gates[0].open()
    running[0].result()
    assert made.soft == 1000
    gates[1].open()
    running[1].result()
    assert made.soft == 936


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENFILE])
def test_other_errors_are_the_callers(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    made = limits(monkeypatch, 1000)
    keep_spare()
    tries: list[int] = []

    def fail() -> Any:
        tries.append(made.soft)
        raise OSError(number, "no")

    with pytest.raises(OSError, match="no"):
        with_spare(fail)
    assert tries == [936]


def test_a_limit_that_was_lowered_by_others_is_no_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = limits(monkeypatch, 1000), list[int]()
    keep_spare()
    made.highest = 500

    with pytest.raises(OSError, match="Too many"):
        with_spare(lambda: crowded(made, 936, seen))


FILL = """
import os, resource, sys
from distgrad.descriptors import keep_spare, with_spare

resource.setrlimit(resource.RLIMIT_NOFILE, (40, 100))
if sys.argv[1:] == ["keep"]:
    keep_spare()
opened = []
try:
    while True:
        opened.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    print(max(opened) + 1)
try:
    print(with_spare(lambda: os.open(os.devnull, os.O_RDONLY)))
except OSError as error:
    print(error.strerror)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("keep",), ["75", "75", "75 100"]), ((), ["40", "Too many open files", "40 100"])],
    ids=["keeps", "does not"],
)
def test_a_process_that_keeps_none_back_is_left_alone(arguments: tuple[str, ...], expected: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", FILL, *arguments], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == expected
