"""Ports, keys, and a broker that is to be reached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distgrad import addresses, sockets
from distgrad.admin import Admin
from distgrad.doctor.finding import Finding, fault, ok, warning
from distgrad.errors import ConfigError, DistgradError, Forbidden, KeyFileError
from distgrad.health import obstacles
from distgrad.keys import BrokerKeys, ClientKeys
from distgrad.version import __version__

_PATIENCE_S = 5.0
# For a look whether what has a port on this machine is a broker.
_GLANCE_S = 1.0


def keys(path: Path) -> Iterator[Finding]:
    """Read a client's key file, or a broker's folder.

    Parameters
    ----------
    path : Path
        The file or the folder.

    Yields
    ------
    Finding
        One.
    """
    try:
        if path.is_dir():
            clients = BrokerKeys.load(path).clients.values()
            roles = ", ".join(f"{client.name} ({client.role})" for client in sorted(clients))
            yield ok("keys", f"{path} is a broker's folder and lets in: {roles or 'nobody'}")
        else:
            client = ClientKeys.load(path)
            yield ok("keys", f"{path} is the {client.role} key of {client.name}")
    except KeyFileError as error:
        yield fault("keys", str(error), error.hint or "distgrad keys new makes keys")


def ports(control: str, gradients: str) -> Iterator[Finding]:
    """Try to listen where a broker would.

    Parameters
    ----------
    control, gradients : str
        Its addresses.

    Yields
    ------
    Finding
        One for each.
    """
    for name, text, port in (
        ("control", control, addresses.CONTROL_PORT),
        ("gradients", gradients, addresses.GRADIENTS_PORT),
    ):
        address = addresses.parse(text, port)
        context = sockets.open_context()
        try:
            sockets.gradient_server(context, address.endpoint).close()
            yield ok("ports", f"{address.endpoint} is free for --{name}")
        except ConfigError as error:
            yield fault("ports", str(error), _way_out(name, address, control))
        finally:
            context.term()


def _way_out(name: str, taken: addresses.Address, control: str) -> str:
    """Say what to do about a port that is taken: by a broker, as most often, or by something else."""
    at = addresses.parse(control, addresses.CONTROL_PORT)
    asked = addresses.Address("127.0.0.1", at.port) if at.is_wildcard else at
    other = f"give --{name} another address"
    try:
        with Admin(str(asked), timeout=_GLANCE_S) as admin:
            admin.status()
    except DistgradError:
        return f"end what listens there (ss -ltnp), or {other}; if it is a broker with keys: distgrad doctor {asked}"
    return f"a broker runs there, look at it with: distgrad doctor {asked}; for a second one {other}"


def broker(address: str, key_path: Path | None) -> Iterator[Finding]:
    """Ask a broker for its status, with the key if there is one.

    Parameters
    ----------
    address : str
        Of its control channel.
    key_path : Path, optional
        A client's key file.

    Yields
    ------
    Finding
        On the way to it, then on what it tells.
    """
    try:
        with Admin(address, key_path, _PATIENCE_S) as admin:
            status = admin.status()
    except KeyFileError as error:
        yield fault("broker", f"it cannot be asked with this key: {error}", error.hint or "give a client's key file")
        return
    except Forbidden as error:
        yield ok("broker", f"{address} answers and knows the key, whose role may not see the status: {error}")
        return
    except DistgradError as error:
        yield fault("broker", str(error), error.hint or "see the broker's log")
        return
    accepted = "" if key_path is None else " and accepts the key"
    yield ok("broker", f"{address} answers{accepted}: version {status['version']}, {status['workers']} workers")
    other = status.get("distgrad")
    if other != __version__:
        yield warning(
            "broker", f"it is distgrad {other}, this is {__version__}", "install the same version on both sides"
        )
    for obstacle in obstacles(status):
        yield fault("broker", obstacle, "distgrad admin ADDRESS status tells more")
