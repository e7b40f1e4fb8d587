"""What `Worker.pull` gives over TCP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad_broker import Broker
from distgrad_worker import Worker


@pytest.mark.parametrize("arguments", [{}, {"copy": False}])
def test_large_parameters_stay_where_they_were_received_and_are_the_callers_own(arguments: dict[str, Any]) -> None:
    with (
        Broker(parameters=np.zeros(100_000, np.float32)) as broker,
        Worker(broker.address, shares_memory=False) as worker,
    ):
        first = worker.pull(**arguments)
        worker.push(np.ones(100_000, np.float32))
        second = worker.pull(own=True, **arguments)

        assert type(second.arenas[0].base).__name__ == "memoryview"
        assert (first.parameters.max(), second.parameters.max()) == (0, -1)
        second.parameters[:] = 9
        assert worker.pull(out=first).parameters is not None
        assert first.parameters.max() == -1
        assert not first.is_lent
