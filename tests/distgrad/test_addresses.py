from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.addresses import Address, gradients_endpoint, is_localhost, parse
from distgrad.errors import ConfigError, MalformedMessage

CONTROL = Address("broker.example", 5556)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("host", "tcp://host:7"),
        ("host:80", "tcp://host:80"),
        ("tcp://host:80", "tcp://host:80"),
        ("TCP://host:80/", "tcp://host:80"),
        (" host:80\n", "tcp://host:80"),
        ("127.0.0.1", "tcp://127.0.0.1:7"),
        ("127.0.0.1:0", "tcp://127.0.0.1:0"),
        ("::1", "tcp://[::1]:7"),
        ("[::1]", "tcp://[::1]:7"),
        ("[::1]:80", "tcp://[::1]:80"),
        ("tcp://[0:0:0::1]:80", "tcp://[::1]:80"),
        ("[fe80::1%eth0]:80", "tcp://[fe80::1%eth0]:80"),
        ("*:80", "tcp://*:80"),
        ("*", "tcp://*:7"),
        ("my-broker_1.example.", "tcp://my-broker_1.example.:7"),
    ],
)
def test_every_usual_form_is_read(text: str, endpoint: str) -> None:
    assert parse(text, 7).endpoint == endpoint


@pytest.mark.parametrize("nothing", [None, 5556, b"host", ("host", 80)])
def test_what_is_no_text_is_refused_with_the_forms(nothing: Any) -> None:
    with pytest.raises(ConfigError, match=r"an address is a text, got .*; write host, host:port"):
        parse(nothing, 7)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "host:",
        "host:port",
        "host:65536",
        "host:-1",
        "host:٣",
        "a b:80",
        "tcp://",
        "ipc:///tmp/x",
        "inproc://x",
        "http://host",
        "[::1",
        "[::1]80",
        "[host]:80",
        "[]:80",
        "::1::2",
        "256.1.1.1",
        "1.2.3",
        "a..b",
        "-a",
        "host;tcp://evil:1",
        "fe80::1%a/b",
        "hö:80",
        "x" * 600,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text, 7)


def test_the_refusal_names_the_forms() -> None:
    with pytest.raises(ConfigError, match=r"host:port, \[IPv6\]:port"):
        parse("a b", 7)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_config_error_and_what_is_read_reads_again(text: str) -> None:
    try:
        address = parse(text, 7)
    except ConfigError:
        return

    assert parse(address.endpoint, 9) == address
    assert parse(str(address), 9) == address


@given(st.ip_addresses(), st.integers(0, 65535))
def test_every_ip_address_survives_a_round_trip(number: object, port: int) -> None:
    address = parse(Address(str(number), port).endpoint, 7)

    assert address == Address(str(number), port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST.", "a.localhost"])
def test_loopback_is_known(host: str) -> None:
    assert Address(host, 1).is_loopback


def test_an_ipv4_loopback_in_ipv6_clothes_is_loopback() -> None:
    assert parse("[::ffff:127.0.0.1]:1", 7).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "10.0.0.1", "broker", "localhost.example", "::ffff:10.0.0.1"])
def test_everything_else_is_not_loopback(host: str) -> None:
    assert not Address(host, 1).is_loopback


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "::", "::ffff:0.0.0.0"])
def test_wildcards_are_known(host: str) -> None:
    assert Address(host, 1).is_wildcard


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "broker"])
def test_everything_else_is_no_wildcard(host: str) -> None:
    assert not Address(host, 1).is_wildcard


def test_only_localhost_and_names_under_it_are_localhost() -> None:
    assert is_localhost("a.b.LocalHost")
    assert not is_localhost("notlocalhost")


@pytest.mark.parametrize("told", ["tcp://0.0.0.0:5555", "tcp://[::]:5555", "tcp://*:5555"])
def test_a_broker_on_every_interface_is_reached_where_control_was(told: str) -> None:
    assert gradients_endpoint(CONTROL, told, None) == "tcp://broker.example:5555"


def test_the_host_of_control_may_be_ipv6() -> None:
    assert gradients_endpoint(Address("::1", 1), "tcp://*:5555", None) == "tcp://[::1]:5555"


def test_a_told_host_is_believed() -> None:
    assert gradients_endpoint(CONTROL, "tcp://10.0.0.2:5555", None) == "tcp://10.0.0.2:5555"


@pytest.mark.parametrize(
    ("override", "endpoint"), [("gate:99", "tcp://gate:99"), ("gate", "tcp://gate:5555"), ("[::1]", "tcp://[::1]:5555")]
)
def test_the_user_overrides_what_was_told(override: str, endpoint: str) -> None:
    assert gradients_endpoint(CONTROL, "tcp://10.0.0.2:5555", override) == endpoint


def test_nonsense_from_the_broker_is_its_fault() -> None:
    with pytest.raises(MalformedMessage, match="gradients endpoint"):
        gradients_endpoint(CONTROL, "ipc:///tmp/x", None)


def test_nonsense_from_the_user_is_the_users_fault() -> None:
    with pytest.raises(ConfigError):
        gradients_endpoint(CONTROL, "tcp://*:5555", "a b")
