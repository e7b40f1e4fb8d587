"""Tests of `distgrad_broker.files`."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distgrad.layout import Layout
from distgrad.parameter_files import as_nest, read
from distgrad_broker import files
from distgrad_broker.events import SaveEnded, SaveParameters
from distgrad_broker.files import FileThread

NEST = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array([3])}
LAYOUT = Layout.of(NEST)


def job(ticket: int) -> SaveParameters:
    return SaveParameters(ticket, LAYOUT, LAYOUT.pack(NEST), 7)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_save_is_written_and_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    thread = FileThread(str(path), ended.put)

    thread.save(job(3))

    assert ended.get(timeout=20) == SaveEnded(3, str(path), None)
    thread.close()
    written = as_nest(read(path))
    np.testing.assert_array_equal(written["w"], NEST["w"])
    np.testing.assert_array_equal(written["n"], NEST["n"])


def test_what_goes_wrong_is_told_and_the_thread_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    thread = FileThread(str(folder / "w.npz"), ended.put)

    thread.save(job(1))
    error = ended.get(timeout=20).error
    assert error is not None
    assert "later" in error
    folder.mkdir()
    thread.save(job(2))
    assert ended.get(timeout=20).error is None
    thread.close()


def test_close_ends_the_thread_after_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    ended: list[Any] = []

    def slow_write(_path: str, _nest: object) -> None:
        gate.wait(20)

    monkeypatch.setattr(files, "write", slow_write)
    thread = FileThread(str(tmp_path / "w.npz"), ended.append)
    thread.save(job(1))
    closing = threading.Thread(target=thread.close)
    closing.start()
    assert ended == []
    gate.set()
    closing.join()

    assert [save.ticket for save in ended] == [1]


def test_a_thread_that_was_never_needed_is_never_started(tmp_path: Path) -> None:
    thread = FileThread(str(tmp_path / "w.npz"), lambda _: None)

    thread.close()
    thread.close()


def test_without_a_path_nothing_is_written() -> None:
    assert FileThread(None, lambda _: None).write_now(job(1)) == "no file was named"
