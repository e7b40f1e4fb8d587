"""Read and write network addresses: ``host``, ``host:port``, ``[v6]:port``, ``tcp://…``.

Addresses are values. Nothing here asks the network or the resolver: what a name stands for is decided
by the sockets at the moment they bind or connect, so that a moved host is found again.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from distgrad.errors import ConfigError, MalformedMessage

CONTROL_PORT = 5556
GRADIENTS_PORT = 5555

_FORMS = "host, host:port, [IPv6]:port or tcp://host:port"
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_MAX_TEXT = 512


class Address(NamedTuple):
    """A host and a port.

    Parameters
    ----------
    host : str
        A name, an IPv4 or IPv6 address (without brackets), or ``"*"`` for every interface.
    port : int
        0 to 65535; 0 asks for any free port where one is bound.
    """

    host: str
    port: int

    @property
    def endpoint(self) -> str:
        """Return the address as ZeroMQ writes it, such as ``tcp://[::1]:5556``.

        Returns
        -------
        str
            The endpoint.
        """
        return f"tcp://{self}"

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach the address.

        Returns
        -------
        bool
            True for loopback addresses and ``localhost``; False for every other name, because
            what a name stands for can change.
        """
        number = _number(self.host)
        if number is None:
            return is_localhost(self.host)
        mapped = getattr(number, "ipv4_mapped", None)
        return (mapped or number).is_loopback

    @property
    def is_wildcard(self) -> bool:
        """Tell whether the address stands for every interface of a machine.

        Returns
        -------
        bool
            True for ``*``, ``0.0.0.0`` and ``::``.
        """
        if self.host == "*":
            return True
        number = _number(self.host)
        mapped = getattr(number, "ipv4_mapped", None)
        return number is not None and (mapped or number).is_unspecified

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, default_port: int) -> Address:
    """Read an address in any of the forms that people write.

    Parameters
    ----------
    text : str
        ``host``, ``host:port``, ``[v6]``, ``[v6]:port``, ``v6`` or any of these after ``tcp://``.
    default_port : int
        The port where the text names none.

    Returns
    -------
    Address
        What was read; IPv6 addresses in their shortest spelling.

    Raises
    ------
    ConfigError
        If the text is not an address; the message names the forms.

    Examples
    --------
    >>> parse("tcp://[0:0::1]", 5556).endpoint
    'tcp://[::1]:5556'
    """
    if not isinstance(text, str):
        raise ConfigError(f"an address is a text, got {text!r:.80}; write {_FORMS}")
    rest = text.strip()
    if len(rest) > _MAX_TEXT:
        raise ConfigError(f"an address has at most {_MAX_TEXT} characters, got {len(rest)}")
    scheme, separator, after = rest.partition("://")
    if separator:
        if scheme.lower() != "tcp":
            raise ConfigError(f"{text!r}: only tcp:// is spoken, got {scheme}://")
        rest = after.removesuffix("/")
    host, port = _split(rest, text)
    return Address(_checked_host(host, text), default_port if port is None else _checked_port(port, text))


def gradients_endpoint(control: Address, told: str, override: str | None) -> str:
    """Decide where a worker sends gradients.

    Parameters
    ----------
    control : Address
        Where the worker reached the broker for control.
    told : str
        The gradients endpoint that the broker told in its reply to ``hello``.
    override : str or None
        What the user said instead, for forwarded ports; its port defaults to the told one.

    Returns
    -------
    str
        An endpoint to connect to. A broker that is bound to every interface cannot know by which
        name it is reached, so the host is then the one that worked for control.

    Raises
    ------
    ConfigError
        If `override` is not an address.
    MalformedMessage
        If `told` is not one.
    """
    try:
        address = parse(told, GRADIENTS_PORT)
    except ConfigError as error:
        raise MalformedMessage(f"the broker told an impossible gradients endpoint: {error}") from error
    if override is not None:
        return parse(override, address.port).endpoint
    if address.is_wildcard:
        address = address._replace(host=control.host)
    return address.endpoint


def is_localhost(host: str) -> bool:
    """Tell whether a name is reserved for this machine (RFC 6761, section 6.3).

    Parameters
    ----------
    host : str
        A host name.

    Returns
    -------
    bool
        True for ``localhost`` and the names under it.
    """
    name = host.lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost")


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _split(rest: str, text: str) -> tuple[str, str | None]:
    """Separate host and port; more than one colon outside brackets is a bare IPv6 address."""
    if rest.startswith("["):
        host, closed, tail = rest[1:].partition("]")
        if not closed or ":" not in host or (tail and not tail.startswith(":")):
            raise ConfigError(f"{text!r} is not an address; write {_FORMS}")
        return host, tail[1:] if tail else None
    if rest.count(":") > 1:
        return rest, None
    host, colon, port = rest.partition(":")
    return host, port if colon else None


def _checked_host(host: str, text: str) -> str:
    if host == "*":
        return host
    number = _number(host)
    if number is not None:
        # A scope such as %eth0 goes on to the resolver as it is; letters and digits only, so that
        # nothing in it can be read as another part of an endpoint.
        scope = getattr(number, "scope_id", None)
        if scope is None or _NAME.fullmatch(scope):
            return str(number)
    elif _NAME.fullmatch(host) and ".." not in host and not re.fullmatch(r"[0-9.]+", host):
        return host
    raise ConfigError(f"{text!r}: {host!r} is not a host; write {_FORMS}")


def _checked_port(port: str, text: str) -> int:
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise ConfigError(f"{text!r}: a port is a number from 0 to 65535, got {port!r}")
    return int(port)
