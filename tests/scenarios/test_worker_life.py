"""What a training program meets in a worker's life: waiting, Ctrl-C, fork, threads, a sudden end, a second coming."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from distgrad import Admin
from distgrad.errors import BrokerUnreachable, ConfigError, ControlError, Fenced, NoParameters
from distgrad.snapshot import Snapshot
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.ports import free_port
from support.processes import Process

FLOATS = 1000
ZEROS = {"w": np.zeros(FLOATS, np.float32)}
ONES = {"w": np.ones(FLOATS, np.float32)}
GRADIENT_BYTES = 4 * FLOATS

BEGINNING = """
import os, sys, time
import numpy as np
from distgrad.errors import Forked
from distgrad_worker import Worker

worker = Worker(sys.argv[1], worker_id=sys.argv[2])
snapshot = worker.initialize({"w": np.zeros(1000, np.float32)})
gradient = {"w": np.ones(1000, np.float32)}
"""


def script(broker: Broker, body: str, worker_id: str = "script") -> Process:
    return Process(broker.address, worker_id, program=(sys.executable, "-c", BEGINNING + body))


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.005)


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker(parameters=ZEROS) as running:
        yield running


@pytest.fixture
def admin(broker: Broker) -> Iterator[Admin]:
    with Admin(broker.address) as connected:
        yield connected


def sum_of(admin: Admin) -> float:
    (first, *rest) = set(admin.get_model_parameters()["w"].tolist())
    assert not rest, "all elements are updated alike"
    return float(first)


def test_without_a_broker_the_error_names_the_address_that_was_tried() -> None:
    address = f"127.0.0.1:{free_port()}"

    with pytest.raises(BrokerUnreachable, match=rf"{address}.*nobody listens there"):
        Worker(address, timeout=0.5)


def test_without_parameters_pull_and_push_say_so_and_initialize_helps() -> None:
    with Broker() as broker, Worker(broker.address) as worker:
        with pytest.raises(NoParameters, match="initialize"):
            worker.pull()
        with pytest.raises(NoParameters):
            worker.push(ONES)
        worker.initialize(ZEROS)
        worker.push(ONES)
        worker.flush()
        assert worker.pull().version == 1


def test_the_first_offer_of_parameters_wins_and_all_workers_get_it() -> None:
    with Broker() as broker, Worker(broker.address) as first, Worker(broker.address) as second:
        snapshots = [first.initialize({"w": np.full(3, 1.0)}), second.initialize({"w": np.full(3, 2.0)})]

        assert [snapshot.parameters["w"].tolist() for snapshot in snapshots] == [[1, 1, 1], [1, 1, 1]]


def test_a_model_that_does_not_fit_in_the_queue_is_refused_with_the_number_needed() -> None:
    with Broker(queue_bytes=GRADIENT_BYTES - 1) as broker, Worker(broker.address) as worker:
        with pytest.raises(ControlError, match=f"raise it to at least {GRADIENT_BYTES}") as caught:
            worker.initialize(ZEROS)
        assert caught.value.code == "too_large"
    with pytest.raises(ConfigError, match=f"raise it to at least {GRADIENT_BYTES}"):
        Broker(parameters=ZEROS, queue_bytes=GRADIENT_BYTES - 1).start()


def test_a_stopped_broker_stops_its_senders_at_the_queues_bytes_and_control_answers() -> None:
    queue_bytes = 3 * GRADIENT_BYTES + 1  # too little for a reserve: the one worker may have all of it
    with Broker(parameters=ZEROS, queue_bytes=queue_bytes, stopped=True) as broker, Admin(broker.address) as admin:
        with Worker(broker.address) as worker:
            sender = threading.Thread(target=lambda: [worker.push(ONES) for _ in range(50)], name="sender")
            sender.start()
            wait_until(lambda: admin.status()["queued"] == 3)
            for _ in range(50):
                status = admin.status()
                assert status["queued_bytes"] <= status["granted_bytes"] <= queue_bytes
                assert not status["running"]
            assert sender.is_alive()
            assert worker.pull().version == 0

            admin.start()

            sender.join()
            worker.flush()
        assert sum_of(admin) == -50


def test_a_queue_smaller_than_a_gradient_for_each_worker_serves_all_of_them_in_turn() -> None:
    n_workers, n_gradients = 4, 120
    settled_when_one_was_done: list[list[int]] = []
    all_at_once = threading.Barrier(n_workers)
    with Broker(parameters=ZEROS, queue_bytes=int(1.5 * GRADIENT_BYTES)) as broker:

        def run(worker: Worker) -> None:
            all_at_once.wait()
            for _ in range(n_gradients):
                worker.push(ONES)
            worker.flush()
            settled_when_one_was_done.append([other.settled for other in workers])

        workers = [Worker(broker.address) for _ in range(n_workers)]
        threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()
        with Admin(broker.address) as admin:
            assert sum_of(admin) == -n_workers * n_gradients
    # Threads of one interpreter are not equally fast; one that is not served in turn would have nearly nothing.
    assert min(settled_when_one_was_done[0]) >= n_gradients / 4


def test_threads_of_one_process_share_a_worker(broker: Broker, admin: Admin) -> None:
    numbers: list[int] = []
    with Worker(broker.address, worker_id="shared") as worker:

        def run() -> None:
            for step in range(100):
                numbers.append(worker.push(ONES))
                if step % 10 == 0:
                    worker.pull()
            worker.flush()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(numbers) == list(range(1, 401))
    assert sum_of(admin) == -400


def test_pulls_of_a_large_model_are_whole_versions_while_updates_go_on() -> None:
    """36 MiB need three ranges; meanwhile versions come and go."""
    start = {"a": np.zeros(5 << 20, np.float32), "b": np.zeros(2 << 20, np.float64)}
    ones = {name: np.ones_like(array) for name, array in start.items()}
    is_over = threading.Event()
    with Broker(parameters=start) as broker, Worker(broker.address) as pusher, Worker(broker.address) as puller:

        def push() -> None:
            while not is_over.is_set():
                pusher.push(ones)

        sender = threading.Thread(target=push)
        sender.start()
        snapshot: Snapshot | None = None
        versions: list[int] = []
        while len(versions) < 10:
            snapshot = puller.pull(newer_than=snapshot, out=snapshot)
            versions.append(snapshot.version)
            for array in snapshot.parameters.values():
                assert array.min() == array.max() == -snapshot.version
        is_over.set()
        sender.join()
        assert versions == sorted(set(versions))


def test_a_program_that_just_ends_has_delivered_what_it_pushed(broker: Broker, admin: Admin) -> None:
    with script(broker, "for _ in range(200): worker.push(gradient)\n") as process:
        assert process.wait() == 0, process.output()

    assert sum_of(admin) == -200


def test_a_child_of_fork_cannot_use_the_worker_and_the_parent_goes_on(broker: Broker, admin: Admin) -> None:
    body = """
