"""The core's clockwork: what is checked before anything is done, repeats, deadlines, and the ways to end."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad import wire
from distgrad.errors import MalformedMessage
from distgrad_broker.events import (
    BadRequestReceived,
    Log,
    MessageRejected,
    Reply,
    RequestReceived,
    SaveEnded,
    Shutdown,
    ShutdownAsked,
)
from distgrad_broker.operations import OPERATIONS
from distgrad_broker.requests import RequestError
from support.core_kit import LAYOUT, ONE, OTHER, Kit, frames_of


def test_an_unknown_operation_is_answered_with_the_names_of_those_that_exist() -> None:
    header = Kit().ask("fly")

    assert (header["ok"], header["error"]) == (False, "unknown_op")
    assert all(name in header["message"] for name in OPERATIONS)


@pytest.mark.parametrize("op", [None, 7, ["get"], {"a": 1}, b"get", ""])
def test_an_operation_of_a_wrong_type_is_unknown(op: Any) -> None:
    assert Kit().ask(op)["error"] == "unknown_op"


@pytest.mark.parametrize(
    "keys",
    [
        {"client": "text", "id": 1},
        {"client": b"short", "id": 1},
        {"client": b"x" * 65, "id": 1},
        {"client": b"x" * 16},
        {"client": b"x" * 16, "id": "one"},
        {"client": b"x" * 16, "id": True},
    ],
)
def test_a_client_needs_a_nonce_and_an_integer_id(keys: dict[str, Any]) -> None:
    assert Kit().ask("status", **keys)["error"] == "malformed"


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        ("worker", {"hello", "heartbeat", "share", "leave", "get", "range", "set", "offer", "status"}),
        ("admin", set(OPERATIONS) - {"hello", "heartbeat", "share", "leave"}),
        ("read", {"get", "range", "status", "workers"}),
        ("", set()),
        (None, set(OPERATIONS)),
    ],
)
def test_each_role_may_ask_for_its_operations_and_no_others(role: str | None, allowed: set[str]) -> None:
    for op in OPERATIONS:
        header = Kit().ask(op, role=role, user="key", if_absent=True)

        assert (header.get("error") != "forbidden") == (op in allowed), op


def test_nothing_is_remembered_of_a_request_that_its_role_forbids() -> None:
    kit = Kit()

    kit.ask("clear", role="read", user="key", client=b"x" * 16, id=1)

    assert kit.state.remembered.find(("key", b"x" * 16), 1) == (False, None)
    assert kit.state.rejected == {"forbidden": 1}


def test_what_the_shell_could_not_read_is_counted_and_answered() -> None:
    kit = Kit()

    (reply,) = kit.handle(BadRequestReceived((b"who", b""), "not msgpack", "malformed"))
    kit.handle(MessageRejected("forbidden"))

    assert isinstance(reply, Reply)
    assert (reply.header["error"], reply.header["message"]) == ("malformed", "not msgpack")
    assert kit.state.rejected == {"malformed": 1, "forbidden": 1}


def test_a_repeated_mutation_is_answered_from_memory_and_not_done_again() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    first = kit.ask("clear", client=b"c" * 16, id=5)
    kit.push(2)

    again = kit.ask("clear", client=b"c" * 16, id=5)

    assert first == again
    assert first["cleared"] == 1
    assert len(kit.state.queue) == 1


def test_a_repeated_failure_is_answered_from_memory_too() -> None:
    kit = Kit()
    first = kit.ask("configure", settings={"mode": "sideways"}, client=b"c" * 16, id=5)

    assert kit.ask("configure", settings={"mode": "ascent"}, client=b"c" * 16, id=5) == first
    assert kit.holder.mode == "descent"


def test_the_same_id_of_another_key_is_another_request() -> None:
    kit = Kit()
    kit.hello()
    kit.ask("stop", client=b"c" * 16, id=5, user="one", role="admin")

    assert kit.ask("clear", client=b"c" * 16, id=5, user="two", role="admin")["cleared"] == 0


def test_after_destroy_everything_is_answered_with_destroyed_but_its_own_repeat() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    reply = kit.ask("destroy", client=b"c" * 16, id=1)
    kit.push(2)

    assert reply["ok"]
    assert kit.ask("destroy", client=b"c" * 16, id=1) == reply
    assert {kit.ask(op)["error"] for op in OPERATIONS} == {"destroyed"}
    assert kit.state.outcomes == {"cleared": 1}
    assert kit.state.dropped == {"closing": 1}
    assert sum(isinstance(effect, Shutdown) for effect in kit.effects) == 1


def test_destroy_answers_all_who_wait() -> None:
    kit = Kit()
    kit.hello()
    beat = kit.send("heartbeat", wait_s=0.05, **kit.beat_keys())
    pull = kit.send("get", newer_than=list(kit.core.name), wait_s=5.0)
    kit.push(1)
    drain = kit.send("stop", drain=True)

    kit.ask("destroy")

    assert [len(kit.replies_to(envelope)) for envelope in (beat, pull, drain)] == [1, 1, 1]


def test_a_closing_broker_applies_what_is_queued_and_takes_nothing_new() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    kit.handle(ShutdownAsked())
    kit.push(2)

    assert kit.hello("late")["error"] == "failed"
    before = kit.core.is_drained
    kit.work()
    assert (before, kit.core.is_drained) == (False, True)
    assert (kit.state.outcomes, kit.state.dropped) == ({"applied": 1}, {"closing": 1})


def test_a_closing_broker_waits_for_a_save_that_is_under_way() -> None:
    kit = Kit(save_path="out.safetensors")
    envelope = kit.send("save")
    kit.handle(ShutdownAsked())
    before = kit.core.is_drained

    kit.handle(SaveEnded(1, "out.safetensors", None))

    assert (before, kit.core.is_drained) == (False, True)
    assert kit.replies_to(envelope)[0].header["path"] == "out.safetensors"


def test_a_deadline_is_told_as_long_as_somebody_waits() -> None:
    kit = Kit()
    kit.hello()
    assert kit.core.next_deadline() is None
    kit.send("get", newer_than=list(kit.core.name), wait_s=3.0)
    kit.send("heartbeat", wait_s=9.0, **kit.beat_keys())
    assert kit.core.next_deadline() == pytest.approx(kit.now + 0.05)

    kit.wait(0.05)

    assert kit.core.next_deadline() == pytest.approx(kit.now + 2.95)
    kit.wait(3.0)
    assert kit.core.next_deadline() is None


def test_the_parameters_at_the_start_must_fit_in_the_budget() -> None:
    with pytest.raises(RequestError, match="raise it to at least 1024"):
        Kit(queue_bytes=1000)


def test_a_life_is_told_in_a_few_lines() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1, value=np.nan)
    kit.push(2, value=np.nan)
    kit.work(2)
    kit.ask("stop")
    kit.ask("stop")
    kit.wait(31.0)
    kit.hello()

    lines = [effect for effect in kit.effects if isinstance(effect, Log)]
    phrases = [line.phrase for line in lines if line.level > logging.DEBUG]
    assert phrases == ["worker joined", "gradient refused", "updater stopped", "worker silent", "worker is back"]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.sampled_from(["w", "one", "one:1", "descent", b"n" * 16, b"", "", [], {}, ["one", 0, 0], LAYOUT.fingerprint]),
    st.text(max_size=5),
    st.dictionaries(st.sampled_from(["mode", "lr", "self"]), st.sampled_from(["ascent", 1, None, -1e300, [], {}])),
)
KEYS = [
    *("worker", "nonce", "session", "lowest", "generated", "attempt", "sent", "settled", "grant_seq", "held", "want"),
    *("until", "wait_s", "fingerprint", "newer_than", "have", "token", "first", "absent", "if_absent", "drain"),
    *("settings", "incarnation", "client", "id"),
]

REQUEST = st.tuples(st.sampled_from(list(OPERATIONS)), st.dictionaries(st.sampled_from(KEYS), VALUES))


@settings(max_examples=150, deadline=None)
@given(st.lists(REQUEST, max_size=8))
def test_no_request_however_odd_stops_the_core_or_goes_unanswered(requests: list[tuple[str, dict[str, Any]]]) -> None:
    kit = Kit(save_path="out.safetensors")
    envelopes: list[bytes] = []
    for op, keys in requests:
        header = {"v": 1, "op": op, "incarnation": "one", **({"worker": "w", "session": "one:1"} | keys)}
        envelopes.append(b"request %d" % len(envelopes))
        kit.handle(RequestReceived((envelopes[-1], b""), header, [b"\x80"] if keys.get("if_absent") else []))
    for ticket in list(kit.state.saves):
        kit.handle(SaveEnded(ticket, "out.safetensors", None))
    kit.wait(6.0)

    for reply in kit.effects:
        if isinstance(reply, Reply):
            assert len(wire.pack(reply.header)) < wire.MAX_HEADER_BYTES
    # One heartbeat replaces another of the same worker that waits, and one request another of the same client.
    replaceable = ("heartbeat", "get", "stop", "save")
    for (op, _), envelope in zip(requests, envelopes, strict=True):
        count = len(kit.replies_to(envelope))
        assert count == 1 or (count == 0 and op in replaceable)


HEADER = st.fixed_dictionaries(
    {"number": st.integers(1, 3)},
    optional={
        "base": st.sampled_from([None, ["one", 0, 0], ["one", 0, -(2**63)], ["one", 0, 2**64 - 1], ["x", 9, 9]]),
        "encoding": st.sampled_from(["raw", "zip", ""]),
        "examples": st.sampled_from([0, 1, 2**63 - 1]),
        "loss": st.sampled_from([None, 1, float("nan"), float("-inf"), 2**64 - 1]),
        "cursor": st.sampled_from([None, b"", "text", b"x" * 4096]),
        "attempt": st.integers(1, 2**64 - 1),
        "fingerprint": st.sampled_from([LAYOUT.fingerprint, OTHER.fingerprint, 0, -1]),
    },
)
PARTS = st.one_of(st.none(), st.lists(st.binary(max_size=40), max_size=4))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(HEADER, PARTS), max_size=8))
def test_no_gradient_however_odd_stops_the_core_or_stays_queued(messages: list[tuple[dict[str, Any], Any]]) -> None:
    kit = Kit()
    kit.hello()
    for keys, parts in messages:
        try:
            kit.handle(kit.gradient(keys.pop("number"), parts=parts, **keys))
        except MalformedMessage:
            continue
    kit.work(len(messages))

    assert not kit.state.queue
    assert kit.member().settled == kit.member().accepted
    assert kit.ask("workers")["workers"][0]["accepted"] == kit.member().accepted
    assert kit.ask("status")["ok"]
    assert kit.beat()["settled"] == kit.member().settled


def test_the_examples_of_many_gradients_still_fit_in_a_header() -> None:
    kit = Kit()
    kit.hello()
    for number in range(1, 5):
        kit.push(number, examples=2**63 - 1)
        kit.work()

    assert kit.ask("workers")["workers"][0]["examples"] == 2**63 - 1


def test_a_set_that_is_cut_short_leaves_budget_and_parameters_as_they_were() -> None:
    kit = Kit(queue_bytes=4 * ONE)
    kit.hello()
    frames = frames_of(OTHER)

    assert kit.ask("set", [frames[0], frames[1][:-4]])["error"] == "malformed"
    assert kit.state.fingerprint == LAYOUT.fingerprint
    assert kit.state.generation == 0
