"""What each operation of the control channel means, and what bad input to it gets."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distgrad.layout import Layout
from distgrad.rules import SGD
from distgrad_broker.events import SaveEnded, SaveParameters
from support.core_kit import LAYOUT, ONE, OTHER, Kit, frames_of

N = b"n" * 16


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"worker": None}, "malformed"),
        ({"worker": 3}, "malformed"),
        ({"worker": ""}, "invalid"),
        ({"worker": "x" * 129}, "invalid"),
        ({"worker": "new\nline"}, "invalid"),
        ({"nonce": None}, "malformed"),
        ({"nonce": "text of nonce"}, "malformed"),
        ({"nonce": b"short"}, "invalid"),
        ({"nonce": b"x" * 65}, "invalid"),
        ({"lowest": -1}, "malformed"),
        ({"lowest": 2**63}, "malformed"),
        ({"lowest": 1.0}, "malformed"),
        ({"lowest": True}, "malformed"),
        ({"session": 5}, "malformed"),
        ({"generated": 1}, "malformed"),
    ],
)
def test_a_bad_hello_is_refused_and_remembers_nobody(keys: dict[str, Any], error: str) -> None:
    kit = Kit()

    assert kit.ask("hello", **({"worker": "w", "nonce": N} | keys))["error"] == error
    assert len(kit.state.members) == 0


def test_hello_tells_all_that_a_worker_needs() -> None:
    kit = Kit(queue_bytes=20 * ONE)
    reply = kit.reply("hello", worker="w", nonce=N)

    told = {key: reply.header[key] for key in ("session", "accepted", "settled", "queued", "adopted", "cursor")}
    assert told == {"session": "one:1", "accepted": 0, "settled": 0, "queued": 0, "adopted": False, "cursor": None}
    assert (reply.header["gradients"], reply.header["lease_s"]) == ("tcp://127.0.0.1:5555", 30.0)
    assert (reply.header["queue_bytes"], reply.header["grant"], reply.header["grant_seq"]) == (20 * ONE, 10 * ONE, 1)
    assert Layout.from_frame(reply.frames[0]) == LAYOUT


@pytest.mark.parametrize(("n_workers", "told_s"), [(100, None), (101, 0.202), (250, 0.5)])
def test_the_more_workers_there_are_the_more_rarely_each_is_to_ask(n_workers: int, told_s: float | None) -> None:
    kit = Kit(queue_bytes=1000 * ONE)
    for number in range(n_workers):
        kit.hello(f"w{number}")

    assert kit.beat("w0").get("ask_s") == told_s
    kit.state.members.lease_s = 0.1
    assert kit.core.ask_s == 0.2
    kit.state.members.lease_s = 30.0
    kit.ask("leave", worker="w1", session=kit.sessions["w1"])
    assert kit.beat("w0").get("ask_s", 0.2) == kit.core.ask_s == pytest.approx(max(0.2, (n_workers - 1) / 500))


def test_hello_without_parameters_has_no_layout_frame() -> None:
    assert list(Kit(None).reply("hello", worker="w", nonce=N).frames) == []


def test_a_successor_is_told_what_its_predecessor_left_in_the_queue() -> None:
    """Regression: it took the whole grant for free, and what it sent was dropped until it gave up."""
    kit = Kit(is_stopped=True)
    kit.hello()
    kit.push(1, 2)

    header = kit.hello(nonce=b"another process")

    assert (header["accepted"], header["settled"], header["queued"]) == (2, 0, 2 * ONE)


def test_a_window_that_begins_beyond_what_came_is_refused_within_one_session() -> None:
    kit = Kit()
    kit.hello(nonce=N)

    header = kit.ask("hello", worker="w", nonce=N, lowest=7)

    assert header["error"] == "invalid"
    assert "number 1" in header["message"]


def test_the_reply_that_tells_of_an_adoption_may_be_lost() -> None:
    """Regression: the repeated hello said that nothing had been adopted, so nobody was told what was lost."""
    kit = Kit(incarnation="two")
    first = kit.hello(nonce=N, session="one:1", lowest=11)

    again = kit.hello(nonce=N, session="one:1", lowest=11)

    assert first["adopted"]
    assert again["adopted"]
    assert (again["accepted"], again["settled"]) == (10, 10)


def test_a_superseded_process_that_waits_is_told_at_once() -> None:
    kit = Kit()
    kit.hello()
    beat = kit.send("heartbeat", wait_s=0.05, **kit.beat_keys())

    kit.hello(nonce=b"another process")

    (reply,) = kit.replies_to(beat)
    assert reply.header["error"] == "fenced"


BAD_NUMBERS = [None, -1, 2**63, "1", 1.5, True, b"1", [1]]


@pytest.mark.parametrize("key", ["attempt", "sent", "settled", "grant_seq", "held"])
@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_a_heartbeat_with_an_impossible_number_is_malformed(key: str, value: Any) -> None:
    kit = Kit()
    kit.hello()

    assert kit.beat(**{key: value})["error"] == "malformed"


@pytest.mark.parametrize("value", [-1.0, math.nan, -math.inf, "1", True])
@pytest.mark.parametrize("op", ["heartbeat", "get", "stop"])
def test_an_impossible_wait_is_malformed(op: str, value: Any) -> None:
    kit = Kit()
    kit.hello()

    assert kit.ask(op, **(kit.beat_keys() | {"wait_s": value}))["error"] == "malformed"


def test_an_endless_wait_ends_within_its_limit() -> None:
    kit = Kit()
    kit.hello()
    beat = kit.send("heartbeat", wait_s=math.inf, **kit.beat_keys())
    pull = kit.send("get", wait_s=math.inf, newer_than=list(kit.core.name))

    kit.wait(0.05)
    assert len(kit.replies_to(beat)) == 1
    kit.wait(5.0)
    assert kit.replies_to(pull)[0].header["unchanged"]


@pytest.mark.parametrize("op", ["heartbeat", "leave"])
def test_whoever_speaks_for_a_worker_must_be_it(op: str) -> None:
    kit = Kit()
    kit.hello()
    keys = kit.beat_keys()

    assert kit.ask(op, **(keys | {"worker": "v"}))["error"] == "unknown_worker"
    assert kit.ask(op, **(keys | {"session": "zero:1"}))["error"] == "unknown_worker"
    assert kit.ask(op, **(keys | {"session": "one:7"}))["error"] == "fenced"
    assert kit.ask(op, **keys, user="mallory", role="worker")["error"] == "forbidden"
    assert kit.ask(op, **(keys | {"session": 1}))["error"] == "malformed"


def test_leave_follows_flush() -> None:
    kit = Kit()
    kit.hello(generated=True)
    kit.push(1)
    keys: dict[str, Any] = {"worker": "w", "session": kit.sessions["w"]}
    assert kit.ask("leave", **keys)["error"] == "invalid"
    kit.work()

    assert kit.ask("leave", client=N, id=1, **keys)["ok"]
    assert kit.ask("leave", client=N, id=1, **keys)["ok"], "the reply may have been lost"
    assert len(kit.state.members) == 0
    assert kit.beat()["error"] == "unknown_worker"


def test_start_and_stop_are_idempotent_and_say_whether_anything_changed() -> None:
    kit = Kit()

    assert [kit.ask(op)["changed"] for op in ("start", "stop", "stop", "start")] == [False, True, False, True]


def test_a_stop_that_drains_applies_what_was_accepted_and_nothing_later() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1, 2)
    drain = kit.send("stop", drain=True)
    kit.push(3)

    kit.work(5)

    assert kit.replies_to(drain)[0].header["drained"]
    assert kit.holder.version == 2
    assert len(kit.state.queue) == 1


def test_a_drain_that_takes_long_is_answered_in_time_and_can_be_asked_for_again() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1, 2)
    first = kit.send("stop", drain=True, wait_s=1.0, client=N, id=1)
    kit.wait(1.0)
    assert not kit.replies_to(first)[0].header["drained"]

    again = kit.send("stop", drain=True, client=N, id=2)
    kit.work(2)

    assert kit.replies_to(again)[0].header["drained"]


def test_a_drain_that_is_asked_for_anew_is_answered_once_it_is_done() -> None:
    """Regression: the deadline of the request that was given up took the waiting one with it."""
    kit = Kit()
    kit.hello()
    kit.push(1)
    kit.send("stop", drain=True, wait_s=1.0, client=N, id=1)
    again = kit.send("stop", drain=True, wait_s=5.0, client=N, id=2)
    kit.wait(2.0)

    kit.work()

    assert [reply.header["drained"] for reply in kit.replies_to(again)] == [True]


@pytest.mark.parametrize("op", ["start", "stop", "clear", "destroy"])
def test_whatever_ends_a_drain_answers_who_waits_for_it(op: str) -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    drain = kit.send("stop", drain=True)

    kit.ask(op)

    assert len(kit.replies_to(drain)) == 1


def test_a_repeated_drain_answers_where_the_repeat_came_from() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    kit.send("stop", drain=True, client=N, id=1, envelope=b"old socket")
    kit.send("stop", drain=True, client=N, id=1, envelope=b"new socket")

    kit.work()

    assert [len(kit.replies_to(name)) for name in (b"old socket", b"new socket")] == [0, 1]


def test_clear_settles_what_is_accepted_at_that_moment() -> None:
    kit = Kit(is_stopped=True)
    kit.hello("a")
    kit.hello("b")
    kit.beat("a")
    kit.push(1, 2, worker="a")

    assert kit.ask("clear")["cleared"] == 2
    kit.push(3, worker="a")
    assert (kit.member("a").settled, len(kit.state.queue), kit.state.outcomes) == (2, 1, {"cleared": 2})


def test_configure_changes_mode_and_numbers_and_tells_what_is_in_force() -> None:
    kit = Kit(rule=SGD(lr=0.1))

    told = kit.ask("configure", settings={"mode": "ASCENT", "lr": 0.5})["settings"]

    assert (told["mode"], told["optimizer"], told["lr"]) == ("ascent", "sgd", 0.5)
    assert kit.ask("configure", settings={})["settings"] == told


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "sideways"},
        {"mode": 3},
        {"mode": []},
        {"mode": "ascent", "lr": -1},
        {"mode": "ascent", "lr": math.nan},
        {"mode": "ascent", "lr": "fast"},
        {"mode": "ascent", "lr": None},
        {"mode": "ascent", "lr": [1]},
        {"mode": "ascent", "lr": 2**64 - 1, "momentum": 5},
        {"mode": "ascent", "speed": 1},
        {"mode": "ascent", "self": 1},
        {"mode": "ascent", "": 1},
    ],
)
def test_configure_is_all_or_nothing(settings: dict[str, Any]) -> None:
    kit = Kit(rule=SGD(lr=0.1))

    assert kit.ask("configure", settings=settings)["error"] == "invalid"
    assert (kit.holder.mode, kit.holder.rule) == ("descent", SGD(lr=0.1))


def test_configure_without_a_rule_has_no_numbers_to_change() -> None:
    assert Kit().ask("configure", settings={"lr": 1.0})["error"] == "invalid"
    assert Kit().ask("configure", settings=[1])["error"] == "malformed"
    assert Kit().ask("configure")["error"] == "malformed"


def test_a_save_is_answered_when_the_file_is_written() -> None:
    kit = Kit(save_path="out.safetensors")
    kit.hello()
    envelope = kit.send("save")
    assert kit.ask("save")["error"] == "failed"
    (effect,) = [effect for effect in kit.effects if isinstance(effect, SaveParameters)]
    kit.push(1, 2, 3)
    kit.work(3)
    assert float(effect.arenas[0].sum()) == 0, "it does not change while it is written"

    kit.handle(SaveEnded(effect.ticket, "out.safetensors", "No space left on device"))

    (reply,) = kit.replies_to(envelope)
    assert (reply.header["error"], "No space left" in reply.header["message"]) == ("failed", True)


def test_a_save_needs_a_place_and_parameters() -> None:
    header = Kit().ask("save")
    assert (header["error"], "--save" in header["message"]) == ("invalid", True)
    assert Kit(None, save_path="out.safetensors").ask("save")["error"] == "no_parameters"


@pytest.mark.parametrize("op", ["leave", "set", "start", "stop", "clear", "configure", "save", "destroy"])
@pytest.mark.parametrize("meant", ["zero", None, 7])
def test_a_mutation_that_means_another_incarnation_is_not_done(op: str, meant: Any) -> None:
    kit = Kit(save_path="out.safetensors")
    kit.hello()

    header = kit.ask(op, frames_of(OTHER), **(kit.beat_keys() | {"incarnation": meant, "settings": {"mode": "ascent"}}))

    assert header["error"] == "restarted"
    assert (kit.core.name, kit.state.is_running, kit.holder.mode) == (("one", 0, 0), True, "descent")


def test_more_workers_than_a_header_holds_are_told_in_parts() -> None:
    """Regression: with about 130 workers the reply was larger than any client accepts."""
    kit = Kit()
    names = [f"{number:03}" + "\N{SNOWMAN}" * 125 for number in range(150)]
    for name in names:
        kit.hello(name, name[:3].encode() * 3)

    told: list[str] = []
    first: int | None = 0
    while first is not None:
        header = kit.ask("workers", first=first)
        told += [worker["id"] for worker in header["workers"]]
        first = header["next"]

    assert told == names
    assert kit.ask("workers", first=10**6)["workers"] == []
    assert kit.ask("workers", first=-1)["error"] == "malformed"
