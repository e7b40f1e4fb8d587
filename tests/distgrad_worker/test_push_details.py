"""What is pushed beside a gradient: what cannot be is refused at the call, and ends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distgrad.errors import ConfigError
from distgrad.wire import State
from distgrad_broker import Broker
from distgrad_worker import Worker

ONES = {"w": np.ones(3, np.float32)}


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Broker(parameters={"w": np.zeros(3, np.float32)}) as broker, Worker(broker.address, timeout=20) as connected:
        yield connected


@pytest.mark.parametrize("cursor", [5, bytes(4097), "x" * 4097, ["a"], "file\udcff.txt"])
def test_an_impossible_cursor_is_refused(worker: Worker, cursor: Any) -> None:
    with pytest.raises(ConfigError, match="cursor"):
        worker.push(ONES, cursor=cursor)


@pytest.mark.parametrize("examples", [-1, 2**63])
def test_impossible_examples_are_refused(examples: int, worker: Worker) -> None:
    with pytest.raises(ConfigError, match="examples"):
        worker.push(ONES, examples=examples)

    worker.push(ONES)
    worker.flush()


@pytest.mark.parametrize("base", [-1, 2**63, State("i", -1, 0), State("i", 0, 2**63)])
def test_a_version_that_cannot_be_is_refused_and_ends_nothing(base: int | State, worker: Worker) -> None:
    worker.pull()
    with pytest.raises(ConfigError, match="version"):
        worker.push(ONES, base_version=base)

    worker.push(ONES)
    worker.flush()
