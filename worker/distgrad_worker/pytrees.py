"""JAX pytrees as what a broker knows: names, nests, and back into pytrees. Needs the extra ``jax``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distgrad.errors import LayoutError, StateError
from distgrad.snapshot import Snapshot

# How many kinds of pytrees are remembered with their names: parameters, their gradients, a few subtrees.
_REMEMBERED_TREES = 16


def leaf_names(tree: Any) -> list[str]:
    """Name the leaves of a pytree as the broker does.

    Parameters
    ----------
    tree : pytree
        Its leaves may be anything.

    Returns
    -------
    list of str
        In the order of ``jax.tree_util.tree_leaves``.
    """
    return list(_names(jax.tree_util.tree_structure(tree)))


def as_nest(tree: Any) -> Any:
    """Turn a pytree into what `Worker.initialize` and `Admin.set_model_parameters` take.

    Parameters
    ----------
    tree : pytree of array_like
        Any registered nodes; ``None`` is a node without leaves, as JAX has it.

    Returns
    -------
    nest of ndarray
        Dicts, lists, tuples and namedtuples as they are, other nodes as dicts; a leaf has the same name. Lists and
        tuples with a ``None`` become dicts of the rest. Arrays may share memory with the tree's, read-only.

    Raises
    ------
    StateError
        If it is called inside ``jax.jit``.
    """
    if jax.tree_util.all_leaves([tree]):
        return _on_host([tree])[0]
    children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0]
    items = {_key(path[0]): as_nest(child) for path, child in children if child is not None}
    if not isinstance(tree, list | tuple) or len(items) < len(tree):
        return items
    if isinstance(tree, list):
        return list(items.values())
    return type(tree)._make(items.values()) if hasattr(tree, "_make") else tuple(items.values())


def as_tree(snapshot: Snapshot, like: Any) -> Any:
    """Put pulled parameters into the nodes of a pytree.

    Parameters
    ----------
    snapshot : Snapshot
        What a pull brought. Copied.
    like : pytree
        Leaves with shape and dtype: arrays, numbers, ``jax.ShapeDtypeStruct``. The snapshot may have more.

    Returns
    -------
    pytree of jax.Array
        Nodes of `like`; each array in the dtype of its counterpart (as JAX takes it: without x64 a float64 is a
        float32), on the devices that it was put on, if it was.

    Raises
    ------
    LayoutError
        If a leaf is missing, or has another shape, or a dtype of another kind.
    StateError
        If it is called inside ``jax.jit``.
    """
    leaves, structure = jax.tree_util.tree_flatten(like)
    _refuse_tracers(leaves)
    views = snapshot.layout.views(snapshot.arenas)
    found = {leaf.name: view for leaf, view in zip(snapshot.layout.leaves, views, strict=True)}
    pairs = zip(_names(structure), leaves, strict=True)
    return structure.unflatten([_placed(name, leaf, found) for name, leaf in pairs])


def named_arrays(tree: Any) -> dict[str, Any]:
    """Fetch the leaves of a pytree from their devices, all at once.

    Parameters
    ----------
    tree : pytree of array_like
        Gradients, say. The ``float0`` that ``jax.grad`` gives for integers counts as absent.

    Returns
    -------
    dict of str to ndarray
        By name. Arrays may share memory with the tree's, read-only.

    Raises
    ------
    StateError
        If it is called inside ``jax.jit``.
    """
    leaves, structure = jax.tree_util.tree_flatten(tree)
    pairs = zip(_names(structure), _on_host(leaves), strict=True)
    return {name: array for name, array in pairs if getattr(array, "dtype", None) != jax.dtypes.float0}


@lru_cache(_REMEMBERED_TREES)
def _names(structure: Any) -> tuple[str, ...]:
    """Name the leaves of all trees of one structure; writing a thousand paths takes longer than a small step."""
    paths = jax.tree_util.tree_flatten_with_path(structure.unflatten(range(structure.num_leaves)))[0]
    return tuple(".".join(str(_key(key)) for key in path) for path, _ in paths)


def _key(key: Any) -> Any:
    """Return what is behind JAX's four kinds of keys; another kind writes itself."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return jax.tree_util.keystr((key,), simple=True)


def _on_host(leaves: list[Any]) -> list[Any]:
    """Fetch arrays from their devices, all at once."""
    _refuse_tracers(leaves)
    fetched: list[Any] = jax.device_get(leaves)
    return fetched


def _refuse_tracers(leaves: list[Any]) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise StateError(
            "a broker cannot be talked to from inside a function that JAX traces: jit what computes the gradients, "
            "and call this on its results"
        )


def _placed(name: str, leaf: Any, found: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Copy one array to where its counterpart is."""
    if name not in found:
        known = ", ".join(map(repr, list(found)[:4])) + (", …" if len(found) > 4 else "")
        raise LayoutError(f"leaf {name!r} is not one of the broker's parameters ({known})", leaf=name)
    array, dtype = found[name], jnp.result_type(leaf)
    if array.shape != jnp.shape(leaf):
        raise LayoutError(f"leaf {name!r} has shape {jnp.shape(leaf)} here and {array.shape} at the broker", leaf=name)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise LayoutError(f"leaf {name!r} is {dtype} here and {array.dtype} at the broker", leaf=name)
    # A copy, as JAX may keep the very memory that it is given, which a later pull may reuse.
    copied = np.array(array, dtype)
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and getattr(leaf, "committed", True):
        return jax.device_put(copied, sharding)
    return jnp.asarray(copied)
