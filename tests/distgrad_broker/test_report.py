"""What `status` tells."""

from __future__ import annotations

import json

import numpy as np

from distgrad.rules import SGD
from distgrad_broker.report import describe
from support.core_kit import LAYOUT, ONE, Kit


def test_status_counts_what_happened_and_can_be_sent_and_printed() -> None:
    kit = Kit(rule=SGD(lr=0.5), queue_bytes=12 * ONE)
    kit.hello("a")
    kit.hello("b")
    kit.push(1, worker="a")
    kit.push(2, worker="a", value=np.nan)
    kit.push(7, worker="a")
    kit.ask("fly")
    kit.work(2)
    kit.ask("stop")
    kit.push(3, worker="a")
    kit.send("get", newer_than=list(kit.core.name), wait_s=5.0)

    told = kit.ask("status")["status"]

    expected = {
        "incarnation": "one",
        "generation": 0,
        "version": 1,
        "running": False,
        "has_parameters": True,
        "leaves": 2,
        "parameter_bytes": LAYOUT.parameter_bytes,
        "mode": "descent",
        "policy": {"policy": "async", "reduction": "mean", "weigh_by_examples": False},
        "held": 0,
        "waits_for": [],
        "queued": 1,
        "queued_bytes": ONE,
        "queue_bytes": 12 * ONE,
        "granted_bytes": 10 * ONE,  # a has not echoed yet that its 6 became 4; b has 4
        "workers": 2,
        "workers_live": 2,
        "applied": 1,
        "refused": {"not_finite": 1},
        "dropped": {"gap": 1},
        "rejected": {"unknown_op": 1},
        "waiting_pulls": 1,
        "received_bytes": 3 * LAYOUT.gradient_bytes,
        "staleness": [],  # they name no version
        "lost": 0,
    }
    assert {key: told[key] for key in expected} == expected
    assert told["optimizer"]["name"] == "sgd"
    assert json.loads(json.dumps(told)) == told


def test_status_without_parameters_says_so() -> None:
    told = describe(Kit(None).state, 50.0)

    assert (told["has_parameters"], told["leaves"], told["parameter_bytes"], told["optimizer"]) == (False, 0, 0, None)


def test_staleness_is_counted_in_classes_that_double() -> None:
    kit = Kit()
    kit.hello("a")
    kit.hello("b")
    base = list(kit.core.name)
    for number in range(1, 6):
        kit.handle(kit.gradient(number, "a", base=base))
        kit.work(1)

    told = kit.ask("status")["status"]
    assert told["staleness"] == [1, 1, 2, 1]  # 0; 1; 2 and 3; 4
    assert told["staleness_sum"] == 10
    assert kit.ask("workers")["workers"][0]["staleness"] == 4
    assert kit.ask("workers")["workers"][1]["staleness"] is None


def test_a_gradient_that_goes_missing_in_the_broker_is_told_as_lost() -> None:
    kit = Kit(is_stopped=True)
    kit.hello("a")
    kit.push(1, 2, worker="a")
    assert kit.ask("status")["status"]["lost"] == 0

    kit.state.queue.pop()

    assert kit.ask("status")["status"]["lost"] == 1
