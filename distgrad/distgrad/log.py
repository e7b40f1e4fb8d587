"""Log events: a fixed phrase and ``key=value`` fields, on standard `logging`.

Modules log through `event`; only the command line calls `install`. Text that a peer chose is escaped, so that it can
neither start a new line nor steer a terminal.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from json import dumps
from typing import Any, TextIO

LEVELS = ("debug", "info", "warning", "error")

_LOGGERS = ("distgrad", "distgrad_broker", "distgrad_worker")
_MAX_VALUE_CHARACTERS = 300
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.:/@+,%#*[]()<>")


class Event:
    """A message that is put together when a handler wants it.

    Parameters
    ----------
    phrase : str
        What happened; always the same words for the same event.
    fields : mapping of str to object
        The particulars.
    """

    __slots__ = ("fields", "phrase")

    def __init__(self, phrase: str, fields: Mapping[str, object]) -> None:
        self.phrase = phrase
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.phrase, *(f"{key}={render(value)}" for key, value in self.fields.items())])


def event(logger: logging.Logger, level: int, phrase: str, /, **fields: object) -> None:
    """Log an event.

    Parameters
    ----------
    logger : logging.Logger
        The module's own.
    level : int
        As `logging` numbers them.
    phrase : str
        What happened; always the same words for the same event.
    **fields : object
        The particulars. Never keys or payloads; text of peers is welcome, it is escaped and cut.
    """
    if logger.isEnabledFor(level):
        logger.log(level, Event(phrase, fields), stacklevel=2)


def render(value: object) -> str:
    """Write a value so that it stays one word on one line.

    Parameters
    ----------
    value : object
        Anything; text is quoted where it is not a plain word, and cut at 300 characters.

    Returns
    -------
    str
        ASCII without control characters.
    """
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None or isinstance(value, (bool, int)):
        return str(value).lower()
    text = str(value)
    if len(text) > _MAX_VALUE_CHARACTERS:
        text = text[:_MAX_VALUE_CHARACTERS] + "..."
    return text if text and _PLAIN.issuperset(text) else dumps(text).replace("\x7f", "\\u007f")


def escape(text: str) -> str:
    """Escape what could end the line or steer a terminal.

    Parameters
    ----------
    text : str
        Anything; a peer may have written it.

    Returns
    -------
    str
        Printable characters only.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def install(level: str = "info", json: bool = False, stream: TextIO | None = None) -> logging.Handler:
    """Send distgrad's events, and other libraries' warnings, to a stream.

    Parameters
    ----------
    level : str
        One of `LEVELS`; what distgrad says below it is left out.
    json : bool
        One JSON object a line instead of text.
    stream : text file, optional
        Standard error by default.

    Returns
    -------
    logging.Handler
        The root logger's handler; a second call replaces the first one's.
    """
    handler = _Handler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
    root = logging.getLogger()
    for other in [other for other in root.handlers if isinstance(other, _Handler)]:
        root.removeHandler(other)
    root.addHandler(handler)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(level.upper())
    return handler


class _Handler(logging.StreamHandler[TextIO]):
    """A handler that `install` recognises as its own."""


class TextFormatter(logging.Formatter):
    """One line for people: time (UTC), level, phrase and fields; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record.

        Parameters
        ----------
        record : logging.LogRecord
            The record.

        Returns
        -------
        str
            Without the line's end.
        """
        line = f"{_time(record)} {record.levelname:<7} {escape(record.getMessage())}"
        return "\n".join([line, *_trouble(self, record)])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, ``fields``, perhaps ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record.

        Parameters
        ----------
        record : logging.LogRecord
            The record.

        Returns
        -------
        str
            Without the line's end; ASCII.
        """
        message: Any = record.msg
        is_event = isinstance(message, Event)
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message.phrase if is_event else record.getMessage(),
            "fields": {key: _json_value(value) for key, value in message.fields.items()} if is_event else {},
        }
        trouble = _trouble(self, record)
        if trouble:
            entry["exception"] = "\n".join(trouble)
        return dumps(entry)


class RateLimiter:
    """Decides which of many like events are worth a line.

    It remembers a bounded number of kinds and forgets the oldest first.

    Parameters
    ----------
    period_s : float, seconds, > 0
        One line per kind in this time.
    max_kinds : int, > 0
        How many kinds are remembered.
    """

    def __init__(self, period_s: float = 10.0, max_kinds: int = 256) -> None:
        self._period_s = period_s
        self._max_kinds = max_kinds
        self._kinds: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def admit(self, kind: str, now: float) -> int | None:
        """Ask for a line.

        Parameters
        ----------
        kind : str
            What happened.
        now : float, seconds
            Monotonic time.

        Returns
        -------
        int or None
            None: stay silent. Otherwise how many of the kind were silent since the last line.
        """
        last = self._kinds.get(kind)
        if last is not None and now - last[0] < self._period_s:
            self._kinds[kind] = (last[0], last[1] + 1)
            return None
        self._kinds[kind] = (now, 0)
        self._kinds.move_to_end(kind)
        if len(self._kinds) > self._max_kinds:
            self._kinds.popitem(last=False)
        return 0 if last is None else last[1]


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trouble(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return parts


def _json_value(value: object) -> object:
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)[:_MAX_VALUE_CHARACTERS]
