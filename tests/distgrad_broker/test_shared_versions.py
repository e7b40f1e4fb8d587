"""Versions that are read where they are: a copy is one version or is known to be none, and the broker never waits."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import numpy as np
import pytest

from distgrad.errors import MalformedMessage
from distgrad.fair_lock import FairLock
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.shared_reading import SharedReading
from distgrad.wire import Gradient
from distgrad_broker.buffers import N_BUFFERS
from distgrad_broker.shared_versions import MIN_BYTES, SharedArenas
from distgrad_broker.versions import Versions

if SharedReading().host is None:
    pytest.skip("memory is shared on Linux only", allow_module_level=True)

SIZE = MIN_BYTES // 4
NEST = {"w": np.zeros(SIZE, np.float32), "n": np.arange(SIZE, dtype=np.int64), "b": np.ones(3)}
LAYOUT = Layout.of(NEST)


def new_versions() -> Versions:
    versions = Versions(ParameterHolder(), SharedArenas())
    arenas = [versions.empty(arena.size, arena.dtype) for arena in LAYOUT.arenas]
    for arena, source in zip(arenas, LAYOUT.pack(NEST), strict=True):
        arena[:] = source
    versions.set(LAYOUT, arenas)
    return versions


def gradient_of(value: float) -> Gradient:
    gradient = Gradient()
    arenas = LAYOUT.new_gradient()
    for arena in arenas:
        arena[:] = value
    gradient.parts = [arena.data.cast("B") for arena in arenas]
    gradient.size = LAYOUT.gradient_bytes
    gradient.fingerprint, gradient.encoding = LAYOUT.fingerprint, "raw"
    return gradient


def arenas() -> list[Any]:
    return [np.empty(arena.size, arena.dtype) for arena in LAYOUT.arenas]


def read(versions: Versions, reading: SharedReading) -> list[Any] | None:
    shared = versions.share()
    assert shared is not None
    out = arenas()
    return out if reading.copy(*shared, out) else None


def test_a_copy_is_the_current_version_with_small_arenas_and_whole_numbers() -> None:
    versions, reading = new_versions(), SharedReading()
    for version in range(5):
        copy = read(versions, reading)
        assert copy is not None
        nest = LAYOUT.nest(LAYOUT.views(copy))
        assert (nest["w"] == -version).all()
        assert (nest["b"] == 1 - version).all()
        np.testing.assert_array_equal(nest["n"], NEST["n"])
        versions.apply(gradient_of(1.0))


def test_parameters_that_the_broker_began_with_are_shared_too() -> None:
    holder = ParameterHolder()
    holder.set_arenas(LAYOUT, [arena.copy() for arena in LAYOUT.pack(NEST)])

    copy = read(Versions(holder, SharedArenas()), SharedReading())

    assert copy is not None
    np.testing.assert_array_equal(LAYOUT.nest(LAYOUT.views(copy))["n"], NEST["n"])


def test_a_place_that_was_told_before_its_buffer_was_used_again_is_refused() -> None:
    versions, reading = new_versions(), SharedReading()
    versions.apply(gradient_of(1.0))
    shared = versions.share()
    assert shared is not None
    versions.expect_copy()

    for _ in range(N_BUFFERS - 1):  # the other buffers
        versions.apply(gradient_of(1.0))
        assert reading.copy(*shared, arenas())
    versions.apply(gradient_of(1.0))

    assert not reading.copy(*shared, arenas())


def test_while_nobody_copies_two_buffers_take_turns_and_stay_in_the_cache() -> None:
    versions = new_versions()
    versions.apply(gradient_of(1.0))
    used = set()
    for _ in range(2 * N_BUFFERS):
        assert versions.share() is not None  # a third one is there
        versions.apply(gradient_of(1.0))
        used.add(id(versions.holder.storage))

    assert len(used) == 2

    versions.expect_copy()
    for _ in range(2 * N_BUFFERS):
        versions.apply(gradient_of(1.0))
        used.add(id(versions.holder.storage))
    assert len(used) == N_BUFFERS


def test_what_is_copied_while_updates_go_on_is_one_version_or_known_not_to_be() -> None:
    versions, lock, stop = new_versions(), FairLock(), threading.Event()
    gradient = gradient_of(1.0)

    def update() -> None:
        while not stop.is_set():
            with lock:
                versions.apply(gradient)

    writer = threading.Thread(target=update)
    writer.start()
    whole = torn = 0
    try:
        reading, out = SharedReading(), arenas()
        while whole < 300:
            with lock:
                shared = versions.share()
                versions.expect_copy()
            assert shared is not None
            if reading.copy(*shared, out):
                whole += 1
                w, b = LAYOUT.nest(LAYOUT.views(out))["w"], LAYOUT.nest(LAYOUT.views(out))["b"]
                assert (w == w[0]).all()
                assert b[0] == w[0] + 1
            else:
                torn += 1
    finally:
        stop.set()
        writer.join()
    assert whole == 300, torn


def test_buffers_stay_as_few_as_they_are_and_are_given_back() -> None:
    def mappings() -> int:
        with open("/proc/self/maps", encoding="ascii") as file:
            return sum("memfd:distgrad-" in line for line in file)

    gc.collect()
    before, open_before = mappings(), len(os.listdir("/proc/self/fd"))
    versions, reading = new_versions(), SharedReading()
    for _ in range(50):
        versions.apply(gradient_of(1.0))
        assert read(versions, reading) is not None
    # Of the float32 arena each version has one, all have the same integers; each is mapped here twice.
    assert mappings() - before <= 2 * (N_BUFFERS + 1)

    del versions, reading
    gc.collect()
    assert (mappings(), len(os.listdir("/proc/self/fd"))) == (before, open_before)


def test_places_that_do_not_fit_are_refused() -> None:
    versions, reading = new_versions(), SharedReading()
    shared = versions.share()
    assert shared is not None
    places, small = shared

    for wrong in (None, [], [*places, None], [[1, 2, 3]] * len(places), [[*places[0][:3], 5, 1], *places[1:]]):  # type: ignore[index]
        with pytest.raises(MalformedMessage):
            reading.copy(wrong, small, arenas())
    with pytest.raises(MalformedMessage):
        reading.copy(places, [], arenas())


def test_memory_that_cannot_be_attached_to_is_not_tried_again() -> None:
    versions, reading = new_versions(), SharedReading()
    shared = versions.share()
    assert shared is not None
    gone = [None if place is None else [2**22 + 1, *place[1:]] for place in shared[0]]

    assert not reading.copy(gone, shared[1], arenas())
    assert reading.host is None
