"""Replacing the parameters: what is taken, what is refused, and who may."""

from __future__ import annotations

import numpy as np
import pytest

from distgrad.layout import Layout
from support.core_kit import LAYOUT, OTHER, Kit, frames_of

N = b"n" * 16

HOSTILE_SETS: list[tuple[str, list[bytes]]] = [
    ("no frames", []),
    ("no layout", [b""]),
    ("not msgpack", [b"\xc1"]),
    ("endless nesting", [b"\x91" * 100_000]),
    ("a number", [b"\x07"]),
    ("too long", [bytes(4 * 1024 * 1024 + 1)]),
    ("no parts", frames_of(LAYOUT)[:1]),
    ("cut part", [frames_of(LAYOUT)[0], frames_of(LAYOUT)[1][:-1]]),
    ("a byte too many", [*frames_of(LAYOUT), b"x"]),
    ("parts cut elsewhere", [frames_of(LAYOUT)[0], bytes(16), bytes(16)]),
    ("petabytes", [b"\x82\xa6leaves\x91\x93\xa0\x91\xcf\x00\x10\x00\x00\x00\x00\x00\x00\xa7float32\xa9structure\x00"]),
]


@pytest.mark.parametrize("frames", [pytest.param(frames, id=name) for name, frames in HOSTILE_SETS])
def test_a_hostile_set_is_refused_and_changes_nothing(frames: list[bytes]) -> None:
    kit = Kit()

    assert kit.ask("set", frames)["error"] == "malformed"
    assert (kit.state.fingerprint, kit.state.generation) == (LAYOUT.fingerprint, 0)


def test_set_replaces_the_parameters_raises_the_generation_and_keeps_version_and_numbers() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    kit.work()

    assert kit.ask("set", frames_of(OTHER, 3.0))["changed"]

    assert kit.core.name == ("one", 1, 1)
    assert kit.total == 15
    assert kit.member().settled == 1


def test_a_gradient_that_never_fits_is_refused_at_set() -> None:
    kit = Kit(queue_bytes=2000)
    large = Layout.of(np.zeros(600, np.float32))

    header = kit.ask("set", frames_of(large))

    assert header["error"] == "too_large"
    assert "--queue-bytes is 2000; raise it to at least 2400" in header["message"]
    assert kit.state.fingerprint == LAYOUT.fingerprint


def test_the_first_offer_wins_and_a_worker_may_only_offer() -> None:
    kit = Kit(None)
    one = kit.ask("set", frames_of(LAYOUT, 1.0), if_absent=True, role="worker", user="a")
    two = kit.ask("set", frames_of(OTHER, 2.0), if_absent=True, role="worker", user="b")

    assert (one["changed"], two["changed"]) == (True, False)
    assert kit.total == 8
    for keys in ({}, {"absent": True}, {"absent": True, "if_absent": True}):
        assert kit.ask("set", frames_of(LAYOUT), role="worker", user="a", **keys)["error"] == "forbidden"


def test_taking_the_parameters_away_ends_a_drain() -> None:
    kit = Kit()
    kit.hello()
    kit.push(1)
    drain = kit.send("stop", drain=True)

    kit.ask("set", absent=True)

    assert len(kit.replies_to(drain)) == 1
    assert kit.ask("set", absent=True)["changed"] is False
