"""What is remembered of mutating requests."""

from __future__ import annotations

import pytest

from distgrad_broker.requests import MAX_REMEMBERED_CLIENTS, RememberedReplies, RequestError

ONE, TWO = ("key", b"1" * 16), ("key", b"2" * 16)


def test_a_reply_is_remembered_until_the_client_asks_something_else() -> None:
    memory = RememberedReplies()
    assert memory.find(ONE, 3) == (False, None)
    memory.begin(ONE, 3)
    assert memory.find(ONE, 3) == (True, None)
    memory.finish(ONE, 3, {"ok": True})
    assert memory.find(ONE, 3) == (True, {"ok": True})
    assert memory.find(ONE, 4) == (False, None)
    assert memory.find(TWO, 3) == (False, None)


def test_an_older_request_is_refused_because_it_was_given_up() -> None:
    memory = RememberedReplies()
    memory.begin(ONE, 3)

    with pytest.raises(RequestError, match="ids must rise") as caught:
        memory.find(ONE, 2)
    assert caught.value.code == "invalid"


def test_a_late_reply_does_not_replace_a_newer_request() -> None:
    memory = RememberedReplies()
    memory.begin(ONE, 3)
    memory.begin(ONE, 4)
    memory.finish(ONE, 3, {"late": True})
    memory.finish(TWO, 1, {"of nobody": True})

    assert memory.find(ONE, 4) == (True, None)
    assert memory.find(TWO, 1) == (False, None)


def test_only_so_many_clients_are_remembered() -> None:
    memory = RememberedReplies()
    for number in range(MAX_REMEMBERED_CLIENTS + 1):
        memory.begin((None, b"%016d" % number), 1)

    assert memory.find((None, b"%016d" % 0), 1) == (False, None)
    assert memory.find((None, b"%016d" % 1), 1) == (True, None)


def test_an_error_carries_its_code_message_and_detail() -> None:
    error = RequestError("invalid", "no", {"allowed": 3})

    assert (error.code, error.message, error.detail, str(error)) == ("invalid", "no", {"allowed": 3}, "no")