worker.push(gradient)
child = os.fork()
if child == 0:
    for call in (lambda: worker.push(gradient), worker.pull, worker.flush, lambda: worker.initialize(gradient)):
        try:
            call()
        except Forked as error:
            print("child:", error)
    worker.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
worker.push(gradient)
worker.flush()
worker.close()
print("parent is done")
"""
    with script(broker, body) as process:
        process.wait_for_line("^parent is done$")
        assert process.wait() == 0
    assert sum("child: this" in line for line in process.lines) == 4
    assert sum_of(admin) == -2


@pytest.mark.parametrize(
    ("call", "is_blocked"),
    [
        ("while True: worker.push(gradient)", lambda status: status["queued"] == 10),
        ("worker.push(gradient); worker.flush()", lambda status: status["queued"] == 1),
        ("worker.pull(newer_than=snapshot)", lambda status: status["waiting_pulls"] == 1),
        ("worker.push(gradient); worker.close()", lambda status: status["queued"] == 1),
    ],
    ids=["push", "flush", "pull", "close"],
)
def test_ctrl_c_ends_a_blocked_call(call: str, is_blocked: Callable[[dict[str, Any]], bool]) -> None:
    body = f"""
print("calling")
try:
    {call}
except KeyboardInterrupt:
    print("interrupted")
    os._exit(5)
