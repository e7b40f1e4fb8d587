"""Two hosts on one machine: network namespaces joined by a cable (a veth pair), which share nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

# Only inside the namespaces, so they cannot clash with anything of the machine (RFC 2544's range for tests).
BROKER_IP = "198.18.0.1"
WORKER_IP = "198.18.0.2"


class Hosts(NamedTuple):
    """Prefixes of commands that run them on one of the hosts."""

    broker: tuple[str, ...]
    worker: tuple[str, ...]


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make the hosts, or skip the test where that is not possible; they are gone afterwards in any case."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` command")
    names = [f"distgrad-test-{os.getpid()}-{side}" for side in ("broker", "worker")]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, (BROKER_IP, WORKER_IP), strict=True):
                _ip("-n", name, "address", "add", f"{address}/30", "dev", "cable")
                _ip("-n", name, "link", "set", "cable", "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield Hosts(*(("ip", "netns", "exec", name) for name in names))
    finally:
        for name in names:
            # Takes the cable with it. What was not made cannot be deleted, which is no error here.
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
