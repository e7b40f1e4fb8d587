"""One test, or more, for each of the protocol's rules 11 to 20: control channel, parameters, updates, leases."""

from __future__ import annotations

import threading
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from distgrad.executor import Executor
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.policies import Staleness
from distgrad.rules import SGD, Adam
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.core_kit import LAYOUT, OTHER, Kit, frames_of

N = b"n" * 16
MIXED = {"half": np.zeros(3, np.float16), "single": np.zeros(5, np.float32), "double": np.zeros(2, np.float64)}


def test_rule_11_a_heartbeat_is_answered_within_50_ms_and_at_once_on_news() -> None:
    kit = Kit()
    kit.hello()
    waits = kit.send("heartbeat", wait_s=3.0, **kit.beat_keys())
    kit.wait(0.05)
    assert len(kit.replies_to(waits)) == 1

    kit.push(1)
    waits = kit.send("heartbeat", wait_s=0.05, until=1, **kit.beat_keys())
    kit.work()
    assert kit.replies_to(waits)[0].header["settled"] == 1


def test_rule_11_a_pull_that_waits_holds_up_neither_lease_nor_settled_numbers() -> None:
    with Broker(parameters=MIXED) as broker, Worker(broker.address) as worker, Worker(broker.address) as other:
        pulled: list[int] = []
        first = other.pull()
        puller = threading.Thread(target=lambda: pulled.append(other.pull(newer_than=first, timeout=20.0).version))
        puller.start()
        for _ in range(3):
            other.push(MIXED)
        other.flush(timeout=20.0)
        puller.join()
        worker.push(MIXED)

    assert pulled[0] >= 1


@pytest.mark.parametrize("envelope", [[b""], [b"id", b""], [b"\x00" * 4, b"more", b""]])
def test_rule_12_an_envelope_comes_back_verbatim_up_to_the_empty_frame(envelope: list[bytes]) -> None:
    with Broker(parameters=MIXED) as broker, zmq.Context() as ctx, ctx.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(broker.address)
        socket.send_multipart([*envelope, msgpack.packb({"v": 1, "op": "status", "id": 3})])
        assert socket.poll(20_000)
        frames = socket.recv_multipart()

    assert frames[: len(envelope)] == envelope
    assert msgpack.unpackb(frames[len(envelope)])["id"] == 3


def test_rule_12_a_client_that_never_reads_does_not_hold_up_another() -> None:
    large = np.zeros(1 << 20, np.float32)
    with Broker(parameters=large) as broker, zmq.Context() as ctx, ctx.socket(zmq.DEALER) as deaf:
        deaf.linger, deaf.rcvhwm = 0, 1
        deaf.connect(broker.address)
        for _ in range(100):
            deaf.send_multipart([b"", msgpack.packb({"v": 1, "op": "get"})])
        with Worker(broker.address, timeout=20.0) as worker:
            worker.push(large)
            worker.flush(timeout=20.0)
            assert worker.settled == 1


def test_rule_12_a_repeat_of_a_waiting_request_replaces_it_and_a_wait_ends_within_5_s() -> None:
    kit = Kit()
    keys: dict[str, Any] = {"newer_than": list(kit.core.name), "wait_s": 60.0, "client": N, "id": 1}
    first = kit.send("get", **keys)
    again = kit.send("get", **keys)

    kit.wait(5.0)

    assert [len(kit.replies_to(envelope)) for envelope in (first, again)] == [0, 1]


def test_rule_13_a_retried_mutation_is_done_once_and_never_across_a_restart() -> None:
    kit = Kit(is_stopped=True)
    kit.hello()
    kit.push(1)
    first = kit.ask("clear", client=N, id=1)
    kit.push(2)
    assert kit.ask("clear", client=N, id=1) == first
    assert len(kit.state.queue) == 1

    after = Kit(incarnation="two").ask("clear", client=N, id=1, incarnation="one")
    assert after["error"] == "restarted"


