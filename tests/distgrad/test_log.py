from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.log import Event, RateLimiter, escape, event, install, render

LOGGER = logging.getLogger("distgrad.test")
HOSTILE = 'evil\n2026 ERROR \x1b[31m "quoted" \u202e\x7f'


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    named = [logging.getLogger(name) for name in ("distgrad", "distgrad_broker", "distgrad_worker")]
    root = logging.getLogger()
    handlers, levels = list(root.handlers), [logger.level for logger in named]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(named, levels, strict=True):
        logger.setLevel(level)


def text_of(*, as_json: bool = False, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    install(level, as_json, stream)
    return stream


def test_a_line_is_time_level_phrase_and_fields() -> None:
    stream = text_of()

    event(LOGGER, logging.INFO, "worker joined", worker="w1", bytes=7, loss=0.123456789, cursor=None, is_new=True)

    time, rest = stream.getvalue().split(" ", 1)
    assert time.endswith("Z")
    assert rest == "INFO    worker joined worker=w1 bytes=7 loss=0.123457 cursor=none is_new=true\n"


def test_json_lines_keep_numbers_and_name_the_logger() -> None:
    stream = text_of(as_json=True)

    event(LOGGER, logging.WARNING, "worker joined", worker="w 1", bytes=7, loss=math.nan, cursor=None)

    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "warning",
        "logger": "distgrad.test",
        "message": "worker joined",
        "fields": {"worker": "w 1", "bytes": 7, "loss": "nan", "cursor": None},
    }


@pytest.mark.parametrize("as_json", [False, True])
def test_text_of_a_peer_stays_on_its_line(as_json: bool) -> None:
    stream = text_of(as_json=as_json)

    event(LOGGER, logging.INFO, "request refused", said=HOSTILE)
    LOGGER.info("another library says %s", HOSTILE)

    lines = stream.getvalue().split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    if as_json:
        assert json.loads(lines[0])["fields"]["said"] == HOSTILE


@given(st.text())
def test_a_rendered_value_is_one_printable_ascii_word(text: str) -> None:
    shown = render(text)

    assert shown.isprintable()
    assert shown.isascii()
    assert shown.startswith('"') or " " not in shown
    assert len(text) > 300 or not shown.startswith('"') or json.loads(shown) == text


@given(st.text())
def test_escaped_text_is_printable(text: str) -> None:
    assert escape(text).isprintable()


def test_long_values_are_cut() -> None:
    assert len(render("x" * 10**6)) < 310


@pytest.mark.parametrize("as_json", [False, True])
def test_a_traceback_is_kept(as_json: bool) -> None:
    stream = text_of(as_json=as_json)

    try:
        raise ValueError("the cause")
    except ValueError:
        LOGGER.error("bug", exc_info=True, stack_info=True)

    assert "ValueError: the cause" in stream.getvalue()
    assert "test_a_traceback_is_kept" in stream.getvalue()


def test_what_is_below_the_level_is_not_even_put_together() -> None:
    stream = text_of(level="warning")

    class Costly:
        def __str__(self) -> str:
            raise AssertionError("rendered in vain")

    event(LOGGER, logging.INFO, "gradient applied", detail=Costly())

    assert stream.getvalue() == ""


def test_other_libraries_are_heard_from_warnings_on() -> None:
    stream = text_of(level="debug")

    logging.getLogger("numba.core").debug("noise")
    logging.getLogger("numba.core").warning("trouble")
    LOGGER.debug("detail")

    assert "noise" not in stream.getvalue()
    assert "trouble" in stream.getvalue()
    assert "detail" in stream.getvalue()


def test_installing_again_replaces_the_first_handler() -> None:
    first, second = text_of(), text_of()

    event(LOGGER, logging.INFO, "once")

    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_any_handler_can_write_an_event() -> None:
    assert str(Event("key added", {"name": "w1"})) == "key added name=w1"


def test_a_limiter_admits_one_of_a_kind_per_period_and_counts_the_rest() -> None:
    limiter = RateLimiter(period_s=10)

    admitted = [limiter.admit("malformed", now) for now in (0, 1, 9.9, 10, 11, 20)]

    assert admitted == [0, None, None, 2, None, 1]


def test_kinds_do_not_limit_each_other() -> None:
    limiter = RateLimiter()

    assert [limiter.admit(kind, 0) for kind in "abab"] == [0, 0, None, None]


def test_a_limiter_remembers_a_bounded_number_of_kinds() -> None:
    limiter = RateLimiter(max_kinds=2)

    for kind in "abc":
        limiter.admit(kind, 0)

    assert limiter.admit("b", 0) is None
    assert limiter.admit("a", 0) == 0
