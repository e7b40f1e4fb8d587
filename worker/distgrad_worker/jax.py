"""JAX pytrees for a broker: push, pull, and an optax-like gradient transformation. Needs the extra ``jax``.

A leaf's name is its path, as ``keystr(path, simple=True, separator=".")`` writes it, such as ``dense.kernel`` or
``layers.0.w``: what a NumPy worker's nest and a torch module call it. Everything here talks to the broker, so none of
it can run inside ``jax.jit``; what computes the gradients can.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distgrad.errors import ConfigError, LayoutError, StateError
from distgrad.snapshot import Snapshot

if TYPE_CHECKING:
    from distgrad.wire import State
    from distgrad_worker.worker import Worker

__all__ = [
    "DistributedState",
    "DistributedTransformation",
    "as_nest",
    "as_tree",
    "distributed",
    "initialize",
    "leaf_names",
    "pull",
    "push",
]

# How many kinds of pytrees are remembered with their names: parameters, their gradients, a few subtrees.
_REMEMBERED_TREES = 16


class DistributedState(NamedTuple):
    """What `distributed` carries from one update to the next; a pytree, as optax has it.

    Parameters
    ----------
    version : int
        Version of the broker's parameters that were seen last.
    number : int
        Number of the gradient that was pushed last, 0 before the first.
    is_current : bool
        Whether the caller has that version's parameters; False only if `init` was given others.
    """

    version: int
    number: int
    is_current: bool


class DistributedTransformation(NamedTuple):
    """A pair of functions with the interface of ``optax.GradientTransformationExtraArgs``.

    Parameters
    ----------
    init : callable
        ``init(params) -> DistributedState``.
    update : callable
        ``update(updates, state, params, *, value=None, examples=1, cursor=None) -> (difference, state)``.
    """

    init: Callable[[Any], DistributedState]
    update: Callable[..., tuple[Any, DistributedState]]


def distributed(worker: Worker, *, wait: bool = True) -> DistributedTransformation:
    """Make a gradient transformation whose optimizer is the broker.

    ``init(params)`` offers the parameters, as `initialize` does. ``update(grads, state, params)`` pushes the gradients,
    pulls, and returns the broker's parameters minus `params`: ``optax.apply_updates(params, updates)``, which is
    ``p + u`` for every leaf, gives the broker's parameters. To rounding: a sum is exact where a parameter changed by
    less than half of its size, and elsewhere off by at most the last bit of the larger value; nothing adds up, as the
    next difference is to the parameters that are then given. `pull` gives them to the bit.

    Where another worker's offer won, or training has long begun, the parameters given to ``init`` are not the broker's,
    and a gradient at them would be wrong. The first ``update`` then pushes nothing and only brings the broker's.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    wait : bool
        Whether ``update`` waits until its gradient is settled, so that it is in what is returned. Without, what comes
        is what the broker's policy lets a pull have: under ``async`` mostly parameters without this gradient.

    Returns
    -------
    DistributedTransformation
        ``init`` and ``update``. ``update`` takes keywords too: ``value`` (the loss, for display), ``examples`` and
        ``cursor`` as `Worker.push`; others are ignored. Its errors are those of `push`, `Worker.flush` and `pull`, and
        `ConfigError` if `params` are not given.

    Examples
    --------
    >>> optimizer = distributed(worker)  # doctest: +SKIP
    >>> state = optimizer.init(params)  # doctest: +SKIP
    >>> updates, state = optimizer.update(grads, state, params)  # doctest: +SKIP
    >>> params = optax.apply_updates(params, updates)  # doctest: +SKIP
    """

    def init(params: Any) -> DistributedState:
        snapshot = worker.initialize(as_nest(params))
        given, pulled = (jax.tree_util.tree_leaves(tree) for tree in (params, as_tree(snapshot, params)))
        pairs = zip(jax.device_get(given), jax.device_get(pulled), strict=True)
        return DistributedState(snapshot.version, 0, all(np.array_equal(a, b) for a, b in pairs))

    def update(
        updates: Any,
        state: DistributedState,
        params: Any = None,
        *,
        value: Any = None,
        examples: int = 1,
        cursor: bytes | str | None = None,
        **extra: Any,
    ) -> tuple[Any, DistributedState]:
        if params is None:
            raise ConfigError("update needs the current parameters: update(grads, state, params)")
        number = state.number
        if state.is_current:
            number = push(worker, updates, loss=value, examples=examples, cursor=cursor)
            if wait:
                worker.flush()
        snapshot = worker.pull()
        difference = jax.tree_util.tree_map(_difference, as_tree(snapshot, params), params)
        return difference, DistributedState(snapshot.version, number, True)

    return DistributedTransformation(init, update)


def initialize(worker: Worker, tree: Any) -> Any:
    """Offer the first parameters; the first offer wins and all workers get the winner.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    tree : pytree of array_like
        Dicts, lists, tuples and namedtuples are kept as such at the broker, other nodes become dicts. Copied.

    Returns
    -------
    pytree of jax.Array
        The parameters that the broker has now, as `as_tree` puts them.

    Raises
    ------
    LayoutError
        If `tree` cannot be laid out, or the broker's parameters lack one of its leaves or have it in another shape.
    StateError
        If it is called inside ``jax.jit``.
    ControlError
        As `Worker.initialize`.
    BrokerUnreachable
        If the broker does not answer in time.
    """
    return as_tree(worker.initialize(as_nest(tree)), tree)


def pull(
    worker: Worker,
    like: Any,
    *,
    newer_than: Snapshot | State | int | None = None,
    timeout: float | None = None,
) -> Any:
    """Fetch the parameters as a pytree.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    like : pytree
        The parameters as this program has them, or their ``jax.eval_shape``.
    newer_than : Snapshot, State or int, optional
        As `Worker.pull`.
    timeout : float, optional
        As `Worker.pull`, seconds.

    Returns
    -------
    pytree of jax.Array
        One consistent version, as `as_tree` puts it. For its number, use `Worker.pull` and `as_tree`.

    Raises
    ------
    LayoutError
        If the broker's parameters lack a leaf of `like`, or have it in another shape.
    StateError
        If it is called inside ``jax.jit``; other errors as `Worker.pull`.
    """
    return as_tree(worker.pull(newer_than, timeout), like)


def push(
    worker: Worker,
    gradients: Any,
    *,
    loss: Any = None,
    examples: int = 1,
    cursor: bytes | str | None = None,
    base_version: Snapshot | State | int | None = None,
) -> int:
    """Queue a pytree of gradients for the broker; waits while there is no grant for it.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    gradients : pytree of array_like
        One array for each trained leaf, found by its name; copied, cast to the parameter's dtype (``same_kind``). The
        ``float0`` that ``jax.grad`` gives for integers counts as absent.
    loss : float or array of shape (), optional
        For display.
    examples : int
        Training examples behind it, at least 0.
    cursor : bytes or str, optional
        Where this worker stands in its data, as `Worker.push`.
    base_version : Snapshot, State or int, optional
        What it was computed on; by default the last pull's.

    Returns
    -------
    int
        The gradient's number. It is queued, not applied: see `Worker.flush`.

    Raises
    ------
    LayoutError
        If it does not fit the parameters; nothing was queued.
    StateError
        If it is called inside ``jax.jit``; other errors as `Worker.push`.
    """
    leaves, structure = jax.tree_util.tree_flatten(gradients)
    arrays = dict(zip(_names(structure), _on_host(leaves), strict=True))
    return worker.push(
        {name: array for name, array in arrays.items() if getattr(array, "dtype", None) != jax.dtypes.float0},
        loss=None if loss is None else float(loss),
        examples=examples,
        cursor=cursor,
        base_version=base_version,
    )


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


def _difference(new: Any, old: Any) -> Any:
    # Booleans are never trained and have no difference; adding False changes nothing.
    return jnp.zeros_like(new) if new.dtype == bool else new - old
