"""JAX pytrees for a broker: push, pull, and an optax-like gradient transformation. Needs the extra ``jax``.

A leaf's name is its path, as ``keystr(path, simple=True, separator=".")`` writes it, such as ``dense.kernel`` or
``layers.0.w``: what a NumPy worker's nest and a torch module call it. Everything here talks to the broker, so none of
it can run inside ``jax.jit``; what computes the gradients can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distgrad.errors import ConfigError
from distgrad_worker.pytrees import as_nest, as_tree, leaf_names, named_arrays

if TYPE_CHECKING:
    from distgrad.snapshot import Snapshot
    from distgrad.wire import State
    from distgrad_worker.worker import Worker

__all__ = [
    "DistributedState",
    "DistributedTransformation",
    "as_nest",
    "as_tree",
    "begin",
    "distributed",
    "initialize",
    "leaf_names",
    "pull",
    "push",
]


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
    and a gradient at them would be wrong. The first ``update`` then pushes nothing and only brings the broker's; its
    gradient does not count, nor does its cursor. With `begin` in the place of ``init`` every gradient counts.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    wait : bool
        Whether ``update`` waits until its gradient was decided on, so that it is in what is returned if it was applied.
        Without, what comes is what the broker's policy lets a pull have: under ``async`` mostly parameters without this
        gradient.

    Returns
    -------
    DistributedTransformation
        ``init`` and ``update``. ``update`` takes keywords too: ``value`` (the loss, for display), ``examples`` and
        ``cursor`` as `Worker.push`; others are ignored. Its errors are those of `push` and `pull`, and `ConfigError`
        if `params` are not given. A gradient that is refused is told by a later call, or by `Worker.flush`.

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
        snapshot = worker.pull(own=wait)
        difference = jax.tree_util.tree_map(_difference, as_tree(snapshot, params), params)
        return difference, DistributedState(snapshot.version, number, True)

    return DistributedTransformation(init, update)


def begin(worker: Worker, tree: Any) -> tuple[Any, DistributedState]:
    """Offer the first parameters, and begin with the broker's: what `distributed` goes on from.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    tree : pytree of array_like
        As `initialize`.

    Returns
    -------
    params : pytree of jax.Array
        The parameters that the broker has now, as `as_tree` puts them.
    state : DistributedState
        In the place of what ``init`` gives.

    Raises
    ------
    LayoutError
        As `initialize`, and its other errors.
    """
    snapshot = worker.initialize(as_nest(tree))
    return as_tree(snapshot, tree), DistributedState(snapshot.version, 0, True)


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
    return begin(worker, tree)[0]


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
    return worker.push(
        named_arrays(gradients),
        loss=None if loss is None else float(loss),
        examples=examples,
        cursor=cursor,
        base_version=base_version,
    )


def _difference(new: Any, old: Any) -> Any:
    # Booleans are never trained and have no difference; adding False changes nothing.
    return jnp.zeros_like(new) if new.dtype == bool else new - old
