"""Rules that hold for every test: a clean environment, and nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from support import leaks

leaks.watch_contexts()
# Whoever runs the tests in the background has SIGINT ignored, by them and by every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread of ours, a descriptor or an open context behind."""
    before = leaks.snapshot()
    yield
    found = leaks.leaks_since(before)
    if found:
        pytest.fail("left behind: " + ", ".join(found), pytrace=False)


@pytest.fixture(autouse=True)
def clean_environment(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("DISTGRAD_"):
            monkeypatch.delenv(name)
