"""A gradient's life in the core: accepted or dropped, settled once, and told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad import wire
from distgrad.layout import Layout
from distgrad.policies import Staleness
from distgrad_broker.events import WorkDue
from distgrad_broker.settling import REFUSALS_A_REPLY
from support.core_kit import LAYOUT, ONE, OTHER, Kit, frames_of


def test_gradients_of_a_worker_are_accepted_in_order_and_applied_once() -> None:
    kit = Kit()
    kit.hello()

    kit.push(1, 1, 2, 2, 1)
    kit.work(5)

    member = kit.member()
    assert (member.accepted, member.settled, member.applied, member.repeated) == (2, 2, 2, 3)
    assert kit.total == -2 * 8


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"worker": "stranger"}, "unknown_worker"),
        ({"session": "one:99"}, "fenced"),
        ({"user": "mallory"}, "fenced"),
        ({"number": 3}, "gap"),
    ],
)
def test_what_is_not_next_in_its_session_is_dropped_and_counted(keys: dict[str, Any], reason: str) -> None:
    kit = Kit()
    kit.hello()

    kit.handle(kit.gradient(**({"number": 1} | keys)))

    assert kit.state.dropped == {reason: 1}
    assert (kit.member().accepted, len(kit.state.queue)) == (0, 0)


def test_an_older_attempt_is_dropped_and_a_newer_one_begins_afresh() -> None:
    kit = Kit()
    kit.hello()
    kit.push(2, attempt=3)
    assert kit.member().missing

    kit.push(1, attempt=2)
    assert kit.state.dropped == {"gap": 1, "old_attempt": 1}
    kit.push(1, attempt=4)

    assert (kit.member().accepted, kit.member().missing, kit.member().attempt) == (1, False, 4)


def test_a_gap_is_told_at_once_to_the_heartbeat_that_waits_and_once_for_each_attempt() -> None:
    kit = Kit()
    kit.hello()
    beat = kit.send("heartbeat", wait_s=0.05, **kit.beat_keys())

    kit.push(2, 3, 4)

    (reply,) = kit.replies_to(beat)
    assert (reply.header["resend"], reply.header["accepted"], reply.header["attempt"]) == (True, 0, 1)
    assert not kit.beat(attempt=2)["resend"]


def test_what_no_grant_covers_is_not_accepted_however_small_the_overdraft() -> None:
    kit = Kit(queue_bytes=3 * ONE - 1, is_stopped=True)
    kit.hello()

    kit.push(1, 2, 3)

    assert kit.state.dropped == {"uncovered": 1}
    assert kit.member().accepted == 2
    assert kit.state.queued_bytes == 2 * ONE


def test_each_outcome_uses_its_number_up() -> None:
    kit = Kit(policy=Staleness(max_staleness=0), is_stopped=True)
    kit.hello()
    base = list(kit.core.name)
    kit.push(1, base=base)
    kit.push(2, base=base)
    kit.push(3, value=np.inf, base=None)
    kit.push(4)
    kit.ask("start")
    kit.work(3)
    kit.ask("clear")

    assert kit.state.outcomes == {"applied": 1, "superseded": 1, "refused": 1, "cleared": 1}
    assert (kit.member().settled, kit.state.queued_bytes, kit.member().queued_bytes) == (4, 0, 0)
    assert kit.holder.version == 1


def test_a_refusal_is_told_with_reason_leaf_and_number_until_it_is_acknowledged() -> None:
    kit = Kit()
    kit.hello()
    nan = np.array([0, 0, 0, 0, np.nan, 0, 0, 0], np.float32)
    kit.push(1, parts=[nan.tobytes()])
    kit.push(2)
    kit.work(2)

    for _ in range(2):
        ((number, reason, leaf, message),) = kit.beat(settled=0)["refused"]
        assert (number, reason, leaf) == (1, "not_finite", "w")
        assert "w" in message
    assert kit.beat(settled=2)["refused"] == []
    assert kit.total == -8


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"layout": OTHER}, "layout"),
        ({"parts": []}, "truncated"),
        ({"parts": [bytes(28)]}, "truncated"),
        ({"parts": [bytes(33)]}, "too_large"),
        ({"parts": [bytes(30), bytes(2)]}, "malformed"),
        ({"parts": [bytes(32)], "encoding": "zip"}, "encoding"),
        ({"value": np.nan}, "not_finite"),
        ({"value": -np.inf}, "not_finite"),
    ],
)
def test_a_bad_gradient_is_refused_whole_and_the_next_good_one_applies(keys: dict[str, Any], reason: str) -> None:
    kit = Kit()
    kit.hello()

    kit.push(1, **keys)
    kit.push(2)
    kit.work(2)

    assert kit.state.refused == {reason: 1}
    assert kit.total == -8
    assert kit.beat()["settled"] == 2


def test_refusals_with_long_paths_fit_in_headers_and_none_is_forgotten_before_it_was_told() -> None:
    """Regression: 64 refusals that name a long leaf made a reply that no worker could read, for ever."""
    name = "\N{FACE WITH TEARS OF JOY}" * 2_000
    layout = Layout.of({name: np.zeros(8, np.float32)})
    kit = Kit(None, queue_bytes=128 * ONE)
    assert kit.ask("set", frames_of(layout))["ok"]
    kit.hello()
    kit.push(*range(1, 41), layout=layout, value=np.nan)
    kit.work(40)

    told: list[int] = []
    settled = 0
    while settled < 40:
        reply = kit.reply("heartbeat", **kit.beat_keys(settled=settled))
        assert len(wire.pack(reply.header)) <= wire.MAX_HEADER_BYTES
        told += [refusal[0] for refusal in reply.header["refused"]]
        settled = reply.header["settled"]

    assert told == list(range(1, 41))
    assert len(told[:REFUSALS_A_REPLY]) == REFUSALS_A_REPLY


def test_a_heartbeat_that_waits_hears_of_its_number_of_a_quarter_of_the_window_and_of_its_deadline() -> None:
    kit = Kit(queue_bytes=16 * ONE, is_stopped=True)
    kit.hello()
    kit.push(*range(1, 7))
    kit.ask("start")
    keys = kit.beat_keys(wait_s=0.05)

    one = kit.send("heartbeat", until=1, **keys)
    kit.work()
    two = kit.send("heartbeat", **keys)
    kit.work()
    assert [len(kit.replies_to(envelope)) for envelope in (one, two)] == [1, 0]
    kit.work()
    assert len(kit.replies_to(two)) == 1
    three = kit.send("heartbeat", **keys)
    kit.wait(0.049)
    assert not kit.replies_to(three)
    kit.wait(0.001)
    assert kit.replies_to(three)[0].header["settled"] == 3


def test_a_bunch_of_gradients_ends_when_there_are_enough_or_somebody_must_be_told() -> None:
    kit = Kit(queue_bytes=16 * ONE, is_stopped=True)
    kit.hello()
    kit.push(*range(1, 7))
    kit.ask("start")
    beat = kit.send("heartbeat", until=2, **kit.beat_keys(wait_s=0.05))

    kit.handle(WorkDue(1))
    assert kit.member().settled == 1
    kit.handle(WorkDue(16))
    told = [reply.header["settled"] for reply in kit.replies_to(beat)]
    kit.handle(WorkDue(16))

    assert (told, kit.member().settled) == ([2], 6)


def test_nothing_is_applied_while_stopped_or_without_parameters() -> None:
    kit = Kit(is_stopped=True)
    kit.hello()
    kit.push(1)
    kit.work()
    assert not kit.core.has_work
    kit.ask("set", absent=True)
    kit.ask("start")
    kit.work()
    assert not kit.core.has_work
    assert len(kit.state.queue) == 1

    kit.ask("set", frames_of(LAYOUT))
    kit.work()

    assert kit.state.outcomes == {"applied": 1}


def test_counters_tell_of_examples_loss_and_staleness() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1, base=list(kit.core.name), loss=0.5, examples=3)
    kit.push(2, base=list(kit.core.name), loss=0.25, examples=4)
    kit.push(3, base=["other", 0, 0])
    kit.work(3)

    member = kit.member()
    assert (member.examples, member.loss) == (8, 0.25)
    assert (member.staleness_sum, member.staleness_max) == (1, 1)
    assert member.received_bytes == 3 * LAYOUT.gradient_bytes


def test_a_cursor_is_told_to_whoever_comes_back() -> None:
    kit = Kit()
    assert kit.hello()["cursor"] is None
    kit.push(1, cursor=b"epoch 2")
    kit.push(2)

    assert kit.hello(nonce=b"another process")["cursor"] == b"epoch 2"


def test_an_expired_lease_gives_its_grant_back_but_not_what_it_covers_in_the_queue() -> None:
    kit = Kit(queue_bytes=3 * ONE, is_stopped=True)  # too little for a reserve
    kit.hello("a")
    kit.push(1, 2, worker="a")
    kit.wait(31.0)
    assert kit.hello("b")["grant"] == ONE

    kit.push(3, worker="a")

    assert kit.state.dropped == {"uncovered": 1}
    assert kit.member("a").committed == 2 * ONE
    kit.ask("clear")
    assert kit.member("a").committed == 0


def test_what_a_member_has_queued_can_be_dropped_without_touching_that_of_others() -> None:
    """A process from before a restart came first; its successor takes the id, and its own numbers, back."""
    kit = Kit(incarnation="two", is_stopped=True)
    kit.hello("a", b"stale process", session="one:1", lowest=1)
    kit.hello("b")
    kit.beat("a")  # it knows of its smaller share
    for number in (1, 2):
        kit.push(number, worker="a")
        kit.push(number, worker="b")

    header = kit.hello("a", b"newer process", session="one:2", lowest=11)

    assert (header["accepted"], header["settled"], header["adopted"], header["queued"]) == (10, 10, True, 0)
    assert [gradient.worker for gradient in kit.state.queue] == ["b", "b"]
    assert kit.state.outcomes == {"superseded": 2}
    kit.push(11, worker="a")
    assert kit.member("a").accepted == 11
