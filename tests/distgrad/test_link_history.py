"""What the changes of a connection say about a broker that does not answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from distgrad.link_history import LinkHistory
from distgrad.sockets import Link


class Told:
    """Stands for a monitor that has something to tell once."""

    def __init__(self, *links: Link) -> None:
        self._links = list(links)

    def drain(self) -> list[Link]:
        links, self._links = self._links, []
        return links


def history_of(*sockets: Sequence[Link]) -> LinkHistory:
    """Follow sockets one after the other, each with what happened to it."""
    history = LinkHistory()
    for links in sockets:
        monitor: Any = Told(*links)
        history.follow(monitor)
        history.note()
    return history


@pytest.mark.parametrize(
    ("links", "cause"),
    [
        ([], "no connection came about"),
        ([Link.ABSENT], "nobody listens there"),
        ([Link.UP], "the broker is silent"),
        ([Link.UP, Link.LOST], "the connection was lost"),
        ([Link.LOST], "the handshake was not finished"),
        ([Link.REFUSED, Link.LOST], "the broker does not accept the key"),
        ([Link.NO_KEYS], "one side has keys and the other has none: this client has none"),
    ],
)
def test_the_last_change_tells_the_cause(links: list[Link], cause: str) -> None:
    told, hint = history_of(links).explain(has_keys=False)

    assert told == cause
    assert hint


def test_who_has_the_keys_is_said() -> None:
    assert "only this client has them" in history_of([Link.NO_KEYS]).explain(has_keys=True)[0]


@pytest.mark.parametrize("later", [Link.LOST, Link.UNFINISHED])
def test_a_definite_cause_of_a_former_try_stays(later: Link) -> None:
    assert "does not accept the key" in history_of([Link.REFUSED], [later]).explain(has_keys=True)[0]


def test_only_a_connection_that_was_up_is_cut_and_the_next_socket_is_not() -> None:
    assert not history_of([Link.LOST]).was_cut
    assert history_of([Link.UP, Link.LOST]).was_cut
    assert not history_of([Link.UP, Link.LOST], []).was_cut


def test_nothing_is_noted_while_there_is_no_socket() -> None:
    history = history_of([Link.UP])
    history.follow(None)
    history.note()

    assert history.explain(has_keys=False)[0] == "the broker is silent"
