"""Records carried out: what they change, and what does not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import msgpack
import numpy as np
import pytest

from distgrad import gradient_messages, wire
from distgrad.durable.books import LEFT, LIVE, SILENT, MemberBook
from distgrad.durable.replay import APPLIED, CLEARED, REFUSED, SUPERSEDED, ReplayFailed, is_gradient, recut
from distgrad.layout import Layout
from distgrad.rules import SGD, Adam
from distgrad.wire import PART_BYTES, State
from support.player import LAYOUT, NOTHING, Player, gradient_header, payload_of


def test_a_gradient_counts_when_it_was_applied_and_not_when_it_was_accepted() -> None:
    player = Player()
    player.session()

    player.gradient(1, value=2.0, cursor="one", examples=5, loss=0.5)
    assert (player.values, list(player.replay.pending)) == ([0.0, 0.0], [("w", 1)])
    assert (player.books.members["w"].accepted, player.books.members["w"].decided) == (1, 0)
    player.apply(("w", 1))

    book = player.books.members["w"]
    assert (player.values, player.holder.version, player.replay.pending) == ([-2.0, -2.0], 1, {})
    assert (book.decided, book.cursor, book.decided_cursor, book.examples, book.loss) == (1, "one", "one", 5, 0.5)
    assert (book.counts, player.books.outcomes) == (Counter(applied=1), Counter(applied=1))


def test_cursor_and_loss_stay_where_a_gradient_has_none() -> None:
    player = Player()
    player.session()
    player.gradient(1, cursor="one", loss=0.5)
    player.gradient(2)

    player.apply(("w", 1))
    player.apply(("w", 2))

    book = player.books.members["w"]
    assert (book.cursor, book.decided_cursor, book.loss) == ("one", "one", 0.5)


def test_a_step_is_summed_with_the_weights_that_were_recorded_in_the_order_that_was_recorded() -> None:
    player = Player()
    player.session("a")
    player.session("b")
    player.gradient(1, "b", value=8.0)
    player.gradient(1, "a", value=4.0)

    player.apply(("a", 1), ("b", 1), weights=[0.25, 0.5])

    assert (player.values, player.holder.version) == ([-5.0, -5.0], 1)


def test_each_other_outcome_uses_the_number_up_and_changes_no_parameter() -> None:
    player = Player()
    player.session()
    for number in (1, 2, 3):
        player.gradient(number)

    player.decided([SUPERSEDED, "w", 1], [REFUSED, "w", 2, "not_finite", "a", "it holds nan"], [CLEARED, "w", 3])

    book = player.books.members["w"]
    assert (player.holder.version, player.values, book.decided, player.replay.pending) == (0, [0.0, 0.0], 3, {})
    assert player.books.outcomes == Counter(superseded=1, refused=1, cleared=1)
    assert player.books.refused == Counter(not_finite=1)
    assert book.refusals == [[2, "not_finite", "a", "it holds nan"]]


def test_refusals_that_wait_to_be_told_are_bounded() -> None:
    player = Player()
    player.session()
    for number in range(1, 70):
        player.gradient(number)
        player.decided([REFUSED, "w", number, "not_finite", None, "nan"])

    refusals = player.books.members["w"].refusals
    assert ([refusal[0] for refusal in refusals], player.books.refused["not_finite"]) == (list(range(6, 70)), 69)


def test_a_gradient_that_was_decided_on_out_of_turn_waits_in_the_books() -> None:
    player = Player()
    player.session()
    player.gradient(1)
    player.gradient(2)

    player.decided([SUPERSEDED, "w", 2])
    assert (player.books.members["w"].decided, list(player.replay.pending)) == (0, [("w", 1)])
    player.apply(("w", 1))

    assert player.books.members["w"].decided == 2


def test_a_session_makes_a_member_live_and_keeps_its_numbers() -> None:
    player = Player()
    player.session(user="alice", generated=True, nonces=[b"n" * 16])
    player.gradient(1)
    player.record("silent", worker="w")
    assert player.books.members["w"].state == SILENT

    player.session(user="alice", generated=True, incarnation="two", counter=3, nonces=[b"n" * 16, b"m" * 16])

    book = player.books.members["w"]
    assert (book.state, book.incarnation, book.counter, book.accepted) == (LIVE, "two", 3, 1)
    assert (book.user, book.generated, book.nonces) == ("alice", True, [b"n" * 16, b"m" * 16])


def test_leases_end_and_come_back() -> None:
    player = Player()
    player.session()

    player.record("silent", worker="w")
    player.record("back", worker="w")

    assert player.books.members["w"].state == LIVE


@pytest.mark.parametrize("generated", [False, True])
def test_who_has_left_is_remembered_unless_its_id_was_made_up(generated: bool) -> None:
    player = Player()
    player.session(generated=generated)

    player.record("left", worker="w")

    book = player.books.members.get("w")
    assert book is None if generated else book is not None and book.state == LEFT


def test_set_replaces_the_parameters_with_all_their_arenas_and_resets_the_rules_state() -> None:
    player = Player(rule=Adam(lr=0.5))
    player.session()
    player.gradient(1)
    player.apply(("w", 1))
    payload = payload_of(LAYOUT, 7.0, trained_only=False)

    player.record("set", payload, layout=LAYOUT.to_frame(), generation=4, version=1)

    assert player.holder.storage is not None
    assert [set(arena.tolist()) for arena in player.holder.storage.arenas] == [{7.0}, {7.0}, {7}]
    assert (player.holder.version, player.books.generation, player.holder.steps) == (1, 4, 0)
    assert not any(array.any() for arrays in player.holder.state.values() for array in arrays)


def test_parameters_larger_than_a_part_come_back_whole() -> None:
    layout = Layout.of([np.zeros(PART_BYTES // 4 + 5, np.float32), np.zeros(3, np.float64)])
    player = Player(layout=None)
    payload = payload_of(layout, 3.0, trained_only=False)

    player.record("set", payload, layout=layout.to_frame(), generation=1, version=0)

    assert player.holder.storage is not None
    assert all((arena == 3.0).all() for arena in player.holder.storage.arenas)


def test_parameters_taken_away_keep_the_version() -> None:
    player = Player()
    player.session()
    player.gradient(1)
    player.apply(("w", 1))

    player.record("absent", generation=2)

    assert (player.holder.layout, player.holder.version, player.books.generation) == (None, 1, 2)


def test_a_beginning_notes_what_the_former_broker_had_reached() -> None:
    player = Player()
    player.began("one")
    player.session()
    player.gradient(1)
    player.apply(("w", 1))

    player.began("two", running=False, executor="numba", settings={"mode": "descent"})

    books = player.books
    assert (books.incarnation, books.is_running, books.settings) == ("two", False, {"mode": "descent"})
    assert books.lineage.former == [State("one", 0, 1)]
    assert player.replay.executors == {"numpy", "numba"}


def test_settings_are_those_in_force_from_that_record_on() -> None:
    player = Player(rule=SGD(lr=1.0))
    player.session()
    player.gradient(1)
    player.apply(("w", 1))
    weighing = {"reduction": "sum", "weigh_by_examples": False}

    player.record(
        "configured",
        mode="ascent",
        rule=["sgd", {**SGD(lr=1.0).settings(), "lr": 0.25}],
        policy=["sync", {"workers": 2}],
        weighing=weighing,
    )
    player.gradient(2)
    player.apply(("w", 2))

    assert player.values == [-0.75, -0.75]
    assert (player.books.policy, player.books.weighing) == (("sync", {"workers": 2}), weighing)


def test_the_same_settings_once_more_keep_the_rules_state() -> None:
    player = Player(rule=Adam(lr=0.5))
    player.session()
    player.gradient(1)
    player.apply(("w", 1))

    player.record(
        "configured", mode="descent", rule=["adam", Adam(lr=0.5).settings()], policy=["async", {}], weighing={}
    )

    assert player.holder.steps == 1
    assert any(array.any() for arrays in player.holder.state.values() for array in arrays)


def test_stopping_starting_and_destroying_are_remembered() -> None:
    player = Player()

    seen = []
    for running in (False, True):
        player.record("running", running=running)
        seen.append(player.books.is_running)
    assert seen == [False, True]
    player.record("destroyed", generation=5)

    books = player.books
    assert (books.is_running, books.is_destroyed, books.generation, player.holder.layout) == (False, True, 5, None)


def test_it_stops_before_the_first_update_beyond_the_version_that_is_asked_for() -> None:
    player = Player(until=1)
    player.session()
    for number in (1, 2, 3):
        player.gradient(number)

    player.decided([APPLIED, [("w", 1)], None], [SUPERSEDED, "w", 2], [APPLIED, [("w", 3)], None])

    assert (player.replay.is_done, player.holder.version, player.books.members["w"].decided) == (True, 1, 2)


def test_a_gradient_from_before_a_checkpoint_is_taken_in_only_if_the_checkpoint_left_it_undecided() -> None:
    player = Player()
    player.books.members["w"] = MemberBook("w", user="alice", accepted=5, decided=2, ahead={4: ("superseded", None)})

    for number in range(1, 7):
        header = memoryview(gradient_header("w", number))
        player.replay.remember(header, payload_of(LAYOUT, 1.0), 10 + number)
    player.replay.remember(memoryview(gradient_header("stranger", 1)), payload_of(LAYOUT, 1.0), 20)
    player.replay.remember(memoryview(msgpack.packb(["silent", {"worker": "w"}])), NOTHING, 21)

    assert list(player.replay.pending) == [("w", 3), ("w", 5)]
    assert [(found.sequence, found.user) for found in player.replay.pending.values()] == [(13, "alice"), (15, "alice")]
    assert player.books.members["w"].accepted == 5


def test_a_number_used_again_by_a_later_life_of_an_id_takes_the_place_of_the_earlier_one() -> None:
    player = Player()
    player.session(generated=True)
    player.gradient(1, value=1.0)
    player.decided([CLEARED, "w", 1])
    player.record("left", worker="w")
    player.session(generated=True, counter=2)
    player.gradient(1, value=9.0)

    player.apply(("w", 1))

    assert player.values == [-9.0, -9.0]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (lambda player: player.gradient(1), "accepted before"),
        (lambda player: player.apply(("w", 2)), "was applied, but is not in the journal"),
        (lambda player: player.decided([CLEARED, "w", 2]), "was cleared, but is not in the journal"),
        (lambda player: player.decided([CLEARED, "w", 1], version=3), "made on version 3, not 0"),
        (lambda player: player.record("silent", worker="stranger"), "'stranger' is not known"),
        (lambda player: player.record("rained"), "'rained'"),
    ],
)
def test_what_does_not_fit_what_came_before_fails_and_says_what(record: Callable[[Player], None], why: str) -> None:
    player = Player()
    player.session()
    player.gradient(1)

    with pytest.raises(ReplayFailed, match=re.escape(why)):
        record(player)


def test_a_gradient_that_was_applied_and_cannot_be_applied_now_fails() -> None:
    player = Player(rule=SGD(lr=1.0))
    player.session()
    player.gradient(1, value=float("nan"))

    with pytest.raises(ReplayFailed, match="refused now"):
        player.apply(("w", 1))


def test_an_update_without_parameters_fails() -> None:
    player = Player(layout=None)
    player.session()
    player.gradient(1)

    with pytest.raises(ReplayFailed, match="no parameters"):
        player.apply(("w", 1))


def test_a_rule_that_is_not_known_is_asked_for() -> None:
    with pytest.raises(ReplayFailed, match=r"'mine'.*pass it"):
        Player().record("configured", mode="descent", rule=["mine", {}], policy=["async", {}], weighing={})


def test_gradients_are_told_from_other_records_by_their_first_byte() -> None:
    assert is_gradient(memoryview(gradient_header("w", 1)))
    assert not is_gradient(memoryview(msgpack.packb(["silent", {}])))


def test_a_stored_payload_is_cut_where_arenas_end_only_if_it_has_their_size() -> None:
    player = Player()
    player.session()
    player.gradient(1)
    (whole,) = player.replay.pending.values()
    size = LAYOUT.gradient_bytes
    odd = gradient_messages.parse_gradient(wire.unpack(gradient_header("w", 1)), [bytes(size - 1)], size - 1)

    recut(LAYOUT, whole)
    recut(LAYOUT, odd)

    assert [len(part) for part in whole.parts] == [8, 24]
    assert [len(part) for part in odd.parts] == [size - 1]
