"""What a session makes of restarts, replaced parameters, errors, and a path that carries nothing."""

from __future__ import annotations

import pytest

from distgrad.errors import (
    BrokerRestarted,
    DeliveryFailed,
    DistgradError,
    Fenced,
    HistoryLost,
    MalformedMessage,
    from_code,
)
from distgrad_worker import asking
from distgrad_worker.losses import MAX_TRIES
from distgrad_worker.session import GREETING
from support.session_shell import LAYOUT, ONE, OTHER, Shell


def test_a_gradient_that_never_arrives_is_given_up_with_a_reason() -> None:
    shell = Shell()
    shell.push()
    for _ in range(MAX_TRIES):
        shell.send()
        shell.beat(resend=True)
        shell.session.reopened()
        shell.beat()
        shell.now += 10

    assert isinstance(shell.session.ended, DeliveryFailed)
    assert f"gradient 1 was sent {MAX_TRIES} times" in str(shell.session.ended)


def test_what_was_sent_twice_in_vain_goes_one_by_one_until_one_arrives() -> None:
    """Regression: a connection that took whatever was sent with it, five times within 30 ms, ended the session."""
    shell = Shell()
    shell.push(3)
    sent = []
    for _ in range(4):
        sent.append(shell.send())
        assert shell.send() == []
        shell.session.connection_lost()
        shell.session.reopened()
        shell.beat()
        if len(sent) > 2:
            assert shell.send() == [], "there is a pause before it is sent once more"
        shell.now += 10

    assert sent == [[1, 2, 3], [1, 2, 3], [1], [1]]
    assert shell.send() == [1]
    shell.beat(accepted=1)
    assert shell.send() == [2, 3]


def test_a_gradient_that_arrives_is_not_counted_as_lost_again() -> None:
    shell = Shell()
    for number in range(2 * MAX_TRIES):
        shell.push()
        shell.send()
        shell.beat(accepted=number, settled=number, resend=True)
        shell.session.reopened()
        shell.beat(accepted=number, settled=number)
        shell.send()
        shell.beat(accepted=number + 1, settled=number + 1)

    assert shell.session.ended is None


@pytest.mark.parametrize("code", ["unknown_worker", "restarted"])
def test_a_broker_that_does_not_know_the_session_is_greeted_again(code: str) -> None:
    shell = Shell()
    shell.push(2)
    shell.send()
    shell.beat(accepted=2, settled=1)

    shell.session.on_error(from_code(code, "no"), code)

    assert shell.session.phase == GREETING
    hello = asking.hello(shell.session)
    assert (hello["session"], hello["lowest"]) == ("one:1", 2)


def test_a_restart_is_told_once_with_the_range_that_is_lost_and_everything_else_is_sent_again() -> None:
    shell = Shell()
    shell.push(4)
    shell.send()
    shell.beat(accepted=4, settled=2)
    shell.session.on_error(from_code("unknown_worker", "no"), "unknown_worker")

    shell.hello(session="two:1", incarnation="two", accepted=2, settled=2, adopted=True)
    shell.session.reopened()

    (problem,) = shell.session.problems
    assert isinstance(problem, BrokerRestarted)
    assert problem.lost == (1, 2)
    assert shell.session.attempt == 2
    assert shell.send() == [3, 4]


def test_a_restart_before_anything_was_settled_has_lost_nothing() -> None:
    shell = Shell()
    shell.session.on_error(from_code("unknown_worker", "no"), "unknown_worker")
    shell.hello(session="two:1", incarnation="two")

    (problem,) = shell.session.problems
    assert isinstance(problem, BrokerRestarted)
    assert problem.lost is None
    assert "none was settled" in str(problem)


def test_a_broker_that_has_forgotten_what_it_had_settled_ends_the_session() -> None:
    shell = Shell()
    shell.push(2)
    shell.send()
    shell.beat(accepted=2, settled=2)
    shell.hello(session="two:1", incarnation="two", accepted=1, settled=1)

    assert isinstance(shell.session.ended, HistoryLost)


@pytest.mark.parametrize(
    ("code", "kind"), [("fenced", Fenced), ("forbidden", DistgradError), ("destroyed", DistgradError)]
)
def test_some_errors_end_the_session(code: str, kind: type[DistgradError]) -> None:
    shell = Shell()

    shell.session.on_error(from_code(code, "why"), code)
    shell.session.on_error(from_code("fenced", "again"), "fenced")

    assert isinstance(shell.session.ended, kind)
    assert "why" in str(shell.session.ended)


