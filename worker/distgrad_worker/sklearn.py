"""Estimators of scikit-learn for a broker: what ``partial_fit`` changed is pushed, the broker's parameters come back.

This is local SGD. A worker begins at the broker's parameters w, lets the estimator train on rows of its own until it
stands at w', and pushes w - w' as if it were a gradient (the *pseudo-gradient* of Reddi et al. 2021, "Adaptive
Federated Optimization"). A broker without an optimizer subtracts what it is given, so under ``sync`` the mean of K such
steps gives the mean of the K estimators: parameter averaging, as in "Federated Averaging" (McMahan et al. 2017,
algorithm 1; with ``--weigh-by-examples`` also its weights), whose convergence Stich 2019 ("Local SGD Converges Fast and
Communicates Little") proves for convex losses. `docs/sklearn.md` says what other policies make of it.

Estimators are known by their attributes: ``coef_`` and ``intercept_`` (`SGDClassifier`, `SGDRegressor`, `Perceptron`,
…), or ``coefs_`` and ``intercepts_`` (`MLPClassifier`, `MLPRegressor`). Whatever else they keep (step counts,
learning rates, moments of Adam) stays with each worker.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike, NDArray

from distgrad.errors import ConfigError, LayoutError, NoParameters, StateError
from distgrad.snapshot import Snapshot

if TYPE_CHECKING:
    from distgrad_worker.worker import Worker

__all__ = ["parameters_of", "partial_fit", "pull", "push", "set_parameters"]

_TRAINED = (("coef_", "intercept_"), ("coefs_", "intercepts_"))


def partial_fit(
    worker: Worker,
    estimator: Any,
    X: Any,
    y: Any,
    classes: ArrayLike | None = None,
    *,
    cursor: bytes | str | None = None,
) -> int:
    """Train an estimator on rows of this worker, from the broker's parameters on, and push what that changed.

    An estimator that was never fitted first makes its arrays from the first row alone, and takes the broker's
    parameters; if the broker has none, what it made is offered, and the first offer wins.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    estimator : estimator with ``partial_fit``
        Changed in place; afterwards it stands where its own rows led it. See `pull` for what all workers made.
    X : array_like or sparse matrix, shape (n, n_features)
        The rows; all of them are passed once between two pushes. More of them mean fewer messages, and estimators
        that are further apart when they are averaged.
    y : array_like, shape (n,) or (n, n_outputs)
        Their targets.
    classes : array_like, shape (n_classes,), optional
        All labels that any worker may have. Needed by classifiers that were never fitted, and the same everywhere.
    cursor : bytes or str, optional
        Where this worker stands in its data, as `Worker.push`.

    Returns
    -------
    int
        Number of the pseudo-gradient. It is queued, not applied: see `Worker.flush`.

    Raises
    ------
    ConfigError
        If the estimator has no ``partial_fit``, or averages by itself (``average=``).
    LayoutError
        If the broker's parameters do not fit the estimator's.
    ValueError
        As the estimator's own ``partial_fit``.
    GradientRefused
        If what an earlier call pushed was refused; other errors as `Worker.pull` and `Worker.push`.
    """
    if not hasattr(estimator, "partial_fit"):
        raise ConfigError(f"{estimator!r} has no partial_fit, so it cannot be trained a few rows at a time")
    if _attributes(estimator) is None:
        _make_arrays(estimator, X[:1], y[:1], classes)
    try:
        begun = pull(worker, estimator)
    except NoParameters:
        begun = worker.initialize(parameters_of(estimator))
        set_parameters(estimator, begun)
    estimator.partial_fit(X, y)
    return push(worker, estimator, begun, examples=X.shape[0] if hasattr(X, "shape") else len(X), cursor=cursor)


def pull(worker: Worker, estimator: Any) -> Snapshot:
    """Give an estimator the broker's parameters, with all that this worker pushed before.

    Parameters
    ----------
    worker : Worker
        Connection to the broker; flushed first.
    estimator : fitted estimator
        Changed in place.

    Returns
    -------
    Snapshot
        What the estimator has now, for `push`.

    Raises
    ------
    NoParameters
        If the broker has none yet.
    LayoutError
        If they do not fit the estimator's.
    StateError
        If the estimator was never fitted.
    ConfigError
        If it averages by itself (``average=``).
    GradientRefused
        If something pushed earlier was refused; other errors as `Worker.flush` and `Worker.pull`.
    """
    worker.flush()
    snapshot = worker.pull()
    set_parameters(estimator, snapshot)
    return snapshot


def push(
    worker: Worker, estimator: Any, begun: Snapshot, *, examples: int = 1, cursor: bytes | str | None = None
) -> int:
    """Push what an estimator changed since a pull: the parameters pulled minus those it has.

    Parameters
    ----------
    worker : Worker
        Connection to the broker.
    estimator : fitted estimator
        Trained in between, however often.
    begun : Snapshot
        What `pull` returned then.
    examples : int
        Training examples behind it, at least 0.
    cursor : bytes or str, optional
        Where this worker stands in its data, as `Worker.push`.

    Returns
    -------
    int
        Number of the pseudo-gradient. It is queued, not applied: see `Worker.flush`.

    Raises
    ------
    LayoutError
        If the estimator's parameters are not those of the snapshot.
    StateError
        If the estimator was never fitted.
    ConfigError
        If it averages by itself (``average=``); other errors as `Worker.push`.
    """
    return worker.push(
        {name: before - now for name, now, before in _pairs(estimator, begun)},
        loss=getattr(estimator, "loss_", None),  # of neural networks; linear models do not tell theirs
        examples=examples,
        cursor=cursor,
        base_version=begun,
    )


def parameters_of(estimator: Any) -> dict[str, Any]:
    """Give the arrays that an estimator trains.

    Parameters
    ----------
    estimator : fitted estimator
        Of a kind that this module knows.

    Returns
    -------
    dict of str to ndarray or list of ndarray
        The estimator's own arrays, under the names of its attributes: leaves ``coef_`` or ``coefs_.0``, and so on.

    Raises
    ------
    StateError
        If it was never fitted, or is of another kind.
    ConfigError
        If it averages by itself (``average=``).
    """
    if getattr(estimator, "average", False):
        raise ConfigError(f"{estimator!r} keeps an average beside its parameters; make it with average=False")
    names = _attributes(estimator)
    if names is None:
        wanted = " or ".join(" and ".join(names) for names in _TRAINED)
        raise StateError(f"{estimator!r} has no {wanted}: fit it first, if it is of a kind that has them")
    return {name: getattr(estimator, name) for name in names}


def set_parameters(estimator: Any, snapshot: Snapshot) -> None:
    """Write pulled parameters into an estimator's arrays.

    Parameters
    ----------
    estimator : fitted estimator
        Changed in place.
    snapshot : Snapshot
        Parameters with the estimator's leaves. Copied.

    Raises
    ------
    LayoutError
        If they are not the estimator's; nothing was changed.
    StateError
        If the estimator was never fitted.
    ConfigError
        If it averages by itself (``average=``).
    """
    for _, array, pulled in _pairs(estimator, snapshot):
        array[...] = pulled


def _make_arrays(estimator: Any, row: Any, target: Any, classes: ArrayLike | None) -> None:
    """Let an estimator make its arrays as it wants; there is no public way to do so without training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one row is less than a batch; what else there is to say will be said again
        if classes is None:
            estimator.partial_fit(row, target)
        else:
            estimator.partial_fit(row, target, classes=classes)


def _attributes(estimator: Any) -> tuple[str, str] | None:
    """Name the attributes that hold the parameters; None before the first fit."""
    for names in _TRAINED:
        if all(getattr(estimator, name, None) is not None for name in names):
            return names
    return None


def _pairs(estimator: Any, snapshot: Snapshot) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Return for each leaf its name, the estimator's array, and the snapshot's."""
    arrays = dict(_leaves(parameters_of(estimator)))
    views = snapshot.layout.views(snapshot.arenas)
    pulled = {leaf.name: view for leaf, view in zip(snapshot.layout.leaves, views, strict=True)}
    shapes, others = ({name: array.shape for name, array in each.items()} for each in (arrays, pulled))
    if shapes != others:
        raise LayoutError(f"{estimator!r} has parameters of the shapes {shapes}, but the broker {others}")
    return [(name, array, pulled[name]) for name, array in arrays.items()]


def _leaves(parameters: dict[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, value in parameters.items():
        if isinstance(value, list):
            yield from ((f"{name}.{number}", array) for number, array in enumerate(value))
        else:
            yield name, value
