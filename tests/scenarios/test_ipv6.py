"""IPv6, which ZeroMQ leaves off unless told: the loopback address and a wildcard, from flag to gradient."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from distgrad import Admin
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.processes import Process, run


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")

ZEROS = {"w": np.zeros(10, np.float32)}
ONES = {"w": np.ones(10, np.float32)}


def train_a_little(address: str) -> None:
    with Worker(address) as worker, Admin(address) as admin:
        worker.initialize(ZEROS)
        worker.push(ONES)
        worker.flush()
        assert admin.get_model_parameters()["w"].tolist() == [-1] * 10


def test_a_broker_on_the_ipv6_loopback_is_reached_there() -> None:
    with Broker(control="tcp://[::1]:0", gradients="[::1]:0") as broker:
        assert broker.address.startswith("tcp://[::1]:")
        assert broker.gradients.startswith("tcp://[::1]:")
        train_a_little(broker.address.removeprefix("tcp://"))


@pytest.mark.parametrize("host", ["[::1]", "127.0.0.1", "localhost"])
def test_a_broker_on_every_interface_is_reached_by_either_protocol(host: str) -> None:
    """The gradients' endpoint that it tells is a wildcard: workers take the host that worked for control."""
    with Broker(control="tcp://*:0", gradients="tcp://*:0", insecure=True) as broker:
        port = broker.address.rpartition(":")[2]
        train_a_little(f"{host}:{port}")


def test_the_command_line_takes_ipv6_addresses() -> None:
    with Process("broker", "--control", "[::1]:0", "--gradients", "tcp://[::1]:0") as process:
        address = process.wait_for_line(r"^distgrad broker control=(tcp://\[::1\]:\d+) gradients=tcp://\[::1\]:\d+$")[1]
        done = run("admin", address, "status")
        assert done.returncode == 0, done.stderr