def test_rule_14_ranges_are_of_one_version_and_slow_readers_pin_little_and_delay_nothing() -> None:
    layout = Layout.of(np.zeros(5 << 20, np.float32))
    kit = Kit(layout)
    kit.hello()
    tokens = []
    for number in range(1, 3):
        tokens.append(kit.reply("get").header["token"])
        kit.effects.clear()  # as the shell drops a reply that is sent, and with it what was lent
        kit.push(number, layout=layout)
        kit.work()
    waits = kit.send("get")
    for number in range(3, 6):
        kit.push(number, layout=layout)
        kit.work()
    assert kit.holder.version == 5, "readers that do not read on delay no update"
    assert kit.ask("status")["status"]["snapshots_held"] == 2
    assert not kit.replies_to(waits), "a third version is not read beside them"

    kit.wait(1.1)
    kit.wait(0.01)
    (served,) = kit.replies_to(waits)
    assert served.header["version"] == 5
    assert kit.ask("range", token=tokens[0], first=16)["error"] == "revoked"
    last = kit.reply("range", token=served.header["token"], first=16)
    assert {float(value) for frame in last.frames for value in np.frombuffer(frame, np.float32)[:: 1 << 15]} == {-5.0}
    assert kit.reply("get").header["parts"] == 20
    assert Kit().reply("get").header["token"] is None, "a small model comes in one reply"


def test_rule_15_another_incarnation_or_generation_is_answered_at_once_and_counts_as_stale() -> None:
    kit = Kit(policy=Staleness(max_staleness=5))
    kit.hello()
    old = list(kit.core.name)
    kit.ask("set", frames_of(LAYOUT))

    assert not kit.ask("get", newer_than=old, wait_s=5.0)["unchanged"]
    kit.push(1, base=old)
    kit.push(2, base=["zero", 1, 0])
    kit.push(3, base=list(kit.core.name))
    kit.work(3)
    assert kit.state.outcomes == {"superseded": 2, "applied": 1}
    kit.ask("destroy")
    assert kit.core.name.generation == 2


def test_rule_16_set_keeps_version_and_numbers_resets_the_rules_state_and_queued_gradients_that_fit_still_apply() -> (
    None
):
    kit = Kit(rule=SGD(lr=1.0, momentum=0.5), is_stopped=True)
    kit.hello()
    kit.push(1, 2)
    kit.push(3, layout=OTHER)
    kit.ask("start")
    kit.work()
    assert kit.ask("set", frames_of(LAYOUT, 10.0))["changed"]
    assert kit.core.name == ("one", 1, 1)

    kit.work(2)

    assert kit.total == 8 * (10 - 1), "without the momentum of before"
    assert kit.state.refused == {"layout": 1}
    assert kit.member().settled == 3


def test_rule_16_one_of_many_offers_wins_and_leave_follows_flush() -> None:
    kit = Kit(None)
    assert [kit.ask("set", frames_of(LAYOUT), if_absent=True)["changed"] for _ in range(3)] == [True, False, False]
    kit.hello()
    kit.push(1)
    assert kit.ask("leave", **kit.beat_keys())["error"] == "invalid"
    kit.work()
    assert kit.ask("leave", **kit.beat_keys())["ok"]


@pytest.mark.parametrize(
    ("rule", "value", "reason"),
    [
        *((rule, np.nan, "not_finite") for rule in (None, SGD(lr=0.1), SGD(lr=0.1, momentum=0.9), Adam())),
        (Adam(), 1e30, "overflow"),
    ],
)
def test_rule_17_a_refused_gradient_has_changed_nothing_not_even_the_rules_state(
    rule: Any, value: float, reason: str
) -> None:
    kits = Kit(rule=rule), Kit(rule=rule)
    bad = np.ones(8, np.float32)
    bad[7] = value
    for kit in kits:
        kit.hello()
        kit.push(1)
        kit.work()
    kits[0].push(2, parts=[bad.tobytes()])
    kits[0].work()
    assert kits[0].state.refused == {reason: 1}

    for kit in kits:
        kit.push(kit.member().accepted + 1)
        kit.work()

    one, other = (kit.holder.storage for kit in kits)
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one.arenas[0], other.arenas[0])


