"""Handing out parameters: at once, when there is news, at the deadline, in ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad.layout import Layout
from distgrad_broker.buffers import N_BUFFERS
from distgrad_broker.holds import SERVED_PARTS
from support.core_kit import LAYOUT, OTHER, Kit, frames_of

# 20 parts of 1 MiB: more than one reply holds.
LARGE = Layout.of(np.zeros(5 << 20, np.float32))
NOTHING_NEW = {"unchanged": True, "parts": 0, "first": 0, "token": None, "layout": False}


def test_a_small_model_comes_whole_in_one_reply() -> None:
    reply = Kit().reply("get")

    assert (reply.header["parts"], reply.header["token"], reply.header["layout"]) == (1, None, True)
    assert [bytes(frame) for frame in reply.frames] == frames_of(LAYOUT)


def test_a_layout_that_the_client_knows_does_not_travel_again() -> None:
    kit = Kit()

    assert len(kit.reply("get", have=LAYOUT.fingerprint).frames) == 1
    assert len(kit.reply("get", have=OTHER.fingerprint).frames) == 2


@pytest.mark.parametrize("wait_s", [0.0, 5.0])
def test_without_parameters_the_answer_is_clear_and_comes_at_once(wait_s: float) -> None:
    assert Kit(None).ask("get", wait_s=wait_s)["error"] == "no_parameters"


@pytest.mark.parametrize("newer_than", [["zero", 0, 99], ["one", 7, 99]])
def test_another_incarnation_or_generation_counts_as_old(newer_than: list[Any]) -> None:
    assert not Kit().ask("get", newer_than=newer_than, wait_s=5.0)["unchanged"]


def test_what_is_not_newer_is_not_sent() -> None:
    header = Kit().ask("get", newer_than=["one", 0, 0])

    assert {key: header[key] for key in NOTHING_NEW} == NOTHING_NEW


def test_a_pull_waits_for_the_next_update() -> None:
    kit = Kit()
    kit.hello()
    pull = kit.send("get", newer_than=["one", 0, 0], wait_s=5.0)
    kit.push(1, value=np.nan)
    kit.push(2)
    kit.work()
    assert not kit.replies_to(pull), "a refused gradient is no news"

    kit.work()

    (reply,) = kit.replies_to(pull)
    assert (reply.header["version"], reply.header["unchanged"]) == (1, False)
    kit.wait(10.0)
    assert len(kit.replies_to(pull)) == 1


@pytest.mark.parametrize(("frames", "error"), [(frames_of(OTHER), None), ([], "no_parameters")])
def test_a_pull_that_waits_hears_that_the_parameters_were_replaced_or_taken_away(
    frames: list[bytes], error: str | None
) -> None:
    kit = Kit()
    pull = kit.send("get", newer_than=["one", 0, 0], wait_s=5.0)

    kit.ask("set", frames, absent=not frames)

    assert kit.replies_to(pull)[0].header.get("error") == error


@pytest.mark.parametrize("client", [None, b"c" * 16])
def test_a_repeat_replaces_the_pull_that_waits(client: bytes | None) -> None:
    kit = Kit()
    kit.hello()
    keys: dict[str, Any] = {"newer_than": ["one", 0, 0], "wait_s": 5.0, "client": client}
    kit.send("get", envelope=b"socket", id=1, **keys)
    kit.send("get", envelope=b"socket" if client is None else b"new socket", id=2, **keys)

    kit.push(1)
    kit.work()

    replies = kit.replies_to(b"socket") + kit.replies_to(b"new socket")
    assert [reply.header["id"] for reply in replies] == [2]
    assert not kit.state.pulls


@pytest.mark.parametrize(
    "keys",
    [
        {"have": "text"},
        {"have": 1.0},
        {"newer_than": 5},
        {"newer_than": ["one", 0]},
        {"newer_than": ["one", 0, None]},
        {"newer_than": [1, 0, 0]},
        {"newer_than": {"a": 1}},
    ],
)
def test_a_bad_get_is_malformed(keys: dict[str, Any]) -> None:
    assert Kit().ask("get", **keys)["error"] == "malformed"


def test_a_large_model_is_read_in_ranges_of_one_version_while_updates_go_on() -> None:
    kit = Kit(LARGE)
    kit.hello()
    first = kit.reply("get", have=LARGE.fingerprint)
    token, parts = first.header["token"], first.header["parts"]
    kit.push(1, layout=LARGE)
    kit.work()

    frames = list(first.frames)
    while len(frames) < parts:
        frames += kit.reply("range", token=token, first=len(frames)).frames

    assert (parts, len(first.frames), len(frames)) == (20, SERVED_PARTS, 20)
    assert all(bytes(frame) == bytes(len(frame)) for frame in frames)
    assert kit.total == -LARGE.arenas[0].size


def test_twenty_who_follow_a_large_model_hold_one_version_of_it_while_updates_go_on() -> None:
    kit = Kit(LARGE)
    kit.hello()
    versions = kit.state.versions
    wanted: dict[str, Any] = {"newer_than": ["one", 0, 0], "wait_s": 5.0, "have": LARGE.fingerprint}
    pulls = [kit.send("get", client=b"reader %9d" % index, id=1, **wanted) for index in range(20)]
    assert len(kit.state.pulls) == 20

    kit.push(1, layout=LARGE)
    kit.work()
    begun = [kit.replies_to(pull)[0] for pull in pulls]
    for number in range(2, 7):
        kit.push(number, layout=LARGE)
        kit.work()

    held = {id(hold.storage) for hold in versions._buffers.holds.values()}
    assert (len(versions._buffers.holds), len(held), versions.held, versions.version) == (20, 1, 1, 6)
    assert len(held | {id(storage) for storage in (versions.holder.storage, *versions._buffers.spares)}) <= N_BUFFERS
    for reply in begun:
        assert reply.header["version"] == 1
        first = len(reply.frames)
        while first < reply.header["parts"]:
            rest = kit.reply("range", token=reply.header["token"], first=first)
            assert {float(np.frombuffer(part, np.float32)[0]) for part in rest.frames} == {-1.0}
            first += len(rest.frames)
    # As if ZeroMQ had sent it all.
    kit.effects.clear()
    del begun, reply, rest
    assert (versions.held, versions.revoked) == (0, 0)


def test_a_token_of_parameters_that_were_replaced_is_revoked() -> None:
    kit = Kit(LARGE)
    token = kit.reply("get").header["token"]
    kit.ask("set", frames_of(LAYOUT))

    assert kit.ask("range", token=token, first=16)["error"] == "revoked"


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"token": "nonsense", "first": 0}, "revoked"),
        ({"token": None, "first": 0}, "malformed"),
        ({"token": 1, "first": 0}, "malformed"),
        ({"token": "s1", "first": -1}, "malformed"),
        ({"token": "s1"}, "malformed"),
        ({"token": "s1", "first": 2**63}, "malformed"),
    ],
)
def test_a_bad_range_is_answered(keys: dict[str, Any], error: str) -> None:
    assert Kit().ask("range", **keys)["error"] == error


def test_a_range_beyond_the_end_is_empty() -> None:
    kit = Kit(LARGE)
    token = kit.reply("get").header["token"]

    assert list(kit.reply("range", token=token, first=2**62).frames) == []


def test_a_worker_that_pulls_in_its_session_hears_what_is_settled() -> None:
    kit = Kit()
    session = kit.hello()["session"]
    kit.push(1, 2)
    kit.work()

    told = kit.ask("get", worker="w", session=session, pushed=2)
    assert (told["settled"], told["superseded"]) == (1, 0)
    kit.work()
    assert kit.ask("get", worker="w", session=session, pushed=2)["settled"] == 2


@pytest.mark.parametrize("keys", [{}, {"worker": "w"}, {"worker": "w", "session": "one:9"}, {"session": "one:1"}])
def test_whoever_is_not_in_the_session_hears_nothing_of_it(keys: dict[str, Any]) -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    kit.work()

    assert "settled" not in kit.ask("get", **keys)


def test_a_pull_tells_nothing_beyond_a_refusal_that_a_heartbeat_has_to_tell() -> None:
    kit = Kit()
    session = kit.hello()["session"]
    kit.push(1)
    kit.push(2, value=np.nan)
    kit.push(3)
    kit.work(3)

    assert kit.ask("get", worker="w", session=session)["settled"] == 1

    kit.beat(sent=3, settled=3)
    assert kit.ask("get", worker="w", session=session)["settled"] == 3


def last_pull(kit: Kit, **keys: Any) -> bytes:
    """Make the pull that gradients may ask for again, with the envelope and client of its replies."""
    wanted: dict[str, Any] = {"worker": "w", "session": kit.sessions["w"], "own": True, "wait_s": 5.0}
    wanted |= {"client": b"c" * 16, "id": 1, "have": LAYOUT.fingerprint}
    return kit.send("get", envelope=b"socket", **{**wanted, **keys})


def test_a_gradient_may_ask_for_its_workers_last_pull_once_more() -> None:
    kit = Kit()
    kit.hello()
    pull = last_pull(kit)
    for number in (1, 2):
        kit.push(number, asks=7 + number)
        assert len(kit.replies_to(pull)) == number, "it waits until its gradient is decided on"
        kit.work()

    first, second, third = kit.replies_to(pull)
    assert [reply.header["id"] for reply in (first, second, third)] == [1, 8, 9]
    assert [reply.header["version"] for reply in (first, second, third)] == [0, 1, 2]
    assert (third.header["settled"], third.header["layout"], len(third.frames)) == (2, False, 1)
    assert not kit.state.pulls


def test_a_pull_whose_gradient_is_cleared_waits_no_longer() -> None:
    """Regression: it waited for its five seconds."""
    kit = Kit()
    kit.hello()
    kit.ask("stop")
    kit.push(1)
    pull = last_pull(kit, pushed=1)
    assert kit.replies_to(pull) == []

    kit.ask("clear")

    (reply,) = kit.replies_to(pull)
    assert (reply.header["version"], reply.header["settled"]) == (0, 1)


def test_what_a_gradient_asks_for_has_it_whatever_the_last_pull_was_content_with() -> None:
    kit = Kit()
    kit.hello()
    pull = last_pull(kit, own=False, newer_than=["one", 0, 7])
    kit.push(1, asks=8)
    assert kit.replies_to(pull) == []

    kit.work()

    (reply,) = kit.replies_to(pull)
    assert (reply.header["id"], reply.header["version"]) == (8, 1)


def test_a_pull_that_a_gradient_asked_for_waits_no_longer_than_the_pull_itself_did() -> None:
    kit = Kit()
    kit.hello()
    pull = last_pull(kit)
    kit.push(1, asks=8)

    kit.wait(6.0)

    assert [reply.header["unchanged"] for reply in kit.replies_to(pull)] == [False, True]


@pytest.mark.parametrize(
    "keys", [{"session": None}, {"session": "one:99"}, {"wait_s": 0.0}, {"worker": None}, {"user": "somebody else"}]
)
def test_only_a_workers_own_pull_that_may_wait_is_asked_for_again(keys: dict[str, Any]) -> None:
    kit = Kit()
    kit.hello()
    pull = last_pull(kit, **keys)

    kit.push(1, asks=8)
    kit.work()

    assert len(kit.replies_to(pull)) == 1


def test_what_is_dropped_asks_for_nothing_and_a_new_session_has_no_last_pull() -> None:
    kit = Kit()
    kit.hello()
    pull = last_pull(kit)
    kit.push(1)
    kit.push(1, asks=8)
    kit.push(3, asks=9)
    kit.hello(nonce=b"its next process")
    kit.push(2, asks=10)
    kit.work(3)

    assert len(kit.replies_to(pull)) == 1
    assert not kit.state.pulls


def test_a_gradient_that_comes_after_its_client_has_asked_by_itself_takes_nothing_from_that() -> None:
    """As after Ctrl-C: the gradient is sent later than the next pull, whose reply is the one that is waited for."""
    kit = Kit()
    kit.hello()
    last_pull(kit)
    pull = last_pull(kit, id=9, pushed=2)

    kit.push(1, asks=8)
    kit.push(2)
    kit.work(2)

    assert [reply.header["id"] for reply in kit.replies_to(pull)][-1] == 9
    assert kit.replies_to(pull)[-1].header["version"] == 2
