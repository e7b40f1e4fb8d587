"""How parameters nest: dicts, lists, tuples and namedtuples around arrays, and each array's path.

A *structure* is the nest with a leaf's index in place of each array. It is what travels in a layout
frame, and what a nest is rebuilt from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from .errors import LayoutError

Nest: TypeAlias = Any
"""An array, or a dict, list, tuple or namedtuple of nests."""

MAX_DEPTH = 64
"""Containers within containers. It stops self-containing lists here, and recursion bombs on the wire."""

_CONTAINERS = (dict, list, tuple)
_INT_KEYS = range(-(2**63), 2**63)  # what msgpack and every other language can carry


class Container(NamedTuple):
    """A dict, list, tuple or namedtuple of a structure."""

    kind: str
    name: str  # class name of a namedtuple, else empty
    items: tuple[tuple[str | int, int | Container], ...]


Structure: TypeAlias = int | Container


def dissect(nest: Nest) -> tuple[Structure, list[str], list[Any]]:
    """Take a nest apart into its structure, the paths of its leaves, and the leaves.

    Parameters
    ----------
    nest : nest
        Anything that is no dict, list or tuple counts as a leaf, ``None`` included.

    Returns
    -------
    structure : Structure
        Leaves numbered in the order in which they were met.
    names : list of str
        Paths joined with ``"."``; a bare leaf's is empty.
    leaves : list
        The objects at these paths, untouched.

    Raises
    ------
    LayoutError
        If two paths are equal, a key cannot be part of a path, or the nest is too deep.
    """
    names: list[str] = []
    leaves: list[Any] = []

    def walk(node: Nest, path: str, depth: int) -> Structure:
        kind = _kind(node)
        if not kind:
            names.append(path)
            leaves.append(node)
            return len(leaves) - 1
        if depth == MAX_DEPTH:
            raise LayoutError(f"parameters nest deeper than {MAX_DEPTH} containers (at {path[:80]!r})", leaf=path)
        items = []
        for key, value in _items(node, kind):
            checked = _checked_key(key, path) if kind == "dict" else key
            items.append((checked, walk(value, join(path, checked, depth), depth + 1)))
        return Container(kind, type(node).__name__ if kind == "namedtuple" else "", tuple(items))

    structure = walk(nest, "", 0)
    if len(set(names)) != len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise LayoutError(f"two leaves have the same path {name!r}: rename one of the keys", leaf=name)
            seen.add(name)
    return structure, names, leaves


def join(path: str, key: str | int, depth: int) -> str:
    """Extend a path by a key.

    Parameters
    ----------
    path : str
        Path of the container.
    key : str or int
        Key, field or index within it.
    depth : int
        How many containers enclose the container; the outermost one has no path of its own.

    Returns
    -------
    str
        The path of what lies under the key.
    """
    return f"{path}.{key}" if depth else str(key)


def gather(structure: Structure, nest: Nest, leaves: list[Any]) -> bool:
    """Put a nest's leaves at their indices, if the nest has the structure's containers.

    This is the quick way for the usual case; no path is built.

    Parameters
    ----------
    structure : Structure
        What the nest should look like. Dicts may be in any order and may lack leaves.
    nest : nest
        The nest.
    leaves : list
        Filled in place; a leaf that is absent stays as it was.

    Returns
    -------
    bool
        False if the nest looks different, and must be matched by paths. `leaves` is then spoilt.
    """
    if isinstance(structure, int):
        leaves[structure] = nest
        return not _kind(nest)
    kind = _kind(nest)
    if kind != structure.kind:
        return False
    if kind == "dict":
        found = 0
        for key, inner in structure.items:
            if key in nest:
                found += 1
                value = nest[key]
                if isinstance(inner, int) and not isinstance(value, _CONTAINERS):
                    leaves[inner] = value  # by far the most frequent case, so without a call
                elif not gather(inner, value, leaves):
                    return False
            elif not isinstance(inner, int):
                return False
        return found == len(nest)
    if len(nest) != len(structure.items):
        return False
    if kind == "namedtuple" and nest._fields != tuple(field for field, _ in structure.items):
        return False
    return all(gather(inner, value, leaves) for (_, inner), value in zip(structure.items, nest, strict=True))


def build(structure: Structure, leaves: Sequence[Any], like: Nest = None) -> Nest:
    """Put leaves back into their containers.

    Parameters
    ----------
    structure : Structure
        The containers.
    leaves : sequence
        The leaves, by index.
    like : nest, optional
        A nest, or the `skeleton` of one, whose namedtuple classes are used at the same paths. A
        namedtuple with no counterpart becomes a dict.

    Returns
    -------
    nest
        New containers around the same leaves.
    """
    if isinstance(structure, int):
        return leaves[structure]
    kind = _kind(like)
    likes = dict(_items(like, kind)) if kind and not is_flat(structure) else {}
    values = [
        leaves[inner] if isinstance(inner, int) else build(inner, leaves, likes.get(key))
        for key, inner in structure.items
    ]
    if structure.kind == "list":
        return values
    if structure.kind == "tuple":
        return tuple(values)
    keys = [key for key, _ in structure.items]
    if structure.kind == "namedtuple" and getattr(like, "_fields", None) == tuple(keys):
        return type(like)._make(values)
    return dict(zip(keys, values, strict=True))


def stranger(name: str, nest: Nest, known: Sequence[str]) -> str:
    """Say why a leaf of a nest is none of the parameters.

    Parameters
    ----------
    name : str
        Path of the leaf.
    nest : nest
        What it is in.
    known : sequence of str
        Paths of the parameters; the leaf's is none of them.

    Returns
    -------
    str
        A sentence that leads to the cause: most often a list was given for an array, or an array for a dict.
    """
    for leaf in known:
        if not leaf or name.startswith(f"{leaf}."):
            inner = _found(nest, leaf)
            place = f"leaf {leaf!r}" if leaf else "the nest"
            advice = "the array itself" if isinstance(inner, dict) else "numpy.asarray of it"
            return f"{place} must be one array, got a {_kind(inner)} of {len(inner)}; pass {advice}"
    listed = ", ".join(map(repr, known[:4])) + (", …" if len(known) > 4 else "")
    if not name:
        return f"expected a nest with the leaves {listed}, got one array or number; pass it under its name"
    return f"leaf {name!r} is not one of the parameters: {listed}"


def is_flat(structure: Structure) -> bool:
    """Tell whether a structure is one container of leaves, as a model's state by name is.

    Parameters
    ----------
    structure : Structure
        Any.

    Returns
    -------
    bool
        False for a bare leaf, and where containers lie in containers.
    """
    return isinstance(structure, Container) and all(isinstance(inner, int) for _, inner in structure.items)


def skeleton(nest: Nest) -> Nest:
    """Copy a nest's containers without its leaves.

    Parameters
    ----------
    nest : nest
        The nest.

    Returns
    -------
    nest
        The same containers with ``None`` for each leaf: remembers namedtuple classes, holds no array.
    """
    return transform(nest, lambda leaf: None)


def transform(nest: Nest, function: Callable[[Any], Any]) -> Nest:
    """Copy a nest with a function applied to each leaf.

    Parameters
    ----------
    nest : nest
        The nest; not deeper than `dissect` allows.
    function : callable
        Takes a leaf, returns what takes its place.

    Returns
    -------
    nest
        New containers of the same kinds.
    """
    kind = _kind(nest)
    if not kind:
        return function(nest)
    if kind == "dict":
        return {key: transform(value, function) for key, value in nest.items()}
    values = [transform(value, function) for value in nest]
    if kind == "namedtuple":
        return type(nest)._make(values)
    return values if kind == "list" else tuple(values)


def _kind(node: Any) -> str:
    """Name the kind of container, or nothing for a leaf."""
    if isinstance(node, dict):
        return "dict"
    if isinstance(node, list):
        return "list"
    if isinstance(node, tuple):
        return "namedtuple" if hasattr(node, "_fields") else "tuple"
    return ""


def _found(nest: Nest, path: str, at: str = "", depth: int = 0) -> Nest:
    """Return what lies at a path, or None; for messages, as it looks everywhere."""
    if at == path and (depth or not path):
        return nest
    kind = _kind(nest)
    for key, value in _items(nest, kind) if kind else ():
        found = _found(value, path, join(at, key, depth), depth + 1)
        if found is not None:
            return found
    return None


def _items(node: Any, kind: str) -> Any:
    if kind == "dict":
        return node.items()
    return zip(node._fields, node, strict=True) if kind == "namedtuple" else enumerate(node)


def _checked_key(key: Any, path: str) -> str | int:
    """Return a dict's key as plain str or int, which is what can travel."""
    if isinstance(key, str):
        plain = str.__str__(key)
        if not plain.isascii():
            try:
                plain.encode()
            except UnicodeEncodeError:
                raise LayoutError(f"key {key!r} under {path!r} is no valid Unicode", leaf=path) from None
        return plain
    if isinstance(key, int) and not isinstance(key, bool) and key in _INT_KEYS:
        return int(key)
    raise LayoutError(f"keys must be strings or 64-bit integers, got {key!r} under {path!r}", leaf=path)
