"""Notice what a test leaves behind: threads, descriptors, and open ZeroMQ contexts."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import zmq

_DESCRIPTORS = Path("/proc/self/fd")
_GRACE_S = 3.0
_END_CONTEXT_S = 5.0
# Opened once per process and kept on purpose: by numpy and others, and by matplotlib (its fonts).
_KEPT = ("/dev/urandom", "/site-packages/")

_contexts: weakref.WeakSet[zmq.Context[Any]] = weakref.WeakSet()


class Snapshot(NamedTuple):
    """What there is before a test."""

    threads: frozenset[int | None]
    descriptors: dict[str, str]
    contexts: frozenset[int]


def watch_contexts() -> None:
    """Remember every context from now on; ZeroMQ itself keeps no list."""
    _start_what_pyzmq_keeps()
    original = zmq.Context.__init__

    def remembering(self: zmq.Context[Any], *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _contexts.add(self)

    zmq.Context.__init__ = remembering  # type: ignore[method-assign]


def _start_what_pyzmq_keeps() -> None:
    """Make one zero-copy send, for which pyzmq starts a thread with a context that live as long as the process."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://first")
        other.connect("inproc://first")
        tracker = one.send(bytearray(1 << 20), copy=False, track=True)
        other.recv()
        if tracker is not None:
            tracker.wait(_GRACE_S)


def snapshot() -> Snapshot:
    """Take stock."""
    return Snapshot(
        frozenset(thread.ident for thread in threading.enumerate()),
        _descriptors(),
        frozenset(id(context) for context in _contexts if not context.closed),
    )


def leaks_since(before: Snapshot) -> list[str]:
    """Name what is there and was not, giving what is about to end a few seconds for it."""
    deadline = time.monotonic() + _GRACE_S
    found = _new(before)
    if found:
        # What hangs in a cycle (a traceback that holds a frame that holds a socket) is garbage, not a leak.
        gc.collect()
    while (found := _new(before)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if found:
        _end_contexts(before)
    return found


def _new(before: Snapshot) -> list[str]:
    threads = [
        f"thread {thread.name}"
        for thread in threading.enumerate()
        if thread.name.startswith("distgrad") and thread.ident not in before.threads
    ]
    contexts = [
        f"open context {context!r}"
        for context in list(_contexts)
        if not context.closed and id(context) not in before.contexts
    ]
    now = _descriptors()
    if len(now) <= len(before.descriptors):
        return threads + contexts
    descriptors = [
        f"descriptor {number} ({target})" for number, target in now.items() if before.descriptors.get(number) != target
    ]
    return threads + contexts + descriptors


def _descriptors() -> dict[str, str]:
    found: dict[str, str] = {}
    if not _DESCRIPTORS.is_dir():
        return found
    for number in os.listdir(_DESCRIPTORS):
        try:
            found[number] = os.readlink(_DESCRIPTORS / number)
        except OSError:
            continue
    tracker = _resource_tracker_descriptor()
    return {
        number: target
        for number, target in found.items()
        if number != tracker and not any(kept in target for kept in _KEPT)
    }


def _resource_tracker_descriptor() -> str | None:
    """Return the pipe to multiprocessing's resource tracker, which lives as long as the process."""
    from multiprocessing import resource_tracker

    descriptor = getattr(resource_tracker._resource_tracker, "_fd", None)
    return None if descriptor is None else str(descriptor)


def _end_contexts(before: Snapshot) -> None:
    """End leaked contexts on a thread of their own, so that a leak is a failure and not a hang."""
    for context in [context for context in _contexts if not context.closed and id(context) not in before.contexts]:
        thread = threading.Thread(target=context.destroy, kwargs={"linger": 0}, daemon=True, name="ends-a-context")
        thread.start()
        thread.join(_END_CONTEXT_S)
