"""What a checkpoint holds, and the header that describes it in a ``.safetensors`` file (``docs/checkpoint.md``).

A file has the arenas one behind the other, as they lie in memory. Its header names every leaf of them, so that plain
safetensors opens it; distgrad itself goes by the layout frame in the metadata, and the leaves have to agree with it.

Every version of the format begins with the same bytes up to the checksum, which covers the whole file in the same way.
So a file of a version that is not known can be told from one that is damaged.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distgrad.errors import CheckpointError, ConfigError, MalformedMessage
from distgrad.layout import Layout, Leaf
from distgrad.rules import state_dtype

Array: TypeAlias = NDArray[Any]

FORMAT = 1
"""Version of the format that is written."""
MAX_HEADER_BYTES = 100_000_000
"""Largest header that safetensors opens."""
UNSIGNED = b"0" * 16
"""Stands in the checksum's place while the checksum is computed."""
# What one bare array is called where a name cannot be empty; as in distgrad.parameter_files.
BARE_NAME = "parameters"

_METADATA = "__metadata__"  # safetensors' own name for what is no tensor
_OPENING = f'{{"{_METADATA}":'
_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_ALIGNMENT = 64
_DIGITS = re.compile(r"[0-9]{1,20}")
_BEGINNING = re.compile(rb'\{"__metadata__":\{"format":"distgrad checkpoint (\d{1,9})","checksum":"([0-9a-f]{16})"')
_DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a restart begins with.

    Attributes
    ----------
    sequence : int
        Where in the journal it stands, 0 to 2**64 - 1. The newest checkpoint has the highest.
    version : int
        Updates that were applied to the parameters, 0 to 2**64 - 1.
    state : bytes
        What the owner wants back; opaque here.
    layout : Layout or None
        Of the parameters; None if there are none.
    arenas : sequence of ndarray
        One per arena of the layout, 1-D and contiguous.
    slots : mapping of str to sequence of ndarray
        The rule's state, as `ParameterHolder.state` has it: for each slot an array per trainable arena.
    """

    sequence: int
    version: int
    state: bytes
    layout: Layout | None = None
    arenas: Sequence[Array] = ()
    slots: Mapping[str, Sequence[Array]] = field(default_factory=dict)


class Block(NamedTuple):
    """One arena in a file; `slot` is None for the parameters' own. In the file `prefix` stands before each name."""

    slot: str | None
    arena: int
    prefix: str
    dtype: np.dtype[Any]
    size: int
    leaves: Sequence[tuple[str, Leaf]]


class Header(NamedTuple):
    """What a header says, once it has been checked."""

    sequence: int
    version: int
    state: bytes
    layout: Layout | None
    slots: tuple[str, ...]
    blocks: Sequence[Block]


def stored_names(layout: Layout) -> list[str]:
    """Tell what each leaf of the parameters is called in a file.

    Parameters
    ----------
    layout : Layout
        Their layout.

    Returns
    -------
    list of str
        The leaves' own names. Only an empty name, and the one name that safetensors keeps for itself, are replaced:
        by ``parameters`` and by itself, with as many ``_`` behind as make it differ from all others.
    """
    taken = {leaf.name for leaf in layout.leaves} | {_METADATA}
    names = []
    for leaf in layout.leaves:
        name = leaf.name
        if name in ("", _METADATA):
            name = name or BARE_NAME
            while name in taken:
                name += "_"
            taken.add(name)
        names.append(name)
    return names


def slot_prefix(names: Sequence[str]) -> str:
    """Choose what the names of optimizer state begin with.

    Parameters
    ----------
    names : sequence of str
        Of the parameters, from `stored_names`.

    Returns
    -------
    str
        ``optimizer:``, with as many ``_`` before it as it takes for no leaf to begin so.
    """
    prefix = "optimizer:"
    while any(name.startswith(prefix) for name in names):
        prefix = "_" + prefix
    return prefix


def lay_out(layout: Layout | None, slots: Sequence[str], names: Sequence[str], prefix: str) -> list[Block]:
    """Put arenas in the order in which they stand in a file.

    Parameters
    ----------
    layout : Layout or None
        Of the parameters.
    slots : sequence of str
        Names of the rule's state arrays.
    names : sequence of str
        From `stored_names`.
    prefix : str
        From `slot_prefix`.

    Returns
    -------
    list of Block
        Those with the widest elements first, so that each element lies at a multiple of its width.
    """
    if layout is None:
        return []
    leaves: list[list[tuple[str, Leaf]]] = [[] for _ in layout.arenas]
    for name, leaf in zip(names, layout.leaves, strict=True):
        leaves[leaf.arena].append((name, leaf))
    blocks = [
        Block(None, number, "", arena.dtype, arena.size, leaves[number]) for number, arena in enumerate(layout.arenas)
    ] + [
        Block(slot, number, f"{prefix}{slot}:", state_dtype(arena.dtype), arena.size, leaves[number])
        for slot in slots
        for number, arena in enumerate(layout.arenas[: layout.n_trainable_arenas])
    ]
    return sorted(blocks, key=lambda block: -block.dtype.itemsize)


