"""A worker's side of the protocol, with replies written by hand."""

from __future__ import annotations

import pytest

from distgrad import wire
from distgrad.errors import GradientRefused, LayoutError
from distgrad_worker import asking
from distgrad_worker.asking import HEARTBEAT_WAIT_S
from distgrad_worker.losses import STALL_S
from distgrad_worker.session import GREETING, OPEN, RESUMING
from support.session_shell import LAYOUT, ONE, OTHER, Shell


def test_nothing_is_sent_before_hello_was_answered() -> None:
    shell = Shell(greeted=False)

    assert shell.session.phase == GREETING
    assert shell.session.is_busy
    assert asking.hello(shell.session) == {
        **{"v": 1, "op": "hello", "worker": "w", "nonce": b"n" * 16, "session": None, "lowest": 0, "generated": False}
    }
    assert not shell.session.can_push(16, LAYOUT.fingerprint)
    assert shell.send() == []


def test_after_hello_gradients_go_out_with_session_attempt_and_number() -> None:
    shell = Shell()
    shell.push(2)

    headers = [wire.unpack(entry.frames()[0]) for entry in shell.session.sendable(0.0)]

    told = [(h["kind"], h["worker"], h["session"], h["attempt"], h["number"]) for h in headers]
    assert told == [("gradient", "w", "one:1", 1, 1), ("gradient", "w", "one:1", 1, 2)]
    assert asking.heartbeat(shell.session)["sent"] == 2


def test_nothing_is_sent_while_the_socket_has_to_be_opened() -> None:
    shell = Shell(greeted=False)
    shell.hello()
    shell.push()

    assert shell.session.must_reopen
    assert shell.send() == []
    shell.session.reopened()
    assert shell.send() == [1]


def test_a_push_without_room_asks_for_bytes_until_it_is_given_up() -> None:
    shell = Shell(grant=ONE)
    shell.push()

    assert not shell.session.can_push(16, LAYOUT.fingerprint)
    assert asking.heartbeat(shell.session)["want"] == ONE
    assert shell.session.is_busy
    shell.session.stop_wanting()
    assert asking.heartbeat(shell.session)["want"] == 0 or shell.session.window.unsent_charge


def test_a_push_that_waits_for_replaced_parameters_is_refused() -> None:
    """Regression: it waited for a grant of the former size, and kept a turn from all others, for ever."""
    shell = Shell(grant=0)
    assert not shell.session.can_push(16, LAYOUT.fingerprint)

    shell.hello(layout=OTHER)

    with pytest.raises(LayoutError, match="replaced"):
        shell.session.can_push(16, LAYOUT.fingerprint)


def test_a_gradient_larger_than_the_whole_queue_is_refused_at_the_call() -> None:
    shell = Shell(queue_bytes=2000, grant=1000)

    shell.session.can_push(2000, LAYOUT.fingerprint)
    with pytest.raises(GradientRefused, match="--queue-bytes 2000"):
        shell.session.can_push(2001, LAYOUT.fingerprint)


def test_what_no_grant_covers_any_more_asks_for_one_although_nobody_pushes() -> None:
    """Regression: with grants as turns, a flush after a restart or a lost lease waited for ever."""
    shell = Shell()
    shell.push(2)
    shell.send()
    shell.session.connection_lost()
    shell.beat(grant=0, grant_seq=2)

    assert asking.heartbeat(shell.session)["want"] == ONE


def test_settled_gradients_are_let_go_and_refusals_are_raised_once() -> None:
    shell = Shell()
    shell.push(3)
    shell.send()
    refused = [[2, "not_finite", "w.b", "leaf w.b holds nan"]]

    shell.beat(accepted=3, settled=2, refused=refused)
    shell.beat(accepted=3, settled=3, refused=refused)

    (problem,) = shell.session.problems
    assert isinstance(problem, GradientRefused)
    assert (problem.number, problem.reason, problem.leaf) == (2, "not_finite", "w.b")
    assert (shell.session.window.settled, len(shell.session.window)) == (3, 0)
    assert not shell.session.is_busy


def test_hello_settles_nothing_because_it_does_not_tell_what_was_refused() -> None:
    """Regression: a flush ended without the refusal when the parameters were replaced meanwhile."""
    shell = Shell()
    shell.push(1)
    shell.send()

    shell.hello(accepted=1, settled=1, layout=OTHER)
    assert shell.session.window.settled == 0
    assert asking.heartbeat(shell.session)["settled"] == 0
    shell.beat(accepted=1, settled=1, refused=[[1, "layout", None, "of another layout"]])

    assert shell.session.window.settled == 1
    assert [problem.number for problem in shell.session.problems if isinstance(problem, GradientRefused)] == [1]


