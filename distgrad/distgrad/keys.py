"""Key files: who may talk to a broker, and as what.

A folder belongs to a broker. It holds the broker's own pair (``broker.key``, secret) and one ``NAME.pub`` for each
client, with the client's public key and role. A client needs a single file of its own, ``NAME.key``, with its secret
key and the broker's public one. All are TOML of a few lines; they are made and removed, never edited, so that the
folder's modification time tells a running broker when to read it again.
"""

from __future__ import annotations

import enum
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from distgrad import key_files
from distgrad.descriptors import with_spare
from distgrad.errors import KeyFileError

KeyPath: TypeAlias = "str | os.PathLike[str]"
MakePair: TypeAlias = "Callable[[], tuple[bytes, bytes]]"

_BROKER = "broker"
_SECRET_MODE = 0o600
_PUBLIC_MODE = 0o644
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_Z85 = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}", re.ASCII)
# A folder that changed less than this before it was read may change again without a new modification time: kernels
# stamp files in steps of some milliseconds, some network file systems in steps of a second or two.
_SETTLED_NS = 3 * 10**9


class Role(enum.StrEnum):
    """What a key allows."""

    WORKER = "worker"
    """Push gradients and pull parameters."""
    ADMIN = "admin"
    """Control the broker."""
    READ = "read"
    """Pull parameters and read the status."""


class Client(NamedTuple):
    """An entry of a broker's table of keys.

    Parameters
    ----------
    name : str
        For people; a name can come back with another key.
    role : Role
        What the key allows.
    public : bytes
        The public key, 40 characters of Z85.
    """

    name: str
    role: Role
    public: bytes


@dataclass(frozen=True)
class ClientKeys:
    """What a worker, an admin or a reader needs to talk to a broker with keys.

    Parameters
    ----------
    name : str
        Under which the broker's folder lists the public key.
    role : Role
        Its role when it was made; the broker's folder decides.
    public, secret : bytes
        The client's pair, each 40 characters of Z85.
    broker_public : bytes
        The broker's public key, 40 characters of Z85.
    """

    name: str
    role: Role
    public: bytes
    secret: bytes = field(repr=False)
    broker_public: bytes

    @classmethod
    def load(cls, path: KeyPath) -> ClientKeys:
        """Read a client's key file.

        Parameters
        ----------
        path : path
            A ``NAME.key`` that `add_client` wrote.

        Returns
        -------
        ClientKeys
            What the file says.

        Raises
        ------
        KeyFileError
            If the file is missing, malformed, or readable by anyone else.
        """
        path = Path(path)
        if path.is_dir():
            raise KeyFileError(
                f"{path} is a folder, which is what the broker takes",
                hint="give the client's own file, the NAME.key that distgrad keys new wrote",
            )
        values = key_files.read(path, secret=True)
        return cls(
            name=_name(path, values),
            role=_role(path, values),
            public=_key(path, values, "public"),
            secret=_key(path, values, "secret"),
            broker_public=_key(path, values, "broker"),
        )


@dataclass(frozen=True)
class BrokerKeys:
    """A broker's own pair and its table of clients, as they were when the folder was read.

    Parameters
    ----------
    folder : Path
        Where they come from.
    public, secret : bytes
        The broker's pair, each 40 characters of Z85.
    clients : mapping of bytes to Client
        By public key.
    problems : tuple of str
        What `refreshed` could not read and left out, one sentence each.
    """

    folder: Path
    public: bytes
    secret: bytes = field(repr=False)
    clients: Mapping[bytes, Client]
    problems: tuple[str, ...] = ()
    _modified_ns: int = field(default=0, repr=False)
    _is_settled: bool = field(default=False, repr=False)

    @classmethod
    def load(cls, folder: KeyPath) -> BrokerKeys:
        """Read a broker's folder.

        Parameters
        ----------
        folder : path
            Made by `add_client`.

        Returns
        -------
        BrokerKeys
            The table of now; see `refreshed`.

        Raises
        ------
        KeyFileError
            If something is missing, malformed, or open to others.
        """
        folder = Path(folder)
        if not folder.is_dir():
            what = "is a file, which is what a client takes" if folder.exists() else "does not exist"
            raise KeyFileError(f"key folder {folder} {what}", hint=key_files.HOW_TO_MAKE)
        path = folder / f"{_BROKER}.key"
        values = key_files.read(path, secret=True)
        public, secret = _key(path, values, "public"), _key(path, values, "secret")
        loaded = _with_clients(folder, public, secret)
        if loaded.problems:
            raise KeyFileError(loaded.problems[0], hint="remove that file, or distgrad keys revoke NAME --dir DIR")
        return loaded

    def refreshed(self) -> BrokerKeys:
        """Return the table of now, reading the folder only if it has changed.

        A file that cannot be read counts as absent here, so that it never keeps a revoked key alive.

        Returns
        -------
        BrokerKeys
            This one if nothing has changed, at the cost of one ``stat``.

        Raises
        ------
        KeyFileError
            If the folder itself cannot be read.
        """
        try:
            if self._is_settled and self.folder.stat().st_mtime_ns == self._modified_ns:
                return self
        except OSError as error:
            raise KeyFileError(f"cannot read key folder {self.folder}: {error.strerror}") from error
        return _with_clients(self.folder, self.public, self.secret)


