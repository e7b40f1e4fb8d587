"""Every error that distgrad raises on purpose, in one tree.

Branches say whose fault it is, so that callers catch a branch and read the leaf::

    DistgradError
    ├── ConfigError (ValueError)        the user's settings or arguments
    │   ├── InvalidMode                 not "descent" or "ascent"
    │   └── LayoutError                 parameters that cannot be laid out
    ├── StateError (RuntimeError)       right call, wrong moment
    │   ├── NoParameters                nothing was set yet
    │   ├── AlreadyRunning              start() twice
    │   ├── Destroyed                   destroy() was called
    │   ├── Forked                      used in a child of os.fork()
    │   └── UpdaterFailed               the updater ended with a bug; see __cause__
    ├── QueueFull                       a bounded queue had no room in time
    ├── PeerError                       what came over the wire is not acceptable
    │   ├── MalformedMessage            cannot be decoded
    │   │   └── WrongProtocol           of another protocol version
    │   └── GradientRefused             checked and refused whole; parameters untouched
    ├── ControlError                    the broker answered a request with an error
    │   ├── Forbidden                   the key's role does not allow it
    │   ├── BrokerRestarted             another incarnation answers now
    │   ├── HistoryLost                 a durable broker lost what it had acknowledged
    │   ├── Fenced                      a newer process took this worker id
    │   └── SnapshotRevoked             the broker took a snapshot back; pull again
    ├── DeliveryFailed                  the same gradient was sent five times in vain
    ├── BrokerUnreachable (TimeoutError)  no answer within the timeout
    ├── KeyFileError                    a key file is missing, loose or unreadable
    └── CheckpointError                 a file of parameters cannot be read or written
        ├── DataFolderInUse             another process has the data folder
        └── DataDamaged                 a journal or checkpoint is not as it was written
"""

from __future__ import annotations

from typing import Any


class DistgradError(Exception):
    """Root of every error that distgrad raises on purpose.

    Parameters
    ----------
    message : str
        What was expected, what came, and what to do next.
    hint : str, optional
        The next command or call to try; printed on a line of its own by the command line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


def _rebuild(kind: type[DistgradError], args: tuple[Any, ...], state: dict[str, Any]) -> DistgradError:
    """Unpickle an error without calling a constructor whose signature differs per class."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(DistgradError, ValueError):
    """A setting or an argument is impossible."""


class InvalidMode(ConfigError):
    """The gradient change mode is neither ``"descent"`` nor ``"ascent"``.

    Parameters
    ----------
    mode : object
        What was given.
    """

    def __init__(self, mode: object) -> None:
        super().__init__(f"gradient change mode must be 'descent' or 'ascent' (any case), got {mode!r}")
        self.mode = mode


class LayoutError(ConfigError):
    """Parameters or gradients cannot be laid out as asked.

    Parameters
    ----------
    message : str
        What is wrong.
    leaf : str, optional
        Path of the leaf at fault, joined with ``"."``.
    """

    def __init__(self, message: str, *, leaf: str | None = None) -> None:
        super().__init__(message)
        self.leaf = leaf


class StateError(DistgradError, RuntimeError):
    """The call is right but comes at the wrong moment."""


class NoParameters(StateError):
    """No parameters were set yet."""


class AlreadyRunning(StateError):
    """The updater runs already."""


class Destroyed(StateError):
    """``destroy()`` was called; nothing can be done with this any more."""


class Forked(StateError):
    """A socket or thread of the parent was used in a forked child."""


class UpdaterFailed(StateError):
    """The updater thread ended with an unexpected error, which is ``__cause__``."""


class QueueFull(DistgradError):
    """A bounded queue had no room within the time allowed."""


class PeerError(DistgradError):
    """Something that a peer sent is not acceptable."""


class MalformedMessage(PeerError):
    """A message cannot be decoded as this protocol's."""


class WrongProtocol(MalformedMessage):
    """A message is of another protocol version; what follows in it cannot be understood."""


class GradientRefused(PeerError):
    """A gradient was checked and refused whole; the parameters are untouched.

    Parameters
    ----------
    reason : str
        One of the reasons in ``docs/wire.md`` (``layout``, ``not_finite``, …).
    message : str
        What was expected and what came.
    leaf : str, optional
        Path of the leaf at fault, joined with ``"."``.
    number : int, optional
        The gradient's number, if it had one.
    """

    def __init__(self, reason: str, message: str, *, leaf: str | None = None, number: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.leaf = leaf
        self.number = number


class ControlError(DistgradError):
    """The broker answered a request with an error.

    Parameters
    ----------
    code : str
        The code on the wire (``docs/wire.md``).
    message : str
        The broker's sentence.
    hint : str, optional
        The next command or call to try.
    """

    def __init__(self, code: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class Forbidden(ControlError):
    """The key's role does not allow the request."""


class BrokerRestarted(ControlError):
    """Another incarnation of the broker answers now.

    ``lost`` is the range of this worker's gradient numbers whose effect is gone with the old
    incarnation, as ``(first, last)``, or ``None`` where none was lost or none is known.
    """

    lost: tuple[int, int] | None = None


class HistoryLost(ControlError):
    """A broker with a data folder does not have what it had acknowledged."""


class Fenced(ControlError):
    """A newer process took this worker's id; this one must not go on."""


class SnapshotRevoked(ControlError):
    """The broker took a snapshot back before all of it was read; pull again."""


class DeliveryFailed(DistgradError):
    """A gradient was sent five times while control answered, and never arrived."""


class BrokerUnreachable(DistgradError, TimeoutError):
    """The broker did not answer within the timeout."""


class KeyFileError(DistgradError):
    """A key file is missing, unreadable, malformed, or readable by others."""


class CheckpointError(DistgradError):
    """A file of parameters cannot be read or written."""


class DataFolderInUse(CheckpointError):
    """Another process has the data folder."""


class DataDamaged(CheckpointError):
    """A journal or checkpoint is not as it was written.

    Parameters
    ----------
    message : str
        What was expected and what was found.
    path : str
        The file at fault.
    offset : int
        Where in it, bytes.
    hint : str, optional
        The choices that are left.
    """

    def __init__(self, message: str, *, path: str, offset: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.offset = offset


_BY_CODE: dict[str, type[ControlError]] = {
    "forbidden": Forbidden,
    "restarted": BrokerRestarted,
    "history_lost": HistoryLost,
    "fenced": Fenced,
    "revoked": SnapshotRevoked,
}


def from_code(code: str, message: str) -> DistgradError:
    """Build the exception for an error code of the control channel.

    Parameters
    ----------
    code : str
        The ``error`` field of a reply.
    message : str
        The ``message`` field of a reply.

    Returns
    -------
    DistgradError
        The leaf for the code; a plain `ControlError` for a code that has none.
    """
    if code == "no_parameters":
        return NoParameters(message)
    if code == "destroyed":
        return Destroyed(message)
    if code == "invalid":
        return ConfigError(message)
    return _BY_CODE.get(code, ControlError)(code, message)
