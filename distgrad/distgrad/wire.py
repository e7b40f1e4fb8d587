"""Headers on the wire: one bounded msgpack map a message, checked before anything is done with it.

A message is a header frame and raw frames (``docs/wire.md`` has the byte tables). Invariants:

- Nothing is decoded before its length was checked, and msgpack builds maps, arrays, numbers, text and bytes only.
- A header that decodes is not yet believed: `distgrad.gradient_messages` and `field` check each value's type and range.
- What a message costs in the broker's memory is `charge` of its payload, on both sides of the wire.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

from distgrad.errors import ConfigError, MalformedMessage, WrongProtocol

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_CURSOR_BYTES = 4 * 1024
MAX_ID_CHARACTERS = 128
# Of what is set, read in ranges, or lies in slots: parts of 1 MiB reuse warm pages at both ends, measured at 2.2-2.5
# GB/s over loopback where one 100 MB frame moves at 0.9-1.0 GB/s. Gradients, and what comes in one reply, have larger
# ones, up to `MAX_FRAME_BYTES`: each costs Python's time, and an arena in one part need not be copied.
PART_BYTES = 1024 * 1024
# A reply of `get` or `range` holds at most this many parts (16 MiB), so that one slow reader pins little.
RANGE_PARTS = 16
# A gradient's header, its bookkeeping and ZeroMQ's frames cost about this much even for an empty payload.
MIN_CHARGE_BYTES = 1024

# So often a worker asks what became of its gradients where nobody waits for that; a broker of many names a longer time.
ASK_S = 0.2

# A payload of one part up to here travels in the header.
INLINE_BYTES = 16 * 1024
# So many gradients travel in one message at most.
MAX_TOGETHER = 64

GRADIENT = "gradient"
RAW = "raw"

INT64_MAX = 2**63 - 1
_TYPE_NAMES = {int: "an integer", str: "text", bool: "true or false", float: "a number", dict: "a map"}


class State(NamedTuple):
    """Name of one state of the parameters.

    Attributes
    ----------
    incarnation : str
        New each time a broker starts.
    generation : int
        Rises when parameters are replaced.
    version : int
        Updates applied so far.
    """

    incarnation: str
    generation: int
    version: int


class Gradient:
    """One gradient as it came from the wire: a checked header and a payload that nobody has looked at.

    Attributes
    ----------
    worker, session, attempt, number : str, str, int, int
        Who sends it, and its place in that worker's order.
    base : State or None
        The state that it was computed on.
    fingerprint : int
        The layout that its payload claims.
    encoding : str
        How the payload is encoded; ``"raw"`` is the arenas' bytes.
    examples : int
        Training examples behind it.
    loss : float or None
        For display.
    cursor : bytes, str or None
        Where the worker stands in its data.
    parts : sequence of buffers
        The payload frames.
    size, charge : int
        Bytes of payload, and what they count for in grants.
    user : str or None
        Identity that the connection's key gave, or ``None`` without keys.
    is_inline : bool
        Whether the payload came within the header's frame.
    slot : int or None
        The slot of shared memory that the payload lies in; `parts` are then views of it, and empty if it is not known.
    asks : int or None
        The number under which its worker's last pull is to be answered again, when this is decided on.
    frame : bytes
        The header's frame; set only where there is a journal to keep it in.
    sequence : int
        Of its record in the journal, likewise.
    """

    __slots__ = (
        "asks",
        "attempt",
        "base",
        "charge",
        "cursor",
        "encoding",
        "examples",
        "fingerprint",
        "frame",
        "is_inline",
        "loss",
        "number",
        "parts",
        "sequence",
        "session",
        "size",
        "slot",
        "user",
        "worker",
    )

    worker: str
    session: str
    attempt: int
    number: int
    base: State | None
    fingerprint: int
    encoding: str
    examples: int
    loss: float | None
    cursor: bytes | str | None
    parts: Sequence[Any]
    size: int
    charge: int
    user: str | None
    is_inline: bool
    slot: int | None
    asks: int | None
    frame: bytes
    sequence: int


def charge(payload_bytes: int) -> int:
    """Give what a gradient counts for in grants and in the queue's budget.

    Parameters
    ----------
    payload_bytes : int
        Bytes of its payload.

    Returns
    -------
    int
        Bytes charged: the payload's, and at least `MIN_CHARGE_BYTES`.
    """
    return payload_bytes if payload_bytes > MIN_CHARGE_BYTES else MIN_CHARGE_BYTES


def checked_cursor(cursor: object) -> bytes | str | None:
    """Check a cursor as a program gave it.

    Parameters
    ----------
    cursor : bytes, str or None
        Where its giver stands in its data.

    Returns
    -------
    bytes, str or None
        The same.

    Raises
    ------
    ConfigError
        If it is of another type, longer than one may be, or text that is not Unicode (names of files may be such).
    """
    if isinstance(cursor, str):
        try:
            cursor.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"cursor must be text that UTF-8 can hold, got {cursor!r:.80}; os.fsencode it") from error
    if cursor is None or (isinstance(cursor, bytes | str) and len(cursor) <= MAX_CURSOR_BYTES):
        return cursor
    raise ConfigError(f"cursor must be bytes or str of at most {MAX_CURSOR_BYTES}, got {cursor!r:.80}")


def pack(header: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Encode a header, or that of a journal's record.

    Parameters
    ----------
    header : mapping or sequence
        Text keys; values of None, bool, int, float, str, bytes, and arrays and maps of these.

    Returns
    -------
    bytes
        The frame.
    """
    packed: bytes = _packer.pack(header)
    return packed


