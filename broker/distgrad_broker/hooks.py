"""Users' own code is told what happens in a broker, on a thread of its own, and can neither stop nor slow the loop.

| thread | owns | receives through | gives away |
|---|---|---|---|
| hooks (``distgrad-hooks``) | the user's object | a bounded queue; what does not fit is dropped and counted | counts |
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

from distgrad import log
from distgrad.errors import ConfigError
from distgrad_broker.events import HooksCounted, Log

__all__ = ["Happening"]

_LOGGER = logging.getLogger("distgrad_broker")

#: What is told, by the phrase of the log: the method that is called.
HOOKS: Mapping[str, str] = MappingProxyType(
    {
        "worker joined": "on_worker_joined",
        "worker is back": "on_worker_back",
        "worker left": "on_worker_left",
        "worker silent": "on_worker_lost",
        "worker evicted": "on_worker_evicted",
        "gradient refused": "on_refused",
        "checkpoint written": "on_checkpoint",
        "checkpoint failed, and is tried again": "on_checkpoint_failed",
        "parameters saved": "on_saved",
        "save failed": "on_save_failed",
        "parameters set": "on_parameters_set",
        "parameters removed": "on_parameters_removed",
        "updater started": "on_started",
        "updater stopped": "on_stopped",
        "queue cleared": "on_cleared",
        "configured": "on_configured",
        "recovered": "on_recovered",
        "the journal cannot be written; nothing is settled until it can": "on_disk_trouble",
        "the disk takes the journal again": "on_disk_recovered",
        "versions that a crash took back do not come again": "on_versions_lost",
        "message rejected": "on_message_rejected",
        "shutting down": "on_shutting_down",
        "destroyed": "on_destroyed",
    }
)
EVERY = "on_event"

MAX_WAITING = 1000
# A broker that ends gives what waits this long to be told.
END_WITHIN_S = 2.0


class Happening(NamedTuple):
    """What a hook is given.

    Attributes
    ----------
    hook : str
        Name of the method that is meant for it, such as ``on_worker_lost``.
    phrase : str
        As in the log.
    at : float
        Seconds since the epoch.
    fields : mapping
        The particulars, as in the log; more may be added.
    """

    hook: str
    phrase: str
    at: float
    fields: Mapping[str, Any]


class Hooks:
    """Calls the methods of one object.

    Parameters
    ----------
    target : object
        With some of the methods in `HOOKS`, or ``on_event``, which is told everything. Each takes one `Happening`.
    on_count : callable
        Is given the new counts, from either thread.
    max_waiting : int, > 0
        How many happenings wait at most.

    Raises
    ------
    ConfigError
        If the object has none of the methods, or one that is not known.
    """

    def __init__(
        self, target: object, on_count: Callable[[HooksCounted], None], max_waiting: int = MAX_WAITING
    ) -> None:
        names = {name for name in dir(target) if name.startswith("on_")}
        known = {*HOOKS.values(), EVERY}
        if not names or names - known:
            what = f"unknown hooks: {', '.join(sorted(names - known))}" if names else "no hooks"
            raise ConfigError(f"{target!r:.80} has {what}; there are {', '.join(sorted(known))}")
        self._methods = {name: getattr(target, name) for name in names}
        self._on_count = on_count
        self._waiting: queue.Queue[Happening | None] = queue.Queue(max_waiting)
        self._called = self._failed = self._dropped = 0
        self._limiter = log.RateLimiter()
        self._thread = threading.Thread(target=self._run, name="distgrad-hooks", daemon=True)
        self._thread.start()

    def tell(self, line: Log) -> None:
        """Have the object told of what was logged; returns at once.

        Parameters
        ----------
        line : Log
            What happened.
        """
        hook = HOOKS.get(line.phrase)
        if hook is None or not (hook in self._methods or EVERY in self._methods):
            return
        try:
            self._waiting.put_nowait(Happening(hook, line.phrase, time.time(), MappingProxyType(line.fields)))
        except queue.Full:
            self._dropped += 1
            self._count()

    def close(self) -> None:
        """Let what waits be told, for `END_WITHIN_S` at most; a hook that hangs is left behind."""
        deadline = time.monotonic() + END_WITHIN_S
        try:
            self._waiting.put(None, timeout=END_WITHIN_S)
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.event(
                _LOGGER, logging.WARNING, "a hook did not return, it is left behind", waiting=self._waiting.qsize()
            )

    def _run(self) -> None:
        while (happening := self._waiting.get()) is not None:
            for name in (happening.hook, EVERY):
                method = self._methods.get(name)
                if method is not None:
                    self._call(name, method, happening)
            self._count()

    def _call(self, name: str, method: Callable[[Happening], object], happening: Happening) -> None:
        self._called += 1
        try:
            method(happening)
        # The user's code: whatever it raises, even SystemExit, must not end this thread.
        except BaseException as error:
            self._failed += 1
            suppressed = self._limiter.admit(name, time.monotonic())
            if suppressed is not None:
                _LOGGER.warning(
                    log.Event("hook failed", {"hook": name, "not_logged_before": suppressed}), exc_info=error
                )

    def _count(self) -> None:
        self._on_count(HooksCounted(self._called, self._failed, self._dropped))


def load(target: str) -> object:
    """Import the user's object.

    Parameters
    ----------
    target : str
        ``module`` with functions, or ``module:name`` of an object or of a class, which is called without arguments.
        The module may be in the current folder.

    Returns
    -------
    object
        For `Hooks`.

    Raises
    ------
    ConfigError
        If there is no such thing, or importing it fails.
    """
    module_name, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: object = importlib.import_module(module_name)
        found = reduce(getattr, name.split("."), found) if name else found
        return found() if isinstance(found, type) else found
    except Exception as error:  # the module and the class are the user's code
        raise ConfigError(
            f"cannot load the hooks {target!r}: {type(error).__name__}: {error}",
            hint="write --hooks module:object, for a module in the current folder or one that is installed",
        ) from error