def test_a_successor_goes_on_with_the_numbers_and_hears_nothing_of_its_predecessors_refusals() -> None:
    shell = Shell(accepted=5, settled=3, queued=2 * ONE, grant=3 * ONE, cursor="here")
    session = shell.session
    assert (session.cursor, session.window.settled, session.window.last) == ("here", 3, 5)
    assert session.is_busy
    shell.push()
    assert shell.send() == [6]
    assert not session.can_push(16, LAYOUT.fingerprint), "the rest of the grant covers what its predecessor left"

    shell.beat(accepted=6, settled=5, refused=[[4, "layout", None, "of another layout"]])

    assert not session.problems
    assert session.can_push(16, LAYOUT.fingerprint)


def test_what_a_predecessor_left_counts_no_more_than_what_the_broker_has_queued() -> None:
    """Regression: one gradient that a policy held kept the bytes of all that had been settled from a successor."""
    shell = Shell(accepted=5, settled=2, queued=3 * ONE, grant=3 * ONE)
    assert not shell.session.can_push(16, LAYOUT.fingerprint)

    shell.beat(accepted=5, settled=4, queued=ONE, grant=3 * ONE)

    shell.push(2)
    assert shell.send() == [6, 7]
    assert not shell.session.can_push(16, LAYOUT.fingerprint)
    shell.beat(accepted=7, settled=4, queued=3 * ONE, grant=3 * ONE)
    assert not shell.session.can_push(16, LAYOUT.fingerprint), "the broker has this process's own as well"


def test_a_missing_number_begins_a_new_attempt_once() -> None:
    shell = Shell()
    shell.push(3)
    shell.send()

    shell.beat(accepted=1, resend=True)
    session = shell.session
    assert (session.phase, session.attempt, session.must_reopen) == (RESUMING, 2, True)
    assert shell.send() == []
    assert asking.heartbeat(session)["wait_s"] == 0
    session.reopened()
    shell.beat(accepted=1, resend=True, attempt=1)
    assert (session.phase, session.attempt) == (RESUMING, 2), "said of the former attempt"
    shell.beat(accepted=1)

    assert session.phase == OPEN
    assert shell.send() == [2, 3]


def test_a_connection_lost_with_nothing_on_the_way_changes_nothing() -> None:
    shell = Shell()
    shell.session.connection_lost()
    shell.push()
    shell.send()
    shell.beat(accepted=1)
    shell.session.connection_lost()
    assert shell.session.attempt == 1

    shell.push()
    shell.send()
    shell.session.connection_lost()

    assert shell.session.attempt == 2


def test_no_progress_begins_a_new_attempt_and_each_waits_twice_as_long() -> None:
    shell = Shell()
    shell.push()
    patience = []
    for _ in range(3):
        shell.send()
        started, attempt = shell.now, shell.session.attempt
        while shell.session.attempt == attempt:
            shell.now += 0.25
            shell.beat()
        patience.append(shell.now - started)
        shell.session.reopened()
        shell.beat()

    assert patience[0] == pytest.approx(STALL_S, abs=0.5)
    assert patience[2] == pytest.approx(2 * patience[1], abs=0.5)


def test_progress_is_patience() -> None:
    shell = Shell()
    shell.push(4)
    shell.send()
    for accepted in range(4):
        shell.now += STALL_S
        shell.beat(accepted=accepted)

    assert shell.session.attempt == 1


def test_a_smaller_grant_is_echoed_with_what_is_in_flight() -> None:
    shell = Shell()
    shell.push(3)
    shell.send()

    shell.beat(accepted=3, grant=ONE, grant_seq=2)
    beat = asking.heartbeat(shell.session)
    assert (beat["grant_seq"], beat["held"]) == (2, 3 * ONE)
    assert shell.session.is_busy
    shell.beat(accepted=3, settled=3, grant=ONE, grant_seq=2)

    assert asking.heartbeat(shell.session)["held"] == ONE


def test_a_flush_hurries_the_broker_until_its_number_is_settled() -> None:
    shell = Shell()
    session = shell.session
    shell.push(3)
    shell.send()
    session.awaited.append(3)
    session.awaited.append(2)
    assert (session.hurry, asking.heartbeat(session)["until"]) == (2, 2)
    assert asking.heartbeat(session)["wait_s"] == HEARTBEAT_WAIT_S

    shell.beat(accepted=3, settled=2)
    session.awaited.remove(2)
    assert session.hurry == 3
    session.awaited.remove(3)
    assert session.hurry == 0


