"""Whole parameters over real sockets: every cut, every missing piece, memory that is used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad import codec, ranges, transfer, wire
from distgrad.client import ControlClient
from distgrad.errors import MalformedMessage, NoParameters, SnapshotRevoked
from distgrad.layout import Layout
from support.scripted_broker import Request, ScriptedBroker
from support.shelf import STATE, Shelf

NEST = {
    "a": {"w": np.arange(300_000, dtype=np.float32).reshape(300, 1000), "b": np.array([[1.5]])},
    "half": np.ones((3,), np.float16),
    "steps": np.int64(7),
    "mask": np.array([True, False]),
    "nothing": np.zeros((0, 4), np.float32),
}


def nest_of(fetched: transfer.Fetched | None) -> Any:
    assert fetched is not None
    return fetched.layout.nest(fetched.layout.views(fetched.arenas))


def assert_is_nest(found: Any) -> None:
    layout = Layout.of(NEST)
    assert Layout.of(found) == layout
    for one, other in zip(layout.flatten(NEST), layout.flatten(found), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Request], None]], ControlClient]]:
    opened: list[Any] = []

    def start(script: Callable[[Request], None]) -> ControlClient:
        broker = ScriptedBroker(script).__enter__()
        client = ControlClient(broker.address, timeout=10)
        opened.append((client, broker))
        return client

    yield start
    for client, broker in opened:
        client.close()
        broker.__exit__(None, None, None)


Serve = Callable[[Callable[[Request], None]], ControlClient]


@pytest.mark.parametrize("shelf", [Shelf(NEST), Shelf(NEST, part_bytes=1 << 16, n_first=3, n_range=5)])
def test_all_parts_reach_their_places(serve: Serve, shelf: Shelf) -> None:
    fetched = transfer.fetch(serve(shelf))

    assert_is_nest(nest_of(fetched))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["float16", "float32", "float64", "int8"]), st.integers(0, 40)), min_size=1
    ),
    part_bytes=st.sampled_from([8, 16, 64, 1024]),
    n_first=st.integers(0, 5),
    n_range=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_any_cut_of_any_layout_comes_back_whole(
    sizes: list[tuple[str, int]], part_bytes: int, n_first: int, n_range: list[int]
) -> None:
    nest = {str(index): np.arange(size).astype(dtype) for index, (dtype, size) in enumerate(sizes)}
    shelf = Shelf(nest, part_bytes=part_bytes, n_first=n_first, n_range=n_range)

    with ScriptedBroker(shelf) as broker, ControlClient(broker.address) as client:
        found = nest_of(transfer.fetch(client))

    assert list(found) == list(nest)
    for name, array in nest.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_the_state_is_that_of_the_snapshot_not_of_the_last_range(serve: Serve) -> None:
    fetched = transfer.fetch(serve(Shelf(NEST, part_bytes=1 << 16, n_first=1)))

    assert fetched is not None
    assert fetched.state == STATE


def test_arenas_are_aligned_and_belong_to_the_caller(serve: Serve) -> None:
    fetched = transfer.fetch(serve(Shelf(NEST)))

    assert fetched is not None
    assert all(arena.ctypes.data % 64 == 0 and arena.flags.writeable for arena in fetched.arenas)


def test_nothing_newer_is_none(serve: Serve) -> None:
    client = serve(Shelf(NEST))

    assert transfer.fetch(client, newer_than=wire.State(*STATE), wait_s=1.0) is None
    assert transfer.fetch(client, newer_than=wire.State("one", 1, 41)) is not None


def test_a_known_layout_does_not_travel_again(serve: Serve) -> None:
    shelf = Shelf(NEST)
    client = serve(shelf)
    first = transfer.fetch(client)
    assert first is not None

    second = transfer.fetch(client, have=first.layout)

    assert second is not None
    assert second.layout is first.layout
    assert_is_nest(nest_of(second))
    assert [row["have"] for row in shelf.rows] == [None, shelf.layout.fingerprint]


def test_another_layout_than_the_known_one_is_taken(serve: Serve) -> None:
    fetched = transfer.fetch(serve(Shelf(NEST)), have=Layout.of(np.zeros(3)))

    assert_is_nest(nest_of(fetched))


def test_memory_that_fits_is_used_again(serve: Serve) -> None:
    client = serve(Shelf(NEST))
    first = transfer.fetch(client)
    assert first is not None
    for arena in first.arenas:
        arena[...] = 1

    second = transfer.fetch(client, have=first.layout, out_arenas=first.arenas)

    assert second is not None
    assert all(one is other for one, other in zip(first.arenas, second.arenas, strict=True))
    assert_is_nest(nest_of(second))


def unfit_arenas() -> list[Any]:
    layout = Layout.of(NEST)
    whole = layout.pack(NEST)
    read_only = layout.pack(NEST)
    read_only[0].flags.writeable = False
    return [whole[:-1], [arena[:-1] for arena in whole], [arena.astype(np.int32) for arena in whole], read_only]


@pytest.mark.parametrize("arenas", unfit_arenas())
def test_memory_that_does_not_fit_is_left_alone(serve: Serve, arenas: list[Any]) -> None:
    fetched = transfer.fetch(serve(Shelf(NEST)), out_arenas=arenas)

    assert fetched is not None
    assert not any(np.shares_memory(one, other) for one in fetched.arenas for other in arenas)
    assert_is_nest(nest_of(fetched))


def test_a_revoked_snapshot_is_asked_for_again(serve: Serve) -> None:
    shelf = Shelf(NEST, part_bytes=1 << 18, n_first=1, n_range=1)
    shelf.revocations = transfer.MAX_TRIES - 1

    assert_is_nest(nest_of(transfer.fetch(serve(shelf))))


def test_a_snapshot_that_is_revoked_every_time_ends_in_an_error(serve: Serve) -> None:
    shelf = Shelf(NEST, part_bytes=1 << 18, n_first=1)
    shelf.revocations = transfer.MAX_TRIES
    client = serve(shelf)

    with pytest.raises(SnapshotRevoked):
        transfer.fetch(client)

    # And the client can go on.
    assert_is_nest(nest_of(transfer.fetch(client)))


def test_no_parameters_is_said_as_such(serve: Serve) -> None:
    client = serve(lambda request: request.fail("no_parameters"))

    with pytest.raises(NoParameters):
        transfer.fetch(client)
    with pytest.raises(NoParameters):
        transfer.fetch_layout(client)


def test_the_layout_can_be_fetched_alone(serve: Serve) -> None:
    shelf = Shelf(NEST, part_bytes=1 << 16, n_first=1)

    assert transfer.fetch_layout(serve(shelf)) == shelf.layout
    assert [row["op"] for row in shelf.rows] == ["get"]


def test_ranges_are_asked_for_ahead_and_before_what_came_is_copied(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(NEST, part_bytes=1 << 16, n_first=2, n_range=2)
    client = serve(shelf)
    order: list[str] = []
    fill, send = ranges.Places.fill, ControlClient.send

    def noted_fill(self: Any, parts: Any) -> None:
        order.append("copy")
        fill(self, parts)

    def noted_send(self: Any, op: str, **keys: Any) -> Any:
        order.append(op)
        return send(self, op, **keys)

    monkeypatch.setattr(ranges.Places, "fill", noted_fill)
    monkeypatch.setattr(ControlClient, "send", noted_send)
    transfer.fetch(client)

    ahead = ranges.RANGES_AHEAD
    asked = order.count("range")
    assert asked > ahead
    first, later = ["range"] * ahead, ["copy", "range"] * (asked - ahead)
    assert order == ["get", *first, *later, *["copy"] * (ahead + 1)]
    firsts = [row["first"] for row in shelf.rows if row["op"] == "range"]
    assert firsts == list(range(2, len(shelf.parts), 2)), "each part once"


def damaged(**changes: Any) -> Callable[[Request], None]:
    """Answer a `get` with one thing wrong."""
    layout = Layout.of(np.arange(10.0))

    def script(request: Request) -> None:
        frames = changes.get("frames", [layout.to_frame(), bytes(80)])
        keys: dict[str, Any] = {"unchanged": False, "layout": True, "parts": 1, "first": 0, "token": None}
        keys |= {"state": STATE, "fingerprint": layout.fingerprint, **changes}
        keys.pop("frames", None)
        if request.op == "range":
            request.answer(state=STATE)
        else:
            request.answer(*frames, **keys)

    return script


FRAME = Layout.of(np.arange(10.0)).to_frame()


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": []},
        {"frames": [b"\xc1", bytes(80)]},
        {"frames": [FRAME, bytes(72)]},
        {"frames": [FRAME, bytes(88)]},
        {"frames": [FRAME, bytes(80), bytes(8)]},
        {"frames": [FRAME]},
        {"layout": False},
        {"fingerprint": 1},
        {"parts": None},
        {"parts": -1},
        {"parts": 2},
        {"parts": 2, "token": "t"},
        {"parts": 2, "token": 5},
    ],
)
def test_replies_that_do_not_add_up_are_refused(serve: Serve, changes: dict[str, Any]) -> None:
    client = serve(damaged(**changes))

    with pytest.raises(MalformedMessage):
        transfer.fetch(client)


def test_the_frames_of_a_set_are_the_layout_and_all_parts() -> None:
    layout, frames = transfer.payload(NEST)

    assert bytes(frames[0]) == layout.to_frame()
    assert max(memoryview(part).nbytes for part in frames[1:]) <= wire.PART_BYTES
    arenas = [np.empty(arena.size, arena.dtype) for arena in layout.arenas]
    codec.fill(layout, frames[1:], arenas)
    assert_is_nest(layout.nest(layout.views(arenas)))
