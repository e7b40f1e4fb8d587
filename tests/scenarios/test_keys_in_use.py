"""A broker with keys: what each role may do, checked on every message, and what becomes of everybody else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from distgrad import Admin, sockets, wire
from distgrad.client import ControlClient
from distgrad.errors import BrokerUnreachable, Forbidden, KeyFileError
from distgrad.keys import ClientKeys, Role, add_client, revoke_client
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.key_folders import KeyFolder, make_key_folder

ZEROS = {"w": np.zeros(10, np.float32)}
ONES = {"w": np.ones(10, np.float32)}


class Guarded(NamedTuple):
    broker: Broker
    keys: KeyFolder
    admin: Admin

    def status_when(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while not is_so(status := self.admin.status()):
            assert time.monotonic() < deadline, status
        return status

    def ask(self, key: Path, op: str, mutating: bool = False, **keys: Any) -> None:
        with ControlClient(self.broker.address, key, timeout=20) as client:
            client.request(op, mutating=mutating, **keys)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    keys = make_key_folder(tmp_path)
    with Broker(parameters=ZEROS, keys=keys.folder) as broker, Admin(broker.address, keys=keys.admin) as admin:
        yield Guarded(broker, keys, admin)


def test_each_role_does_its_own_work(guarded: Guarded) -> None:
    broker, keys, admin = guarded

    with Worker(broker.address, keys=keys.worker) as worker:
        worker.push(ONES)
        worker.flush()
        assert worker.pull().version == 1
    with Admin(broker.address, keys=keys.read) as reader:
        assert reader.get_model_parameters()["w"].tolist() == [-1] * 10
        assert reader.status()["version"] == 1
        assert reader.workers() == []
    admin.set_model_parameters(ZEROS)
    assert admin.status()["rejected"] == {}


@pytest.mark.parametrize(
    ("role", "forbidden"),
    [
        ("worker", ["start", "stop", "clear", "configure", "workers", "save", "destroy", "set"]),
        ("read", ["start", "stop", "clear", "configure", "save", "destroy", "set", "hello", "heartbeat", "leave"]),
        ("admin", ["hello", "heartbeat", "leave"]),
    ],
)
def test_what_a_role_may_not_do_is_refused_and_counted(guarded: Guarded, role: str, forbidden: list[str]) -> None:
    for op in forbidden:
        with pytest.raises(Forbidden, match=role):
            guarded.ask(getattr(guarded.keys, role), op, mutating=op not in ("hello", "heartbeat", "workers"))

    assert guarded.admin.status()["rejected"] == {"forbidden": len(forbidden)}
    assert guarded.admin.status()["running"]


def test_a_worker_may_offer_parameters_but_not_replace_or_remove_them(guarded: Guarded) -> None:
    with Worker(guarded.broker.address, keys=guarded.keys.worker) as worker:
        snapshot = worker.initialize({"v": np.ones(3)})
    assert list(snapshot.parameters) == ["w"]

    for keys in ({"absent": True, "if_absent": True}, {"absent": True}, {}):
        with pytest.raises(Forbidden, match="admin"):
            guarded.ask(guarded.keys.worker, "set", mutating=True, **keys)
    assert list(guarded.admin.get_model_parameters()) == ["w"]


@pytest.mark.parametrize("role", ["admin", "read"])
def test_gradients_of_another_role_are_dropped_and_counted(guarded: Guarded, role: str) -> None:
    with Worker(guarded.broker.address, worker_id="w", keys=guarded.keys.worker) as worker:
        session = guarded.admin.workers()[0]["session"]
        layout = worker.pull().layout
        header = {"v": 1, "kind": "gradient", "worker": "w", "session": session, "attempt": 1, "number": 1}
        forged = [wire.pack({**header, "fingerprint": layout.fingerprint}), np.ones(10, np.float32).tobytes()]

        keys = ClientKeys.load(getattr(guarded.keys, role))
        with sockets.open_context() as context:
            push = sockets.gradient_client(context, guarded.broker.gradients, keys=keys)
            for _ in range(3):
                push.send_multipart(forged)
            guarded.status_when(lambda status: status["rejected"].get("forbidden") == 3)
            push.close()

        assert guarded.admin.status()["version"] == 0
        worker.push(ONES)
        worker.flush()
    assert guarded.admin.status()["version"] == 1


def test_a_worker_id_belongs_to_the_key_that_used_it_first(guarded: Guarded) -> None:
    _, second = add_client(guarded.keys.folder, "second", Role.WORKER, sockets.curve_pair)
    with Worker(guarded.broker.address, worker_id="w", keys=guarded.keys.worker, timeout=20) as worker:
        worker.push(ONES)
        worker.flush()
        let_in = Worker(guarded.broker.address, worker_id="v", keys=second, timeout=20)
        let_in.close()
        with pytest.raises(Forbidden, match="belongs to another key"):
            Worker(guarded.broker.address, worker_id="w", keys=second, timeout=20)


def test_strangers_get_nothing_are_told_why_and_counted_by_reason(guarded: Guarded, tmp_path: Path) -> None:
    other = make_key_folder(tmp_path, "other")
    _, unknown = add_client(guarded.keys.folder, "unknown", Role.WORKER, sockets.curve_pair)
    (guarded.keys.folder / "unknown.pub").unlink()

    for key, reason in ((None, "no_key"), (other.worker, "other_broker"), (unknown, "unknown_key")):
        # A handshake that a busy machine did not get done in its time is counted as just that: then they knock again.
        while True:
            with pytest.raises(BrokerUnreachable, match=r"key|handshake"):
                Worker(guarded.broker.address, keys=key, timeout=1.5)
            with (
                pytest.raises(BrokerUnreachable, match=r"key|handshake"),
                Admin(guarded.broker.address, key, 1.0) as admin,
            ):
                admin.status()
            if guarded.admin.status()["rejected"].get(reason):
                break
    assert guarded.admin.status()["workers"] == 0


def test_a_client_with_keys_does_not_talk_to_a_broker_without(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    with Broker(parameters=ZEROS) as broker, pytest.raises(BrokerUnreachable, match="keys"):
        Worker(broker.address, keys=keys.worker, timeout=1)


def test_a_revoked_key_stops_working_while_its_connection_stands(guarded: Guarded) -> None:
    with Worker(guarded.broker.address, worker_id="w", keys=guarded.keys.worker, timeout=20) as worker:
        worker.push(ONES)
        worker.flush()
        revoke_client(guarded.keys.folder, "worker")

        def push_until_refused() -> None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                worker.push(ONES)
                worker.flush(timeout=20)

        with pytest.raises((Forbidden, BrokerUnreachable)):
            push_until_refused()
        version = guarded.admin.status()["version"]
        with pytest.raises((Forbidden, TimeoutError)):
            worker.close(timeout=1)
    assert guarded.admin.status()["version"] == version


def test_a_key_added_while_the_broker_runs_is_let_in(guarded: Guarded) -> None:
    _, late = add_client(guarded.keys.folder, "late", Role.WORKER, sockets.curve_pair)

    with Worker(guarded.broker.address, keys=late, timeout=20) as worker:
        worker.push(ONES)
        worker.flush()


def test_a_key_file_that_others_can_read_is_refused(guarded: Guarded) -> None:
    guarded.keys.worker.chmod(0o644)

    with pytest.raises(KeyFileError, match="0600"):
        Worker(guarded.broker.address, keys=guarded.keys.worker)
