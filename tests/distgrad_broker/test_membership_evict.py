"""An admin evicts a worker: its process is fenced, what it had accepted still counts, its id is free."""

from __future__ import annotations

from distgrad.durable.books import LEFT, LIVE, SILENT
from distgrad.policies import Synchronous
from distgrad_broker.events import Log
from support.core_kit import ONE, Kit
from support.durable_kit import DurableKit

OLD, NEW = b"the old process!", b"the new process!"


def test_an_evicted_process_is_fenced_on_every_way_back() -> None:
    kit = Kit()
    session = kit.hello("a", OLD)["session"]
    beat = kit.beat_keys("a")

    assert kit.ask("evict", worker="a")["ok"]

    assert kit.ask("heartbeat", **beat)["error"] == "fenced"
    again = kit.ask("hello", worker="a", nonce=OLD, session=session)
    assert again["error"] == "fenced"
    assert "evicted" in again["message"]
    kit.push(1, worker="a")
    assert kit.state.dropped["fenced"] == 1
    assert kit.member("a").state == SILENT


def test_what_was_accepted_counts_and_another_process_goes_on_behind_it() -> None:
    kit = Kit()
    kit.hello("a", OLD)
    kit.push(1, 2, worker="a")

    kit.ask("evict", worker="a")
    kit.work(2)

    assert kit.state.outcomes["applied"] == 2
    assert kit.hello("a", NEW)["accepted"] == 2
    assert kit.member("a").state == LIVE


def test_a_heartbeat_that_waits_is_told_at_once() -> None:
    kit = Kit()
    kit.hello("a", OLD)
    waiting = kit.send("heartbeat", **kit.beat_keys("a", wait_s=0.05))
    assert kit.replies_to(waiting) == []

    kit.ask("evict", worker="a")

    (reply,) = kit.replies_to(waiting)
    assert reply.header["error"] == "fenced"


def test_the_others_get_its_grant_and_a_step_does_not_wait_for_it() -> None:
    kit = Kit(policy=Synchronous(), queue_bytes=12 * ONE)
    for worker in "ab":
        kit.hello(worker)
    kit.push(1, worker="a", base=list(kit.core.name))
    kit.work(1)
    assert kit.state.held
    before = kit.member("a").promised

    kit.ask("evict", worker="b")

    assert kit.state.outcomes["applied"] == 1
    assert kit.member("a").promised > before
    assert any(isinstance(effect, Log) and effect.phrase == "worker evicted" for effect in kit.effects)


def test_who_is_not_there_or_has_left_cannot_be_evicted() -> None:
    kit = Kit()
    kit.hello("a")
    kit.ask("leave", worker="a", session=kit.sessions["a"])
    assert kit.member("a").state == LEFT

    assert "gone already" in kit.ask("evict", worker="a")["message"]
    assert "no worker 'b'" in kit.ask("evict", worker="b")["message"]


def test_only_an_admin_evicts() -> None:
    kit = Kit()
    kit.hello("a")

    assert kit.ask("evict", worker="a", role="worker")["error"] == "forbidden"
    assert kit.ask("evict", worker="a", role="read")["error"] == "forbidden"


def test_an_evicted_process_stays_fenced_after_a_crash_of_the_broker() -> None:
    kit = DurableKit()
    session = kit.greet("a", OLD)["session"]
    kit.push(1, worker="a")
    kit.work()
    assert kit.written("evict", worker="a")["ok"]

    kit = kit.crash()

    assert kit.greet("a", OLD, session=session)["error"] == "fenced"
    assert kit.greet("a", NEW)["accepted"] == 1
