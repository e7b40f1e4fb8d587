"""The layout frame: a layout as bytes, and back from bytes that nobody vouches for (``docs/wire.md``)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgpack
import numpy as np

from .arrays import DTYPES, dtype_of
from .errors import LayoutError, MalformedMessage
from .nests import MAX_DEPTH, Container, Structure, join

Spec: TypeAlias = tuple[str, tuple[int, ...], np.dtype[Any]]
"""Name, shape and dtype of a leaf."""

MAX_FRAME_BYTES = 4 << 20
_MAX_BYTES = 1 << 60  # of an arena: offsets stay well inside 64 bits, whatever a peer declares
_MAX_DIMENSIONS = 32  # NumPy 1.26's limit


def fingerprint(specs: Sequence[Spec]) -> int:
    """Name a layout by 64 bits.

    Parameters
    ----------
    specs : sequence of Spec
        The leaves in order.

    Returns
    -------
    int
        BLAKE2b of the leaves' encoding, big-endian.
    """
    return int.from_bytes(hashlib.blake2b(msgpack.packb(_leaves(specs)), digest_size=8).digest(), "big")


def write(specs: Sequence[Spec], structure: Structure) -> bytes:
    """Encode a layout.

    Parameters
    ----------
    specs : sequence of Spec
        The leaves in order.
    structure : Structure
        How they nest.

    Returns
    -------
    bytes
        The frame.

    Raises
    ------
    LayoutError
        If it would be larger than a frame may be.
    """
    frame: bytes = msgpack.packb({"leaves": _leaves(specs), "structure": _to_wire(structure)})
    if len(frame) > MAX_FRAME_BYTES:
        raise LayoutError(f"the layout takes {len(frame)} bytes on the wire, at most {MAX_FRAME_BYTES}")
    return frame


def read(frame: bytes | memoryview) -> tuple[Structure, list[Spec]]:
    """Decode a layout.

    Parameters
    ----------
    frame : bytes-like
        Whatever a peer sent.

    Returns
    -------
    structure : Structure
        How the leaves nest.
    specs : list of Spec
        The leaves in order. They may still describe more than any memory holds.

    Raises
    ------
    MalformedMessage
        If the frame is anything else than a whole, consistent layout.
    """
    try:
        if memoryview(frame).nbytes > MAX_FRAME_BYTES:
            raise ValueError(f"more than {MAX_FRAME_BYTES} bytes")
        message = msgpack.unpackb(frame, raw=False, max_ext_len=0)
        if type(message) is not dict or type(message.get("leaves")) is not list or not message["leaves"]:
            raise ValueError("no list of leaves")
        specs = [_checked_spec(entry) for entry in message["leaves"]]
        if sum(math.prod(shape) for _, shape, _ in specs) > _MAX_BYTES // 8:
            raise ValueError("too many elements")
        if len({name for name, _, _ in specs}) != len(specs):
            raise ValueError("two leaves have the same path")
        return _from_wire(message.get("structure"), [name for name, _, _ in specs]), specs
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise MalformedMessage(f"not a layout: {error}") from error


def _leaves(specs: Sequence[Spec]) -> list[list[Any]]:
    return [[name, list(shape), dtype.name] for name, shape, dtype in specs]


def _checked_spec(entry: Any) -> Spec:
    """Read name, shape and dtype of a leaf that a peer sent."""
    if type(entry) is not list or len(entry) != 3:
        raise ValueError("a leaf is [name, shape, dtype]")
    name, shape, dtype = entry
    if type(name) is not str or type(shape) is not list or len(shape) > _MAX_DIMENSIONS or dtype not in DTYPES:
        raise ValueError("a leaf is [name, shape, dtype] of a dtype that is carried")
    if not all(type(length) is int and 0 <= length <= _MAX_BYTES for length in shape):
        raise ValueError("a shape is an array of integers")
    if math.prod(max(length, 1) for length in shape) > _MAX_BYTES // 8:
        raise ValueError("a leaf is too large")
    return name, tuple(shape), dtype_of(dtype)


def _to_wire(structure: Structure) -> Any:
    """Turn a structure into what ``docs/wire.md`` calls ``structure``."""
    if isinstance(structure, int):
        return structure
    if structure.kind in ("list", "tuple"):
        return [structure.kind, [_to_wire(inner) for _, inner in structure.items]]
    pairs = [[key, _to_wire(inner)] for key, inner in structure.items]
    return [structure.kind, structure.name, pairs] if structure.kind == "namedtuple" else [structure.kind, pairs]


def _from_wire(message: Any, names: Sequence[str]) -> Structure:
    """Read a structure, each leaf of which lies at its path, once; `ValueError` for anything else."""
    free = dict(enumerate(names))

    def walk(node: Any, path: str, depth: int) -> Structure:
        if type(node) is int:
            if free.pop(node, None) != path:
                raise ValueError(f"leaf {node} does not lie at its path, is there twice, or does not exist")
            return node
        if type(node) is not list or not 2 <= len(node) <= 3 or depth == MAX_DEPTH:
            raise ValueError("structure is neither a leaf's index nor a container, or is too deep")
        kind, name, content = node[0], node[1] if len(node) == 3 else "", node[-1]
        if type(content) is not list or type(name) is not str or (len(node) == 3) != (kind == "namedtuple"):
            raise ValueError("a container is ['dict'|'list'|'tuple', items] or ['namedtuple', name, items]")
        if kind in ("list", "tuple"):
            content = [list(pair) for pair in enumerate(content)]
        elif kind not in ("dict", "namedtuple"):
            raise ValueError("containers are dict, list, tuple and namedtuple")
        items: list[tuple[str | int, Structure]] = []
        for pair in content:
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (str, int):
                raise ValueError("an item is [key, structure] with a string or an integer as key")
            items.append((pair[0], walk(pair[1], join(path, pair[0], depth), depth + 1)))
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a container has the same key twice")
        if kind == "namedtuple" and not all(type(key) is str for key, _ in items):
            raise ValueError("fields of a namedtuple are strings")
        return Container(kind, name, tuple(items))

    structure = walk(message, "", 0)
    if free:
        raise ValueError("a leaf is missing from the structure")
    return structure