class _Packer(threading.local):
    """A packer of each thread's own: to make one takes twice as long as to pack a header."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer().pack


_packer = _Packer()


def unpack(frame: Any) -> dict[str, Any]:
    """Decode a header frame.

    Parameters
    ----------
    frame : bytes or buffer
        As received.

    Returns
    -------
    dict
        The header, of this protocol's version; its values are not checked yet.

    Raises
    ------
    MalformedMessage
        If the frame is too long, is not msgpack, or holds no map with text keys.
    WrongProtocol
        If it is of another protocol version.
    """
    if len(frame) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"header must be at most {MAX_HEADER_BYTES} bytes, got {len(frame)}")
    try:
        header = msgpack.unpackb(frame)
    # msgpack raises ValueError and its subclasses for bad input, but lets other types through for a few shapes of it
    # (a map as a map's key is a TypeError, bad text a UnicodeDecodeError, deep nesting a StackError or RecursionError).
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedMessage(f"header is not msgpack: {type(error).__name__}") from error
    if type(header) is not dict:
        raise MalformedMessage(f"header must be a map, got {type(header).__name__}")
    version = header.get("v")
    if version != PROTOCOL_VERSION or type(version) is not int:
        raise WrongProtocol(f"protocol version must be {PROTOCOL_VERSION}, got {version!r:.40}")
    return header


def parse_state(value: Any) -> State:
    """Check the name of a state.

    Parameters
    ----------
    value : object
        A decoded ``[incarnation, generation, version]``.

    Returns
    -------
    State
        The same, checked.

    Raises
    ------
    MalformedMessage
        If it is anything else.
    """
    if (
        type(value) is not list
        or len(value) != 3
        or type(value[0]) is not str
        or type(value[1]) is not int
        or type(value[2]) is not int
        or value[1] < 0
        or value[2] < 0
    ):
        raise MalformedMessage("a state must be [incarnation, generation, version], and the numbers at least 0")
    return State(value[0], value[1], value[2])


def field(header: Mapping[str, Any], name: str, kind: type, default: Any = ..., *, low: float | None = None) -> Any:
    """Read one checked value from a header.

    Parameters
    ----------
    header : mapping
        From `unpack`.
    name : str
        Its key.
    kind : type
        The type that it must have; ``float`` admits integers.
    default : object, optional
        Given back where the key is missing or nil; without one that is an error.
    low : float, optional
        Smallest value allowed, for numbers.

    Returns
    -------
    object
        The value.

    Raises
    ------
    MalformedMessage
        If it is missing, of another type, or too small.
    """
    value: Any = header.get(name)
    if value is None and default is not ...:
        return default
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise MalformedMessage(f"{name!r} must be {_TYPE_NAMES.get(kind, kind.__name__)}, got {value!r:.40}")
    # Not "value < low": a NaN must fail too.
    if low is not None and not value >= low:  # type: ignore[operator]  # a number, as only those have a lowest value
        raise MalformedMessage(f"{name!r} must be at least {low}, got {value!r:.40}")
    if type(value) is int and value > INT64_MAX:
        raise MalformedMessage(f"{name!r} must fit in 63 bits, got {value!r:.40}")
    return value
