"""`Reader`: the current version at once, each new one as it appears, through everything that happens to a broker."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distgrad import Admin, Reader, transfer
from distgrad.errors import (
    BrokerUnreachable,
    ConfigError,
    Forbidden,
    NoParameters,
    StateError,
)
from distgrad.layout import Layout
from distgrad.snapshot import Snapshot
from distgrad.wire import State
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.broker_process import wait_until
from support.gates import Running
from support.key_folders import make_key_folder
from support.processes import Process
from support.scripted_broker import Request, ScriptedBroker, ignore

ZEROS = {"w": np.zeros(10, np.float32)}
ONES = {"w": np.ones(10, np.float32)}
FOLLOWING = """
import sys
from distgrad import Reader

with Reader(sys.argv[1], timeout=1000) as reader:
    try:
        for snapshot in reader.follow():
            print("version", snapshot.version, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker(parameters=ZEROS) as running:
        yield running


@pytest.fixture
def admin(broker: Broker) -> Iterator[Admin]:
    with Admin(broker.address, timeout=20) as connected:
        yield connected


@pytest.fixture
def reader(broker: Broker) -> Iterator[Reader]:
    with Reader(broker.address, timeout=20) as connected:
        yield connected


@pytest.fixture
def update(broker: Broker) -> Iterator[Callable[[int], None]]:
    """Give a function that has the broker apply some gradients of ones."""
    with Worker(broker.address, timeout=20) as worker:

        def apply(times: int = 1) -> None:
            for _ in range(times):
                worker.push(ONES)
            worker.flush()

        yield apply


def value_of(snapshot: Snapshot) -> float:
    (value,) = set(snapshot.parameters["w"].tolist())
    return float(value)


def wait_until_it_waits(admin: Admin) -> None:
    wait_until(lambda: admin.status()["waiting_pulls"] == 1)


# get()


def test_get_brings_the_current_version_at_once_in_arrays_of_the_callers_own(
    reader: Reader, update: Callable[[int], None]
) -> None:
    first = reader.get()
    update(3)

    second = reader.get()

    assert (first.version, value_of(first)) == (0, 0)
    assert (second.version, value_of(second)) == (3, -3)
    assert second.parameters["w"].flags.writeable


def test_get_reuses_what_it_is_given(reader: Reader, update: Callable[[int], None]) -> None:
    first = reader.get()
    update(1)

    second = reader.get(out=first)

    assert np.shares_memory(first.arenas[0], second.arenas[0])
    assert value_of(first) == -1


def test_get_into_arrays_of_another_layout_makes_new_ones(reader: Reader, admin: Admin) -> None:
    first = reader.get()
    admin.set_model_parameters({"other": np.ones(4)})

    second = reader.get(out=first)

    assert second.parameters["other"].tolist() == [1] * 4
    assert value_of(first) == 0


def test_get_without_parameters_is_a_clear_error() -> None:
    with Broker() as broker, Reader(broker.address) as reader, pytest.raises(NoParameters):
        reader.get()


# follow()


def test_the_first_version_comes_at_once_and_the_next_with_the_next_update(
    reader: Reader, admin: Admin, update: Callable[[int], None]
) -> None:
    versions = reader.follow()
    first = next(versions)
    following = Running(lambda: next(versions))
    wait_until_it_waits(admin)
    update(1)

    second = following.result()

    assert (first.version, value_of(first)) == (0, 0)
    assert (second.version, value_of(second)) == (1, -1)


def test_who_is_slow_skips_versions_and_gets_the_newest(reader: Reader, update: Callable[[int], None]) -> None:
    versions = reader.follow()
    seen = [next(versions)]
    for _ in range(3):
        update(10)
        seen.append(next(versions))

    assert [(snapshot.version, value_of(snapshot)) for snapshot in seen] == [(0, 0), (10, -10), (20, -20), (30, -30)]


@pytest.mark.parametrize("as_state", [True, False])
def test_following_begins_behind_what_was_read_before(
    reader: Reader, admin: Admin, update: Callable[[int], None], as_state: bool
) -> None:
    known = reader.get()
    following = Running(lambda: next(reader.follow(known.state if as_state else known)))
    wait_until_it_waits(admin)
    update(1)

    assert following.result().version == 1


def test_a_state_of_another_broker_is_behind_everything(reader: Reader) -> None:
    assert next(reader.follow(State("another", 0, 10**9))).version == 0


def test_a_wait_that_the_broker_ends_without_news_is_asked_again() -> None:
    layout = Layout.of(ZEROS)

    asked: list[Any] = []

    def script(request: Request) -> None:
        asked.append((request.header["newer_than"], request.header["wait_s"]))
        n_asked = len(asked)
        if 1 < n_asked < 4:
            request.answer(unchanged=True, parts=0, first=0, token=None, layout=False)
            return
        request.answer(
            layout.to_frame(), bytes(40), state=("one", 0, n_asked), fingerprint=layout.fingerprint,
            unchanged=False, parts=1, first=0, token=None, layout=True,
        )  # fmt: skip

    with ScriptedBroker(script) as broker, Reader(broker.address) as reader:
        versions = reader.follow()
        assert [next(versions).version for _ in range(2)] == [1, 4]

    assert asked == [(None, 0.0), *[(["one", 0, 1], 5.0)] * 3]


def test_snapshots_have_arrays_of_their_own(reader: Reader, update: Callable[[int], None]) -> None:
    versions = reader.follow()
    first = next(versions)
    update(1)
    second = next(versions)

    assert not np.shares_memory(first.arenas[0], second.arenas[0])
    assert (value_of(first), value_of(second)) == (0, -1)


def test_a_snapshot_that_its_owner_dropped_is_gone_before_the_next_is_fetched(
    reader: Reader, update: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a large model would be in memory once more, beside the version that is on its way."""
    versions = reader.follow()
    dropped = weakref.ref(next(versions).arenas[0])
    update(1)
    found: list[object] = []

    def fetch(*args: Any, **keys: Any) -> transfer.Fetched | None:
        gc.collect()
        found.append(dropped())
        return transfer.fetch(*args, **keys)

    monkeypatch.setattr("distgrad.reader.transfer", SimpleNamespace(fetch=fetch))
    next(versions)

    assert found == [None]


def test_reuse_writes_each_version_over_the_former_one(reader: Reader, update: Callable[[int], None]) -> None:
    versions = reader.follow(reuse=True)
    first = next(versions)
    update(1)
    second = next(versions)

    assert np.shares_memory(first.arenas[0], second.arenas[0])
    assert value_of(first) == value_of(second) == -1
    assert (first.version, second.version) == (0, 1)


@pytest.mark.parametrize("reuse", [True, False])
def test_replaced_parameters_are_new_also_in_another_layout(reader: Reader, admin: Admin, reuse: bool) -> None:
    versions = reader.follow(reuse=reuse)
    seen = [next(versions)]
    for nest in (ONES, {"v": np.full(4, 2.0), "w": np.full(3, 3.0)}, {"w": np.full(10, 4, np.float32)}):
        admin.set_model_parameters(nest)
        seen.append(next(versions))
        np.testing.assert_array_equal(seen[-1].parameters["w"], nest["w"])

    assert [list(snapshot.parameters) for snapshot in seen] == [["w"], ["w"], ["v", "w"], ["w"]]
    assert {snapshot.version for snapshot in seen} == {0}
    assert len({snapshot.state.generation for snapshot in seen}) == 4


# The end


@pytest.mark.parametrize("script", [ignore, lambda request: request.fail("no_parameters")])
def test_close_ends_a_follow_that_waits_in_another_thread(script: Callable[[Request], None]) -> None:
    """For an answer, or for parameters: nothing but `close` would end either within this test's patience."""
    with ScriptedBroker(script) as broker:
        reader = Reader(broker.address, timeout=1000.0)
        following = Running(lambda: list(reader.follow()))
        wait_until(lambda: len(broker.headers) > 0)

        reader.close()

        assert following.result() == []


def test_close_ends_a_follow_that_waits_for_news(broker: Broker, admin: Admin) -> None:
    reader = Reader(broker.address)
    following = Running(lambda: [snapshot.version for snapshot in reader.follow()])
    wait_until_it_waits(admin)

    reader.close()

    assert following.result() == [0]


def test_a_loop_ends_when_its_own_body_closes_the_reader(reader: Reader) -> None:
    seen = []
    for snapshot in reader.follow():
        seen.append(snapshot.version)
        reader.close()

    assert seen == [0]


def test_a_closed_reader_says_so(reader: Reader) -> None:
    reader.close()
    reader.close()

    with pytest.raises(StateError, match="closed"):
        reader.get()
    with pytest.raises(StateError, match="closed"):
        reader.follow()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_an_impossible_timeout_is_refused_at_once(reader: Reader, timeout: float) -> None:
    with pytest.raises(ConfigError, match="more than 0"):
        Reader("127.0.0.1", timeout=timeout)
    with pytest.raises(ConfigError, match="more than 0"):
        reader.follow(timeout=timeout)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="presses Ctrl-C")
@pytest.mark.parametrize("script", [ignore, lambda request: request.fail("no_parameters")])
def test_ctrl_c_ends_a_follow_that_waits(script: Callable[[Request], None]) -> None:
    with (
        ScriptedBroker(script) as broker,
        Process(broker.address, program=(sys.executable, "-c", FOLLOWING)) as process,
    ):
        wait_until(lambda: len(broker.headers) > 0)

        process.interrupt()

        process.wait_for_line("^interrupted$")
        assert process.wait() == 0


# Keys


def test_every_role_may_read_and_follow(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    with Broker(parameters=ZEROS, keys=keys.folder) as broker:
        for key in (keys.read, keys.worker, keys.admin):
            with Reader(broker.address, keys=key) as reader:
                assert value_of(reader.get()) == 0
                assert value_of(next(reader.follow())) == 0
        with Admin(broker.address, keys=keys.read) as other, pytest.raises(Forbidden):
            other.stop()


def test_without_the_brokers_key_nothing_is_read(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    with (
        Broker(parameters=ZEROS, keys=keys.folder) as broker,
        Reader(broker.address, timeout=0.5) as reader,
        pytest.raises(BrokerUnreachable, match=r"key|handshake"),
    ):
        next(reader.follow())


def test_many_readers_follow_one_broker_to_its_last_version(broker: Broker, update: Callable[[int], None]) -> None:
    last = 50
    seen: list[list[int]] = [[] for _ in range(10)]

    def follow(versions: list[int]) -> None:
        with Reader(broker.address, timeout=20) as reader:
            for snapshot in reader.follow(reuse=True):
                assert value_of(snapshot) == -snapshot.version
                versions.append(snapshot.version)
                if snapshot.version == last:
                    return

    following = [Running(lambda versions=versions: follow(versions)) for versions in seen]  # type: ignore[misc]
    update(last)
    for one in following:
        one.result()

    assert all(versions == sorted(set(versions)) and versions[-1] == last for versions in seen)


def test_one_thread_may_begin_what_another_goes_on_with(reader: Reader, update: Callable[[int], None]) -> None:
    versions = reader.follow()
    found: list[Snapshot] = []
    beginning = threading.Thread(target=lambda: found.append(next(versions)))
    beginning.start()
    beginning.join()
    update(1)

    assert [found[0].version, next(versions).version] == [0, 1]
