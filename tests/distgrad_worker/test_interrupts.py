"""Ctrl-C in the middle of a training loop, as in a notebook: afterwards the same worker goes on, and all is counted."""

from __future__ import annotations

import numpy as np
import pytest

from distgrad import Admin, DistributedGradients
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.gates import Running
from support.interrupts import interrupt_often

# Where an interrupt comes is chance, and some places are Python's own.
pytestmark = pytest.mark.slow


# A Ctrl-C that comes within a destructor of pyzmq is swallowed there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("in_slot", [False, True])
def test_whenever_a_worker_is_interrupted_it_goes_on(in_slot: bool) -> None:
    ones = {"w": np.ones(1000, np.float32)}
    with Broker(parameters={"w": np.zeros(1000, np.float32)}) as broker, Admin(broker.address) as admin:
        # Not through shared memory: a descriptor whose maker is interrupted is lost, as any of Python's is.
        with Worker(broker.address, timeout=20, shares_memory=False) as worker:
            pushed = 0

            def step() -> None:
                nonlocal pushed
                if in_slot:
                    slot = worker.slot()
                    with slot as gradient:
                        gradient["w"][:] = 1
                    assert slot.number is not None
                    pushed = slot.number
                elif pushed % 3:
                    pushed = worker.push(ones)
                else:
                    worker.push_pull(ones)
                    pushed = worker._session.window.last
                if pushed % 4 == 0:
                    worker.pull()

            def after() -> None:
                window = worker._session.window
                with worker._lock:
                    first = window.last + 1 - len(window)
                    assert [entry.number for entry in window._entries] == [*range(first, window.last + 1)]
                    assert window.kept_bytes == sum(entry.charge for entry in window._entries)
                assert not any(slot.is_taken for slot in worker._pusher._slots._slots)
                # As another thread, the lease's say: it must not find anything taken for ever.
                Running(lambda: worker.pull(own=True)).result()

            interrupt_often(step, times=60, after=after)
            worker.flush()
            last = worker._session.window.last
        # An interrupted push may have pushed; what has a number counts once.
        assert pushed <= last == admin.status()["version"]


def test_whenever_a_loop_in_one_process_is_interrupted_it_goes_on() -> None:
    ones = {"w": np.ones(1000, np.float32)}
    with DistributedGradients() as gradients:
        gradients.set_model_parameters({"w": np.zeros(1000, np.float32)})
        gradients.start()

        def step() -> None:
            gradients.add_gradients(ones)
            gradients.get_model_parameters()

        interrupt_often(step, times=100, after=lambda: Running(gradients.get_model_parameters).result())
        gradients.flush()
        assert gradients.get_model_parameters()["w"][0] == -gradients.version