def test_rule_18_arenas_travel_in_dtype_order_and_parts_end_on_whole_elements_of_one_arena() -> None:
    layout = Layout.of(MIXED)
    half, single, double = (np.arange(size).astype(dtype) for size, dtype in ((3, "f2"), (5, "f4"), (2, "f8")))
    with (
        Broker(parameters=MIXED) as broker,
        zmq.Context() as ctx,
        ctx.socket(zmq.REQ) as control,
        ctx.socket(zmq.PUSH) as gradients,
    ):
        control.linger = gradients.linger = 0
        control.connect(broker.address)

        def ask(**keys: Any) -> tuple[dict[str, Any], list[bytes]]:
            control.send(msgpack.packb({"v": 1, **keys}))
            assert control.poll(20_000)
            header, *frames = control.recv_multipart()
            return msgpack.unpackb(header), frames

        told, _ = ask(op="hello", worker="w", nonce=N)
        gradients.connect(told["gradients"])
        header = {"v": 1, "kind": "gradient", "worker": "w", "session": told["session"], "attempt": 1}
        header |= {"fingerprint": layout.fingerprint}
        # Cut as no distgrad worker cuts them, so that frames of odd lengths and places come in.
        good = [half[:1], half[1:], single[:4], single[4:], double[:1], double[1:]]
        spanning = [half.tobytes() + single.tobytes(), double.tobytes()]
        gradients.send_multipart([msgpack.packb(header | {"number": 1}), *(part.tobytes() for part in good)])
        gradients.send_multipart([msgpack.packb(header | {"number": 2}), *spanning])
        beat = {"op": "heartbeat", "worker": "w", "session": told["session"], "attempt": 1, "held": 0}
        beat |= {"settled": 0, "grant_seq": told["grant_seq"], "sent": 2}
        while True:
            reply, _ = ask(**beat)
            if reply["settled"] == 2:
                break
        _, (_, *parts) = ask(op="get")

    assert [refusal[1] for refusal in reply["refused"]] == ["malformed"]
    assert b"".join(parts) == b"".join((0 - array).tobytes() for array in (half, single, double))


def test_rule_19_bits_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(19)
    start, steps = rng.standard_normal(300_001), rng.standard_normal((3, 300_001))
    results = []
    for threads in (1, 2, 3):
        holder = ParameterHolder(rule=Adam(lr=0.1), threads=threads, executor=Executor().kind)
        holder.set_nest(start)
        for step in steps:
            holder.apply([step])
        results.append(np.asarray(holder.nest()))
        holder.close()

    assert all(np.array_equal(results[0], result) for result in results)


def test_rule_20_time_in_which_the_loop_was_busy_does_not_count_and_what_came_meanwhile_is_heard_first() -> None:
    kit = Kit()
    kit.hello()
    kit.now += 60.0
    kit.push(1)
    assert kit.member().state == "live", "nothing is judged before the sockets are drained"
    kit.wait(0.0, busy_s=45.0)
    assert kit.member().state == "live"
    kit.wait(15.0)
    assert kit.member().state == "silent"


def test_rule_20_expiry_takes_grant_and_membership_but_never_session_number_or_cursor() -> None:
    kit = Kit(is_stopped=True)
    before = kit.hello()
    kit.push(1, cursor="here")
    kit.wait(31.0)
    assert kit.ask("workers")["workers"][0]["grant_bytes"] == 0

    reply = kit.beat(sent=1)
    again = kit.hello()

    assert (reply["accepted"], again["session"], again["cursor"]) == (1, before["session"], "here")
    assert again["grant"] == before["grant"]
    kit.wait(29.0)
    assert kit.member().state == "live", "whoever comes back gets a full lease"
