"""One test, or more, for each of the protocol's rules 1 to 10; `test_protocol_rules_channels` has those from 11 on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad.errors import Fenced, LayoutError
from distgrad.layout import Layout
from distgrad.policies import Staleness
from distgrad_broker import Broker
from distgrad_worker import Worker, asking
from distgrad_worker.session import RESUMING
from support.core_kit import Kit, frames_of
from support.simulated import Network, refused_numbers, restarts
from support.simulated_broker import SMALL

N = b"n" * 16
MIXED = {"half": np.zeros(3, np.float16), "single": np.zeros(5, np.float32), "double": np.zeros(2, np.float64)}


def network(workers: int = 1, queue_bytes: int = 100_000) -> Network:
    made = Network(queue_bytes)
    made.set_parameters(SMALL)
    for index in range(workers):
        made.join(f"w{index}")
    for _ in range(4):
        made.heal()
    return made


def test_rule_01_every_outcome_consumes_its_number_and_a_refused_gradient_is_not_sent_for_ever() -> None:
    kit = Kit(policy=Staleness(max_staleness=0), is_stopped=True)
    kit.hello()
    odd: list[dict[str, Any]] = [{}, {"base": ["gone", 0, 0]}, {"value": np.nan}, {}]
    for number, keys in enumerate(odd, 1):
        kit.push(number, **keys)
    kit.ask("start")
    kit.work(3)
    kit.ask("clear")

    assert kit.state.outcomes == {"applied": 1, "superseded": 1, "refused": 1, "cleared": 1}
    assert kit.beat()["settled"] == 4


def test_rule_02_the_cumulative_settled_number_alone_frees_window_and_grant() -> None:
    net = network()
    (worker,) = net.workers
    net.command("stop")
    for value in (1, 2):
        worker.push(value)
    for _ in range(3):
        net.heal()
    member = net.broker.state.members.get("w0")
    assert member is not None
    assert (member.accepted, member.queued_bytes, len(worker.session.window)) == (2, 2400, 2)

    net.command("start")
    net.heal()
    net.heal()

    assert (member.settled, member.queued_bytes, worker.session.window.settled) == (2, 0, 2)


def test_rule_03_what_can_be_refused_at_the_call_is_refused_at_the_call() -> None:
    with Broker(parameters=MIXED) as broker, Worker(broker.address) as worker:
        for wrong in ({**MIXED, "half": np.zeros(4)}, {**MIXED, "more": np.zeros(1)}, {"half": MIXED["half"]}, [1.0]):
            with pytest.raises(LayoutError):
                worker.push(wrong)

        assert worker.push(MIXED) == 1


def test_rule_04_an_older_processs_gradients_are_dropped_and_its_requests_fenced() -> None:
    net = network()
    (old,) = net.workers
    old.push(7)
    new = net.join("w0")
    net.requests.clear()
    new.ask()
    net.deliver_request(0)
    (pipe,) = [pipe for pipe in net.pipes if pipe.messages]
    net.deliver_gradient(pipe)
    assert net.broker.state.dropped == {"fenced": 1}

    net.finish()

    assert isinstance(old.session.ended, Fenced)
    assert new.is_alive
    assert net.broker.settled == []


def test_rule_05_after_a_restart_the_older_session_of_an_id_is_fenced() -> None:
    for order in (["one:3", "one:4"], ["one:4", "one:3"]):
        kit = Kit(incarnation="two")
        answers = [kit.hello(nonce=session.encode() * 4, session=session, lowest=1) for session in order]
        assert [header.get("error") for header in answers] == [None, "fenced" if order[1] == "one:3" else None]
        assert kit.member().nonce == b"one:4" * 4


def test_rule_06_a_new_broker_adopts_the_numbers_and_the_worker_says_once_what_is_lost() -> None:
    net = network()
    (worker,) = net.workers
    for value in (1, 2, 3):
        worker.push(value)
    net.heal()
    net.heal()
    assert worker.session.window.settled == 3

    net.restart()
    net.set_parameters(SMALL)
    worker.push(4)
    net.finish()

    member = net.broker.state.members.get("w0")
    assert member is not None
    assert (member.settled, member.applied) == (4, 1)
    assert restarts(worker) == 1


def test_rule_07_a_gap_begins_one_new_attempt_which_resends_from_the_brokers_number() -> None:
    net = network()
    (worker,) = net.workers
    for value in range(1, 7):
        worker.push(value)
    assert worker.pipe is not None
    worker.pipe.cut(1, 2)

    net.heal()
    net.heal()
    assert worker.session.phase == RESUMING or worker.session.attempt == 2
    net.finish()

    assert worker.session.attempt == 2
    assert [settled.number for settled in net.broker.settled] == [1, 2, 3, 4, 5, 6]


def test_rule_08_a_lost_last_gradient_is_noticed_by_the_highest_number_sent() -> None:
    net = network()
    (worker,) = net.workers
    worker.push(1)
    assert asking.heartbeat(worker.session)["sent"] == 1
    assert worker.pipe is not None
    worker.pipe.cut(0, 1)

    net.finish()

    assert [settled.outcome for settled in net.broker.settled] == ["applied"]
    assert worker.session.attempt == 2


def test_rule_09_the_sum_of_grants_stays_within_the_queues_bytes_and_a_stopped_broker_stops_its_senders() -> None:
    net = network(workers=3, queue_bytes=9_000)
    net.command("stop")
    for worker in net.workers:
        for value in range(1, 9):
            worker.push(value)
            net.check()
    for _ in range(4):
        net.heal()
        net.check()

    assert net.broker.state.queued_bytes == 6 * 1200
    assert all(worker.waiting for worker in net.workers)
    net.finish()


def test_rule_10_when_not_everybody_can_have_room_grants_are_turns_first_come_first_served() -> None:
    net = network(workers=4, queue_bytes=2_500)
    for _ in range(3):
        for worker in net.workers:
            worker.push(1)
        net.finish()

    assert net.broker.state.grants.uses_turns
    assert net.broker.versions.version == 12


def test_rule_10_a_gradient_that_the_budget_cannot_hold_is_refused_where_it_is_announced() -> None:
    assert Kit(None, queue_bytes=1500).ask("set", frames_of(SMALL, 1.0))["ok"]
    header = Kit(None, queue_bytes=1100).ask("set", frames_of(SMALL, 1.0))

    assert (header["error"], "--queue-bytes" in header["message"]) == ("too_large", True)


def test_rules_hold_together_when_a_refusal_is_told_across_replaced_parameters() -> None:
    net = network()
    (worker,) = net.workers
    net.command("stop")
    worker.push(1)
    net.heal()
    net.set_parameters(None)
    net.set_parameters(Layout.of(np.zeros(500, np.float32)))
    net.finish()

    assert refused_numbers(worker) == [1]