def test_a_clean_goodbye_names_session_and_incarnation() -> None:
    leave = asking.leave(Shell().session)

    assert (leave["op"], leave["session"], leave["incarnation"]) == ("leave", "one:1", "one")


def test_a_pull_tells_what_is_settled_and_nothing_has_to_be_asked() -> None:
    shell = Shell()
    session = shell.session
    shell.beat()
    shell.push(3)
    shell.send()

    assert session.on_pulled(session.name, 3, 1, shell.now)

    assert (session.window.settled, len(session.window), session.superseded) == (3, 0, 1)
    assert not session.is_busy
    assert not session.on_pulled(session.name, 3, 1, shell.now), "no news"
    assert asking.heartbeat(session)["settled"] == 3


@pytest.mark.parametrize("name", [None, "one:0", "zero:1"])
def test_what_a_pull_of_another_session_tells_is_not_taken(name: str | None) -> None:
    shell = Shell()
    shell.push(2)
    shell.send()

    assert not shell.session.on_pulled(name, 2, 0, shell.now)

    assert shell.session.window.settled == 0


@pytest.mark.parametrize("resend", [False, True])
def test_a_heartbeat_that_is_older_than_a_pull_takes_nothing_back(resend: bool) -> None:
    shell = Shell()
    session = shell.session
    shell.push(3)
    shell.send()
    session.on_pulled(session.name, 3, 0, shell.now)

    shell.beat(accepted=1, settled=0, resend=resend)

    assert (session.window.settled, session.window.sent, session.attempt, session.phase) == (3, 3, 1, OPEN)
    assert shell.send() == []


def test_a_heartbeat_that_is_older_than_a_slot_takes_it_back_only_when_the_broker_should_know_of_it() -> None:
    shell = Shell()
    session = shell.session
    session.shared.add(4)
    session.told.add(4)

    shell.beat(slots=[1])
    assert session.shared == {1, 4}

    session.told.clear()  # asked again
    shell.beat(slots=[1])
    assert session.shared == {1}


def test_the_broker_is_asked_at_once_where_somebody_waits_or_half_of_the_grant_is_on_the_way() -> None:
    shell = Shell(grant=4 * ONE)
    session = shell.session
    asks = [session.is_urgent]  # the grant is to be echoed
    shell.beat(grant=4 * ONE)
    shell.push(2)
    shell.send()
    asks.append(session.is_urgent)
    session.awaited.append(2)
    asks.append(session.is_urgent)
    session.on_pulled(session.name, 2, 0, shell.now)  # what is waited for is settled
    asks.append(session.is_urgent)
    shell.push(3)
    shell.send()
    asks.append(session.is_urgent)

    assert asks == [True, False, True, False, True]


def test_a_layout_that_was_replaced_is_not_used_until_hello_brings_the_new_one() -> None:
    """Regression: a push right behind a flush that told of refusals was measured by the former layout."""
    shell = Shell()

    shell.beat(fingerprint=OTHER.fingerprint)

    assert (shell.session.phase, shell.session.layout) == (GREETING, None)
    shell.hello(layout=OTHER)
    assert shell.session.layout == OTHER


def test_a_layout_that_a_pull_has_brought_is_asked_for_and_an_older_one_is_not() -> None:
    """Regression: what was computed on it was refused until a heartbeat told of it."""
    shell = Shell()
    session = shell.session
    assert session.state is not None
    newer = session.state._replace(generation=session.state.generation + 1)

    assert not session.on_pulled_layout(newer, LAYOUT.fingerprint)
    assert not session.on_pulled_layout(session.state, OTHER.fingerprint)
    assert not session.on_pulled_layout(newer._replace(incarnation="another"), OTHER.fingerprint)
    assert session.phase == OPEN
    assert session.on_pulled_layout(newer, OTHER.fingerprint)

    assert (session.phase, session.layout) == (GREETING, None)


@pytest.mark.parametrize(("keys", "ask_s"), [({}, 0.2), ({"ask_s": 0.5}, 0.5), ({"ask_s": 60.0}, 7.5)])
def test_it_asks_as_often_as_the_broker_says_and_four_times_in_a_lease(keys: dict[str, float], ask_s: float) -> None:
    shell = Shell()
    shell.beat(ask_s=3.0)
    shell.beat(**keys)

    assert shell.session.ask_s == ask_s
