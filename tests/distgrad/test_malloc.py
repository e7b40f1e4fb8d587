"""Memory that malloc keeps, and gives back when it is asked to."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distgrad.malloc import keep_freed_memory

GIVE_BACK = """
import re
from pathlib import Path
from distgrad.malloc import give_back, keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

print(keep_freed_memory())
blocks = [b"x" * 1_000_000 for _ in range(64)]
del blocks
kept = resident()
give_back()
print(kept - resident() > 32_000_000)
"""


def test_malloc_is_told_once() -> None:
    assert keep_freed_memory() is keep_freed_memory()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is on Linux")
def test_what_is_freed_is_kept_until_it_is_given_back() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt")
    ended = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, check=True)

    assert ended.stdout.split() == ["True", "True"]
