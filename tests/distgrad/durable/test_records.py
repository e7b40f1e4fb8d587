"""Records on their way to the disk: their order and numbers, and who waits for them."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from distgrad import gradient_messages, wire
from distgrad.durable.records import Record, Records


def gradient(number: int, *, payload: bytes = b"12345678", inline: bool = False) -> wire.Gradient:
    header: dict[str, Any] = {"v": 1, "kind": "gradient", "worker": "w", "session": "one:1", "attempt": 1}
    header |= {"number": number, "fingerprint": 5} | ({"payload": payload} if inline else {})
    frame = wire.pack(header)
    parts = [] if inline else [payload]
    made = gradient_messages.parse_gradient(wire.unpack(frame), parts, sum(map(len, parts)))
    made.frame = frame
    return made


def content(record: Record) -> Any:
    return msgpack.unpackb(record.header)


def test_records_are_numbered_from_the_last_durable_one_on_and_taken_once_in_order() -> None:
    records = Records(7, keeps_gradients=True)
    first, second = gradient(1), gradient(2)

    records.gradient(first)
    given = records.add("silent", worker="w")
    records.gradient(second)

    assert (first.sequence, given, second.sequence, records.sequence) == (8, 9, 10, 10)
    taken = records.take()
    assert [content(record) if index == 1 else record.header for index, record in enumerate(taken)] == [
        first.frame,
        ["silent", {"worker": "w"}],
        second.frame,
    ]
    assert records.take() == []


def test_a_gradients_record_is_its_own_frame_and_its_parts_and_no_second_copy_of_what_is_inline() -> None:
    records = Records(0, keeps_gradients=True)
    raw, inline = gradient(1), gradient(2, inline=True)

    records.gradient(raw)
    records.gradient(inline)

    first, second = records.take()
    assert (first.header, list(first.parts), first.size) == (raw.frame, [b"12345678"], len(raw.frame) + 8)
    assert (second.header, list(second.parts), second.size) == (inline.frame, [], len(inline.frame))


def test_decisions_are_gathered_into_one_record_with_the_version_before_the_first() -> None:
    records = Records(0, keeps_gradients=True)

    records.decided([0, [["w", 1]], None], 4)
    records.decided([0, [["w", 2]], None], 5)

    (record,) = records.take()
    decisions = [[0, [["w", 1]], None], [0, [["w", 2]], None]]
    assert content(record) == ["decided", {"version": 4, "decisions": decisions, "step": {}}]
    records.decided([3, "w", 3], 6)
    assert content(records.take()[0]) == ["decided", {"version": 6, "decisions": [[3, "w", 3]]}]


def test_what_the_policy_remembers_of_the_open_step_goes_with_the_decisions_behind_which_it_is_so() -> None:
    step: dict[str, Any] = {}
    records = Records(0, keeps_gradients=True)
    records.step_memory = lambda: dict(step)

    told = []
    for number, spent in enumerate([[], ["a"], ["a"], ["a", "b"], []]):
        step["spent"] = spent
        records.decided([2, "w", number, "not_finite", None, ""], 0)
        told.append(content(records.take()[0])[1].get("step"))

    assert told == [{"spent": []}, {"spent": ["a"]}, None, {"spent": ["a", "b"]}, {"spent": []}]


@pytest.mark.parametrize("kind", ["gradient", "other"])
def test_decisions_come_before_what_is_noted_after_them(kind: str) -> None:
    records = Records(0, keeps_gradients=True)
    records.decided([3, "w", 1], 0)

    if kind == "gradient":
        records.gradient(gradient(2))
    else:
        records.add("silent", worker="w")
    records.decided([3, "w", 2], 0)

    taken = records.take()
    assert len(taken) == 3
    assert [content(taken[index])[1]["decisions"] for index in (0, 2)] == [[[3, "w", 1]], [[3, "w", 2]]]
    assert records.sequence == 3


def test_gathered_decisions_already_have_the_number_that_their_record_will_have() -> None:
    records = Records(3, keeps_gradients=True)

    records.decided([3, "w", 1], 0)
    promised = records.sequence
    records.decided([3, "w", 2], 0)
    records.take()

    assert promised == records.sequence == 4


@pytest.mark.parametrize("keeps_gradients", [True, False])
def test_a_policys_memory_is_noted_when_it_has_changed_behind_what_changed_it(keeps_gradients: bool) -> None:
    records = Records(0, keeps_gradients=keeps_gradients)
    records.remember({})
    assert records.take() == []

    records.add("left", worker="w")
    records.remember({"members": ["w"]})
    records.remember({"members": ["w"]})
    assert [content(record) for record in records.take()] == [
        ["left", {"worker": "w"}],
        ["remembered", {"memory": {"members": ["w"]}}],
    ]

    records.remember({"members": ["w"]})
    assert records.take() == []
    records.remember({})
    assert [content(record) for record in records.take()] == [["remembered", {"memory": {}}]]


def test_memory_comes_behind_the_decisions_that_changed_it() -> None:
    records = Records(0, keeps_gradients=True)
    records.decided([3, "w", 1], 0)

    records.remember({"members": ["w"]})

    assert [content(record)[0] for record in records.take()] == ["decided", "remembered"]


def test_without_a_journal_of_gradients_only_what_else_happens_is_noted() -> None:
    records = Records(0, keeps_gradients=False)

    records.gradient(gradient(1))
    records.decided([0, [["w", 1]], None], 0)
    records.add("left", worker="w")

    assert [content(record)[0] for record in records.take()] == ["left"]
    assert records.sequence == 1


def test_payloads_are_handed_on_as_they_are() -> None:
    records = Records(0, keeps_gradients=True)
    part = memoryview(bytearray(b"abcd"))

    records.add("set", [part], layout=b"l")

    (record,) = records.take()
    assert record.parts[0] is part
    assert record.size == len(record.header) + 4


def test_bytes_count_all_that_a_recovery_would_have_to_read() -> None:
    records = Records(0, keeps_gradients=True)

    records.gradient(gradient(1))
    records.decided([3, "w", 1], 0)
    records.add("set", [b"abcd"], layout=b"l")

    assert records.bytes == sum(record.size for record in records.take())


def test_who_waits_is_called_in_order_when_the_disk_has_what_was_noted_before_it_waited() -> None:
    records = Records(0, keeps_gradients=True)
    called: list[str] = []
    records.add("silent", worker="a")
    records.when_durable(lambda: called.append("first"))
    records.when_durable(lambda: called.append("second"))
    records.add("silent", worker="b")
    records.when_durable(lambda: called.append("third"))

    records.written(0)
    assert called == []
    records.written(1)
    assert called == ["first", "second"]
    records.written(2)
    assert called == ["first", "second", "third"]
    records.written(2)
    assert len(called) == 3


def test_who_waits_for_nothing_is_called_at_once() -> None:
    records = Records(9, keeps_gradients=True)
    called: list[int] = []

    records.when_durable(lambda: called.append(1))

    assert called == [1]


def test_who_waits_for_gathered_decisions_is_not_called_with_the_record_before_them() -> None:
    records = Records(0, keeps_gradients=True)
    called: list[int] = []
    records.add("silent", worker="a")
    records.decided([3, "w", 1], 0)

    records.when_durable(lambda: called.append(1))
    records.written(1)
    assert called == []
    records.written(2)

    assert called == [1]


def test_what_is_durable_never_goes_back() -> None:
    records = Records(5, keeps_gradients=True)

    records.written(3)

    assert records.durable == 5


def test_who_does_not_wait_any_more_is_not_called_and_not_kept() -> None:
    records = Records(0, keeps_gradients=True)
    called: list[str] = []
    records.add("silent", worker="a")
    first = records.when_durable(lambda: called.append("first"))
    records.when_durable(lambda: called.append("second"))

    records.forget(first)
    records.forget(first)
    records.written(1)

    assert called == ["second"]