def test_a_refused_hello_ends_the_session_and_an_odd_heartbeat_is_a_problem() -> None:
    greeting, greeted = Shell(greeted=False).session, Shell().session
    error = from_code("too_many_workers", "full")

    greeting.on_error(error, "too_many_workers")
    greeted.on_error(from_code("malformed", "odd"), "malformed")

    assert greeting.ended is error
    assert (greeted.ended, len(greeted.problems)) == (None, 1)


def test_a_broker_that_shuts_down_is_waited_for() -> None:
    shell = Shell(greeted=False)

    shell.session.on_error(from_code("failed", "closing"), "failed")

    assert (shell.session.ended, shell.session.phase) == (None, GREETING)


@pytest.mark.parametrize("fingerprint", [OTHER.fingerprint, None])
def test_replaced_parameters_are_noticed_by_their_fingerprint(fingerprint: int | None) -> None:
    shell = Shell()

    shell.beat(fingerprint=fingerprint)

    assert shell.session.phase == GREETING
    shell.hello(layout=None)
    assert shell.session.layout is None


def test_a_gradient_of_a_former_layout_keeps_its_number_and_needs_no_large_grant() -> None:
    shell = Shell(layout=OTHER, grant=2000)
    shell.push(1, OTHER)
    shell.send()
    shell.session.connection_lost()
    shell.session.reopened()

    shell.hello(layout=LAYOUT, grant=ONE, grant_seq=2)

    (entry,) = shell.session.sendable(0.0)
    assert (entry.number, entry.header.fingerprint) == (1, OTHER.fingerprint)
    assert list(entry.parts) == []


def test_a_layout_frame_that_cannot_be_read_changes_nothing() -> None:
    shell = Shell(greeted=False)

    with pytest.raises(MalformedMessage):
        shell.session.on_hello({}, b"\xc1", 0.0)
    assert shell.session.phase == GREETING


def test_a_broker_that_kept_everything_is_gone_on_with_in_silence() -> None:
    shell = Shell(durability="journal")
    shell.push(4)
    shell.send()
    shell.beat(accepted=3, settled=2)
    shell.session.on_error(from_code("unknown_worker", "no"), "unknown_worker")

    shell.hello(session="two:1", incarnation="two", accepted=3, settled=2, durability="journal")
    shell.session.reopened()

    assert (list(shell.session.problems), shell.session.ended) == ([], None)
    assert shell.send() == [4]


def test_a_broker_that_settles_what_is_on_its_disk_is_sent_as_much_as_it_grants() -> None:
    durable, plain = Shell(durability="journal"), Shell(durability="none")

    assert (durable.session.window.keeps_all, plain.session.window.keeps_all) == (True, False)
    assert not Shell().session.window.keeps_all
    durable.hello(durability="none")
    assert not durable.session.window.keeps_all


def test_history_that_a_durable_broker_says_is_lost_ends_the_session() -> None:
    shell = Shell(durability="journal")
    shell.session.on_error(from_code("unknown_worker", "no"), "unknown_worker")

    shell.session.on_error(from_code("history_lost", "it was set aside"), "history_lost")

    assert isinstance(shell.session.ended, HistoryLost)
    assert "it was set aside" in str(shell.session.ended)


def test_a_durable_broker_that_has_less_than_it_had_settled_ends_the_session() -> None:
    shell = Shell(durability="journal")
    shell.push(2)
    shell.send()
    shell.beat(accepted=2, settled=2)

    shell.hello(session="two:1", incarnation="two", accepted=1, settled=1, durability="journal")

    assert isinstance(shell.session.ended, HistoryLost)


def test_a_gradient_that_waits_for_a_step_to_come_again_is_not_taken_for_lost() -> None:
    """A broker that repeats steps which a crash took back asks for it when the one comes that it was computed on."""
    shell = Shell(durability="journal")
    shell.push(3)
    shell.send()
    for _ in range(20):
        shell.now += 10.0
        shell.beat(accepted=1, early=True)
    assert (shell.session.ended, shell.session.attempt) == (None, 1)

    shell.beat(accepted=1, early=False, resend=True)
    shell.session.reopened()
    shell.beat(accepted=1)

    assert shell.send() == [2, 3]
