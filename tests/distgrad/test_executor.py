"""Who runs the kernels, and on how many threads."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest

from distgrad import blocked, executor
from distgrad.errors import ConfigError
from distgrad.executor import Executor


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_an_impossible_number_of_threads_is_refused(threads: object) -> None:
    with pytest.raises(ConfigError, match="threads must be an integer of at least 1"):
        Executor(threads)  # type: ignore[arg-type]


def test_an_unknown_executor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="one of numba, numpy, got 'torch'"):
        Executor(kind="torch")


def test_numpy_is_chosen_where_numba_is_missing_and_asking_for_numba_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "distgrad.kernels", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)

    chosen = Executor()
    assert chosen.kind == "numpy"
    assert chosen.kernel("step", np.dtype("float32")).beside is blocked.kernel("step", np.dtype("float32")).beside
    with pytest.raises(ConfigError, match=r"pip install '\.\[fast\]'"):
        _ = Executor(kind="numba").kind


def test_numba_is_chosen_where_it_is_installed_but_float16_runs_on_numpy() -> None:
    pytest.importorskip("numba")
    chosen = Executor()

    assert chosen.kind == "numba"
    assert chosen.kernel("step", np.dtype("float32")).compiled
    assert not chosen.kernel("step", np.dtype("float16")).compiled


def test_only_large_updates_of_compiled_kernels_are_split() -> None:
    compiled = blocked.kernel("step", np.dtype("float32"))._replace(compiled=True)

    assert Executor(2).splits(compiled, executor.SPLIT_BYTES)
    assert not Executor(2).splits(compiled, executor.SPLIT_BYTES - 1)
    assert not Executor(1).splits(compiled, executor.SPLIT_BYTES)
    assert not Executor(2).splits(compiled._replace(compiled=False), executor.SPLIT_BYTES)


def test_threads_share_the_calls_and_each_is_made_once() -> None:
    both_here = threading.Barrier(2, timeout=10)
    seen: list[tuple[int, int]] = []
    pool = Executor(2)

    def call(number: int) -> int:
        if number < 2:
            both_here.wait()  # passes only if two threads are at work
        seen.append((number, threading.get_ident()))
        return number

    worst = pool.run(call, [(number,) for number in range(20)], split=True)
    pool.close()

    assert worst == 19
    assert sorted(number for number, _ in seen) == list(range(20))
    assert len({thread for _, thread in seen}) == 2


def test_threads_stay_for_the_next_update_and_close_ends_them() -> None:
    pool = Executor(2)
    for _ in range(3):
        pool.run(lambda number: number, [(1,), (2,)], split=True)
    alive = [thread for thread in threading.enumerate() if thread.name.startswith("distgrad-kernel")]

    pool.close()
    pool.close()

    assert len(alive) == 1
    assert not any(thread.is_alive() for thread in alive)
    assert pool.run(lambda number: number, [(1,), (2,)], split=True) == 2
    pool.close()


def test_an_error_in_a_call_is_raised_after_all_threads_have_ended() -> None:
    pool = Executor(2)
    started, release = threading.Event(), threading.Event()
    finished: list[int] = []

    def call(number: int) -> int:
        if number == 0:
            started.wait(10)
            release.set()
            raise ValueError("a bug")
        started.set()
        release.wait(10)
        finished.append(number)
        return 0

    with pytest.raises(ValueError, match="a bug"):
        pool.run(call, [(0,), (1,)], split=True)
    pool.close()

    assert finished == [1]


def test_nothing_to_call_is_fine() -> None:
    assert Executor(2).run(lambda: 1, [], split=True) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    pool = Executor(2)
    pool.run(lambda number: number, [(1,), (2,)], split=True)

    child = os.fork()
    if child == 0:
        os._exit(pool.run(lambda number: number, [(1,), (2,)], split=True))
    _, status = os.waitpid(child, 0)
    pool.close()

    assert os.waitstatus_to_exitcode(status) == 2