"""
    queue_bytes = 20 * GRADIENT_BYTES + 1  # half of it is kept in reserve
    with (
        Broker(parameters=ZEROS, queue_bytes=queue_bytes, stopped=True) as broker,
        Admin(broker.address) as admin,
        script(broker, body) as process,
    ):
        process.wait_for_line("^calling$")
        wait_until(lambda: is_blocked(admin.status()))

        process.interrupt()

        # A second is promised; this machine may be busy.
        process.wait_for_line("^interrupted$", timeout=5)
        assert process.wait() == 5


def test_ctrl_c_in_a_with_block_ends_the_program_though_gradients_are_unsettled() -> None:
    body = """
print("calling")
with worker:
    worker.push(gradient)
    worker.flush()
"""
    with (
        Broker(parameters=ZEROS, stopped=True) as broker,
        Admin(broker.address) as admin,
        script(broker, body) as process,
    ):
        process.wait_for_line("^calling$")
        wait_until(lambda: admin.status()["queued"] == 1)

        process.interrupt()

        process.wait_for_line("^KeyboardInterrupt$", timeout=10)
        process.wait_for_line("closing the worker failed as well: 1 gradient", timeout=10)
        assert process.wait() == -2


def test_a_worker_killed_and_started_again_goes_on_behind_its_cursor(broker: Broker, admin: Admin) -> None:
    body = """
print("from", worker.cursor, worker.settled)
position = int(worker.cursor or 0)
while position < 300:
    position += 1
    worker.push(gradient, cursor=str(position))
    if position % 50 == 0 and position > int(worker.cursor or 0):
        worker.flush()
        print("at", position)
        if sys.argv[1:] and position in (100, 200): time.sleep(60)
print("done")
worker.close()
"""
    for start, kill_at in ((None, 100), (100, 200)):
        with script(broker, body) as process:
            process.wait_for_line(rf"^from {start} {start or 0}$")
            process.wait_for_line(rf"^at {kill_at}$")
            process.kill()
    with script(broker, body) as process:
        process.wait_for_line(r"^from 200 200$")
        process.wait_for_line(r"^done$")
        assert process.wait() == 0

    assert sum_of(admin) == -300
    (worker,) = admin.workers()
    assert (worker["accepted"], worker["applied"]) == (300, 300)


def test_a_killed_worker_does_not_hold_up_a_new_one_with_another_id(broker: Broker, admin: Admin) -> None:
    """Regression: the dead one held all that may be in flight until its lease of 30 s ran out."""
    body = """
print("joined")
worker.push(gradient)
worker.flush()
print("settled")
time.sleep(60)
"""
    with script(broker, body, "killed") as process:
        process.wait_for_line("^settled$")
        process.kill()
    with script(broker, body, "new") as process:
        process.wait_for_line("^joined$")
        process.wait_for_line("^settled$", timeout=10)
        states = {worker["id"]: worker["state"] for worker in admin.workers()}

    assert states == {"killed": "live", "new": "live"}, "the lease of the killed one still runs"
    assert sum_of(admin) == -2


def test_a_process_whose_id_was_taken_over_is_fenced_and_changes_nothing(broker: Broker, admin: Admin) -> None:
    former = Worker(broker.address, worker_id="one")
    former.push(ONES)
    former.flush()

    with Worker(broker.address, worker_id="one") as successor:
        assert successor.settled == 1

        def push_until_fenced() -> None:
            while True:
                former.push(ONES)

        with pytest.raises(Fenced, match="newer process"):
            push_until_fenced()
        with pytest.raises(Fenced):
            former.pull()
        successor.push(ONES)
        successor.flush()
        assert successor.settled == 2

    with pytest.raises(Fenced):
        former.close()
    assert sum_of(admin) == -2
