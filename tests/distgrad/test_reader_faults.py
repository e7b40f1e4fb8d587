"""A `Reader` whose broker has no parameters, goes away, comes back as another one, or takes snapshots back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad import Admin, Reader
from distgrad.errors import BrokerUnreachable, Destroyed, Forbidden, SnapshotRevoked
from distgrad.snapshot import Snapshot
from distgrad_broker import Broker
from support.broker_process import wait_until
from support.gates import Running
from support.ports import free_port
from support.scripted_broker import ScriptedBroker

ZEROS = {"w": np.zeros(10, np.float32)}
ONES = {"w": np.ones(10, np.float32)}


@pytest.fixture
def at() -> dict[str, Any]:
    """Name addresses for several brokers, one after the other."""
    return {"control": f"tcp://127.0.0.1:{free_port()}", "gradients": f"tcp://127.0.0.1:{free_port()}"}


def value_of(snapshot: Snapshot) -> float:
    (value,) = set(snapshot.parameters["w"].tolist())
    return float(value)


def wait_until_it_waits(admin: Admin) -> None:
    wait_until(lambda: admin.status()["waiting_pulls"] == 1)


# Parameters that are not there


def test_following_waits_for_the_first_parameters() -> None:
    with Broker() as broker, Reader(broker.address) as reader, Admin(broker.address) as admin:
        following = Running(lambda: next(reader.follow()))
        wait_until(lambda: reader._client.incarnation is not None)
        admin.set_model_parameters(ONES)

        assert value_of(following.result()) == 1


def test_following_waits_while_the_parameters_are_taken_away() -> None:
    with Broker(parameters=ZEROS) as broker, Admin(broker.address) as admin, Reader(broker.address) as reader:
        versions = reader.follow()
        next(versions)
        following = Running(lambda: next(versions))
        wait_until_it_waits(admin)
        admin.set_model_parameters(None)
        wait_until(lambda: admin.status()["waiting_pulls"] == 0)
        admin.set_model_parameters(ONES)

        assert value_of(following.result()) == 1


def test_waiting_for_parameters_asks_ever_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    with (
        ScriptedBroker(lambda request: request.fail("no_parameters")) as broker,
        Reader(broker.address) as reader,
    ):

        def wait(pause_s: float) -> bool:
            pauses.append(pause_s)
            if len(pauses) == 8:
                reader.close()
            return reader._closed.is_set()

        monkeypatch.setattr(reader._closed, "wait", wait)
        assert list(reader.follow()) == []

    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])
    assert len(broker.headers) == len(pauses)


# A broker that is away


def test_a_broker_that_is_restarted_in_mid_wait_is_followed_on(at: dict[str, Any]) -> None:
    with Reader(at["control"]) as reader:
        versions = reader.follow()
        with Broker(parameters=ZEROS, **at), Admin(at["control"]) as admin:
            first = next(versions)
            following = Running(lambda: next(versions))
            wait_until_it_waits(admin)
        with Broker(parameters=ONES, **at):
            second = following.result()

    assert (first.version, value_of(first)) == (0, 0)
    assert (second.version, value_of(second)) == (0, 1)
    assert first.state.incarnation != second.state.incarnation


def test_a_broker_that_was_restarted_without_parameters_is_waited_for(at: dict[str, Any]) -> None:
    with Reader(at["control"]) as reader:
        versions = reader.follow()
        with Broker(parameters=ZEROS, **at):
            former = next(versions).state.incarnation
        with Broker(**at), Admin(at["control"]) as admin:
            following = Running(lambda: next(versions))
            wait_until(lambda: reader._client.incarnation not in (None, former))
            admin.set_model_parameters(ONES)

            assert value_of(following.result()) == 1


@pytest.mark.parametrize("whose", ["reader", "call"])
def test_a_broker_that_stays_away_is_an_error_and_following_can_go_on_from_there(
    at: dict[str, Any], whose: str
) -> None:
    with Reader(at["control"], timeout=0.3 if whose == "reader" else 1000.0) as reader:
        with Broker(parameters=ZEROS, **at):
            versions = reader.follow(timeout=None if whose == "reader" else 0.3)
            last = next(versions)
        with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1.* within 0\.3 s"):
            next(versions)
        with Broker(parameters=ONES, **at):
            assert value_of(next(reader.follow(last, timeout=20))) == 1


@pytest.mark.parametrize(("code", "error"), [("destroyed", Destroyed), ("forbidden", Forbidden)])
def test_what_waiting_does_not_mend_is_an_error_at_once(code: str, error: type[Exception]) -> None:
    with (
        ScriptedBroker(lambda request: request.fail(code)) as broker,
        Reader(broker.address) as reader,
        pytest.raises(error),
    ):
        next(reader.follow())


def test_a_snapshot_that_is_taken_back_every_time_is_an_error() -> None:
    with (
        ScriptedBroker(lambda request: request.fail("revoked")) as broker,
        Reader(broker.address) as reader,
        pytest.raises(SnapshotRevoked),
    ):
        next(reader.follow())