def write_header(checkpoint: Checkpoint) -> tuple[bytes, int, list[Block]]:
    """Describe a checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
        What will stand in the file.

    Returns
    -------
    head : bytes
        All that comes before the data; `UNSIGNED` stands in the checksum's place.
    place : int
        Where that place begins.
    blocks : list of Block
        The data, in order.

    Raises
    ------
    CheckpointError
        If it has more leaves, or more state, than safetensors takes.
    ConfigError
        If a slot's name has a colon in it, which would make names ambiguous.
    """
    layout = checkpoint.layout
    slots = list(checkpoint.slots)
    if any(":" in slot for slot in slots):
        raise ConfigError(f"the name of a rule's slot cannot have a colon in it: {', '.join(slots)}")
    names = stored_names(layout) if layout is not None else []
    prefix = slot_prefix(names)
    blocks = lay_out(layout, slots, names, prefix)
    metadata = {
        "format": f"distgrad checkpoint {FORMAT}",
        "checksum": UNSIGNED.decode(),
        "sequence": str(checkpoint.sequence),
        "version": str(checkpoint.version),
        "slots": json.dumps(slots),
        "slot_prefix": prefix,
        "layout": base64.b64encode(layout.to_frame() if layout is not None else b"").decode(),
        "state": base64.b64encode(checkpoint.state).decode(),
    }
    text = "".join((_OPENING, _JSON.encode(metadata), *_described(blocks), "}")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"the header would take {len(text)} bytes; safetensors opens at most {MAX_HEADER_BYTES}")
    found = _BEGINNING.match(text)
    assert found is not None
    return len(text).to_bytes(8, "little") + text, 8 + found.start(2), blocks


def beginning(text: bytes) -> tuple[int, bytes, int] | None:
    """Read what is the same in every version of the format.

    Parameters
    ----------
    text : bytes
        The header, without its length.

    Returns
    -------
    (int, bytes, int) or None
        Version of the format, checksum, and where in the header it stands; None if this is no checkpoint.
    """
    found = _BEGINNING.match(text)
    return (int(found[1]), found[2], found.start(2)) if found else None


def read_header(text: bytes) -> Header:
    """Read a header of this version that nobody vouches for.

    Parameters
    ----------
    text : bytes
        The header, without its length.

    Returns
    -------
    Header
        All that it says. Its blocks may still be larger than any memory.

    Raises
    ------
    ValueError
        With the reason, if it is anything else than what `write_header` makes.
    """
    try:
        decoded = text.decode()
        metadata, end = json.JSONDecoder().raw_decode(decoded, len(_OPENING))
        sequence, version = (_number(metadata[key]) for key in ("sequence", "version"))
        slots, prefix = json.loads(metadata["slots"]), metadata["slot_prefix"]
        frame, state = (base64.b64decode(metadata[key], validate=True) for key in ("layout", "state"))
        layout = Layout.from_frame(frame) if frame else None
    except MalformedMessage as error:
        raise ValueError(error.message) from error
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error
    if type(slots) is not list or not all(type(slot) is str and ":" not in slot for slot in slots):
        raise ValueError("the slots are no list of names")
    if len(set(slots)) < len(slots) or type(prefix) is not str:
        raise ValueError("two slots have the same name, or the names no beginning")
    # Nothing is made here whose size the header's own does not bound: blocks share their leaves, and have no names yet.
    blocks = lay_out(layout, slots, stored_names(layout) if layout is not None else [], prefix)
    for described in _described(blocks):
        if not decoded.startswith(described, end):
            raise ValueError(f"at {end} it should go on with {described[:200]!r}, as the layout has it")
        end += len(described)
    if decoded[end:].rstrip(" ") != "}":
        raise ValueError("it goes on behind its last array")
    return Header(sequence, version, state, layout, tuple(slots), blocks)


def _described(blocks: Sequence[Block]) -> Iterator[str]:
    """Say of each leaf what safetensors wants to know.

    It is put together here, leaf by leaf, as `json.dumps` would keep every other thread waiting for tens of
    milliseconds where there are many leaves.
    """
    begin = 0
    for block in blocks:
        dtype, width = _stored_dtype(block.dtype), block.dtype.itemsize
        for name, leaf in block.leaves:
            end = begin + leaf.size * width
            quoted, shape = _JSON.encode(block.prefix + name), ",".join(map(str, leaf.shape))
            yield f',{quoted}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}'
            begin = end


@functools.cache
def _stored_dtype(dtype: np.dtype[Any]) -> str:
    """Give safetensors' name of a dtype: NumPy puts together its own anew each time."""
    return _DTYPES[dtype.name]


def _number(text: str) -> int:
    if not _DIGITS.fullmatch(text):
        raise ValueError(f"not a number: {text[:40]!r}")
    return int(text)