def add_client(
    folder: KeyPath, name: str, role: Role, make_pair: MakePair, *, out: KeyPath | None = None
) -> tuple[ClientKeys, Path]:
    """Make a pair for a new client, and the folder with the broker's own pair at first use.

    Parameters
    ----------
    folder : path
        The broker's folder; made with mode 0700 if it does not exist.
    name : str
        1 to 64 letters, digits, ``_``, ``.`` and ``-``; not ``broker``, and not in use.
    role : Role
        What the key will allow.
    make_pair : callable
        Returns a new public and secret key (`distgrad.sockets.curve_pair`).
    out : path, optional
        Where to write the client's file. By default ``NAME.key`` beside the folder, which itself is the broker's
        and holds no client's secret.

    Returns
    -------
    keys : ClientKeys
        What the client's file says.
    path : Path
        Where it is. Its mode is 0600; it is on disk when the call returns.

    Raises
    ------
    KeyFileError
        If the name is impossible or taken, or a file exists already or cannot be written.
    """
    folder = Path(folder)
    check_name(name)
    entry = folder / f"{name}.pub"
    path = folder.absolute().parent / f"{name}.key" if out is None else Path(out)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeyFileError(f"cannot make key folder {folder}: {error.strerror}") from error
    if entry.exists():
        raise key_files.taken(entry)
    broker_public = _broker_public(folder, make_pair)
    public, secret = make_pair()
    keys = ClientKeys(name, role, public, secret, broker_public)
    key_files.create(path, _SECRET_MODE, f"the secret key of {name}: keep it private", {
        "name": name, "role": role, "public": public.decode(), "secret": secret.decode(),
        "broker": broker_public.decode(),
    })  # fmt: skip
    try:
        # Last, because this is what lets the key in.
        key_files.create(entry, _PUBLIC_MODE, f"what {name} may do here", {
            "name": name, "role": role, "public": public.decode(),
        })  # fmt: skip
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return keys, path


def revoke_client(folder: KeyPath, name: str) -> None:
    """Take a client's key out of a broker's folder. A running broker follows within seconds.

    Parameters
    ----------
    folder : path
        The broker's folder.
    name : str
        The client's name.

    Raises
    ------
    KeyFileError
        If there is no such client, or its file cannot be removed.
    """
    check_name(name)
    entry = Path(folder) / f"{name}.pub"
    try:
        entry.unlink()
        key_files.sync_folder(entry.parent)
    except FileNotFoundError as error:
        raise KeyFileError(f"no key named {name} in {folder}", hint=f"distgrad keys list --dir {folder}") from error
    except OSError as error:
        raise KeyFileError(f"cannot remove {entry}: {error.strerror}") from error


def check_name(name: str) -> None:
    """Refuse a client's name that cannot be a file's.

    Parameters
    ----------
    name : str
        The name.

    Raises
    ------
    KeyFileError
        If it is not 1 to 64 of the characters allowed.
    """
    if not _NAME.fullmatch(name) or name == _BROKER:
        raise KeyFileError(
            f"a key's name is 1 to 64 letters, digits, _ . - (no . or - first) and not {_BROKER!r}, got {name!r}"
        )


def _with_clients(folder: Path, public: bytes, secret: bytes) -> BrokerKeys:
    clients: dict[bytes, Client] = {}
    problems: list[str] = []
    read_ns = time.time_ns()
    try:
        # Before the listing: a change in between then shows as a change.
        status = folder.stat()
        key_files.check_not_writable_by_others(folder, status)
        names = with_spare(lambda: os.listdir(folder))
        entries = sorted(folder / name for name in names if name.endswith(".pub") and not name.startswith("."))
    except OSError as error:
        raise KeyFileError(f"cannot read key folder {folder}: {error.strerror}") from error
    for path in entries:
        try:
            values = key_files.read(path, secret=False)
            client = Client(_name(path, values), _role(path, values), _key(path, values, "public"))
            if client.name != path.stem:
                raise KeyFileError(f"{path} is the key of {client.name!r}, whose file is {client.name}.pub")
            if client.public in clients:
                raise KeyFileError(f"{path} has the same key as {clients[client.public].name}.pub")
            clients[client.public] = client
        except KeyFileError as error:
            problems.append(str(error))
    is_settled = read_ns - status.st_mtime_ns > _SETTLED_NS
    return BrokerKeys(folder, public, secret, clients, tuple(problems), status.st_mtime_ns, is_settled)


def _broker_public(folder: Path, make_pair: MakePair) -> bytes:
    """Return the public key of the folder's broker, which is made if there is none."""
    path = folder / f"{_BROKER}.key"
    if not path.exists():
        public, secret = make_pair()
        key_files.create(path, _SECRET_MODE, "the broker's secret key: keep it private", {
            "public": public.decode(), "secret": secret.decode(),
        })  # fmt: skip
        return public
    return _key(path, key_files.read(path, secret=True), "public")


def _key(path: Path, values: Mapping[str, object], which: str) -> bytes:
    value = values.get(which)
    if not isinstance(value, str) or not _Z85.fullmatch(value):
        raise KeyFileError(f"{path}: {which!r} must be a key of 40 Z85 characters", hint=key_files.HOW_TO_MAKE)
    return value.encode("ascii")


def _name(path: Path, values: Mapping[str, object]) -> str:
    name = values.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise KeyFileError(f"{path}: 'name' must be 1 to 64 letters, digits, _ . -", hint=key_files.HOW_TO_MAKE)
    return name


def _role(path: Path, values: Mapping[str, object]) -> Role:
    try:
        return Role(str(values.get("role")))
    except ValueError as error:
        raise KeyFileError(f"{path}: 'role' must be one of {', '.join(Role)}", hint=key_files.HOW_TO_MAKE) from error
