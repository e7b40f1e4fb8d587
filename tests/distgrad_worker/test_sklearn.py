"""Tests of `distgrad_worker.sklearn`: what partial_fit changed goes to a broker, and its parameters come back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install '.[sklearn]'")

from scipy.sparse import csr_matrix
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Perceptron, SGDClassifier, SGDRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor

from distgrad import Admin
from distgrad.errors import ConfigError, LayoutError, NoParameters, StateError
from distgrad_broker import Broker
from distgrad_worker import Worker
from distgrad_worker.sklearn import parameters_of, partial_fit, pull, push, set_parameters

IMAGES, LABELS = load_digits(return_X_y=True)
X, Y = IMAGES[:200] / 16, LABELS[:200]
CLASSES = np.arange(10)

Make = Callable[[], Any]


def linear(**settings: Any) -> Any:
    return SGDClassifier(random_state=0, **settings)


def network(**settings: Any) -> Any:
    return MLPClassifier((8,), random_state=0, **settings)


MULTICLASS: dict[str, Make] = {
    "SGDClassifier": linear,
    "Perceptron": lambda: Perceptron(random_state=0),
    "MLPClassifier, adam": network,
    "MLPClassifier, sgd": lambda: network(solver="sgd", batch_size=32),
}
REGRESSION: dict[str, Make] = {
    "SGDRegressor": lambda: SGDRegressor(random_state=0),
    "MLPRegressor": lambda: MLPRegressor(hidden_layer_sizes=(8,), random_state=0),
}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as running:
        yield running


@pytest.fixture
def worker(broker: Broker) -> Iterator[Worker]:
    with Worker(broker.address, worker_id="w", timeout=20) as connected:
        yield connected


def flat(estimator: Any) -> np.ndarray[Any, Any]:
    """Return all parameters behind each other, copied."""
    arrays = [np.asarray(array) for value in parameters_of(estimator).values() for array in _listed(value)]
    return np.concatenate([array.ravel() for array in arrays])


def close(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Tell whether parameters are the same but for the rounding of a difference and its subtraction."""
    return np.allclose(one, other, rtol=1e-9, atol=1e-12)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def alone(estimator: Any, *rounds: tuple[Any, Any], **more: Any) -> Any:
    """Do in one process what `partial_fit` does through a broker, the first row included."""
    estimator.partial_fit(rounds[0][0][:1], rounds[0][1][:1], **more)
    for x, y in rounds:
        estimator.partial_fit(x, y)
    return estimator


# One worker


@pytest.mark.parametrize("make", MULTICLASS.values(), ids=MULTICLASS)
@pytest.mark.filterwarnings("ignore:Got `batch_size` less than 1")
def test_one_worker_learns_what_it_would_learn_alone(worker: Worker, make: Make) -> None:
    rounds = [(X[:100], Y[:100]), (X[100:], Y[100:]), (X, Y)]
    estimator = make()

    numbers = [partial_fit(worker, estimator, x, y, CLASSES) for x, y in rounds]
    pull(worker, estimator)

    assert numbers == [1, 2, 3]
    assert close(flat(estimator), flat(alone(make(), *rounds, classes=CLASSES)))


@pytest.mark.parametrize("make", REGRESSION.values(), ids=REGRESSION)
def test_regression_needs_no_classes(worker: Worker, make: Make) -> None:
    y = Y.astype(float)
    estimator = make()

    for _ in range(3):
        partial_fit(worker, estimator, X, y)
    pull(worker, estimator)

    assert close(flat(estimator), flat(alone(make(), *[(X, y)] * 3)))


def test_two_classes_and_no_intercept_work_as_well(worker: Worker) -> None:
    y = Y > 4
    estimator = linear(fit_intercept=False)

    for _ in range(5):
        partial_fit(worker, estimator, X, y, classes=[False, True])

    assert pull(worker, estimator).parameters["coef_"].shape == (1, 64)
    assert estimator.score(X, y) > 0.9


@pytest.mark.parametrize("kind", [csr_matrix, np.ndarray.tolist], ids=["sparse", "lists"])
def test_rows_may_be_anything_that_the_estimator_takes(broker: Broker, worker: Worker, kind: Any) -> None:
    estimator = linear()

    partial_fit(worker, estimator, kind(X), Y, CLASSES)
    pull(worker, estimator)

    assert close(flat(estimator), flat(alone(linear(), (kind(X), Y), classes=CLASSES)))


def test_leaves_have_the_names_of_the_attributes(worker: Worker) -> None:
    partial_fit(worker, network(), X, Y, CLASSES)

    assert [leaf.name for leaf in worker.pull().layout.leaves] == [
        "coefs_.0",
        "coefs_.1",
        "intercepts_.0",
        "intercepts_.1",
    ]


def test_a_pretrained_estimator_is_offered_as_it_is(worker: Worker) -> None:
    estimator = linear().fit(X, Y)
    twin = linear().fit(X, Y).partial_fit(X, Y)

    partial_fit(worker, estimator, X, Y)
    pull(worker, estimator)

    assert close(flat(estimator), flat(twin))


def flat_of(worker: Worker) -> np.ndarray[Any, Any]:
    snapshot = worker.pull()
    return np.concatenate([array.ravel() for array in snapshot.layout.views(snapshot.arenas)])


def test_loss_rows_and_cursor_go_with_the_change(broker: Broker, worker: Worker) -> None:
    estimator = network()

    partial_fit(worker, estimator, X, Y, CLASSES, cursor="row 200")
    worker.flush()

    with Admin(broker.address) as admin:
        [member] = admin.workers()
    assert member["loss"] == pytest.approx(estimator.loss_)
    with Worker(broker.address, worker_id="w") as again:
        assert again.cursor == "row 200"


def test_several_passes_may_lie_between_a_pull_and_a_push(worker: Worker) -> None:
    estimator = linear()
    partial_fit(worker, estimator, X, Y, CLASSES)

    begun = pull(worker, estimator)
    for _ in range(3):
        estimator.partial_fit(X, Y)
    push(worker, estimator, begun, examples=3 * len(X))
    trained = flat(estimator)
    pull(worker, estimator)

    assert close(flat(estimator), trained)


# Several workers


@pytest.mark.parametrize("weigh_by_examples", [False, True])
@pytest.mark.parametrize("make", [linear, network], ids=["linear", "network"])
def test_a_synchronous_step_gives_the_mean_of_the_workers_estimators(make: Make, weigh_by_examples: bool) -> None:
    """The claim of the module, parameter averaging; weighed by rows it is the one of McMahan et al."""
    parts = [(X[:50], Y[:50]), (X[50:], Y[50:])]
    weights = [0.25, 0.75] if weigh_by_examples else [0.5, 0.5]
    with (
        Broker(policy="sync", workers=2, weigh_by_examples=weigh_by_examples) as broker,
        Worker(broker.address, worker_id="a") as a,
        Worker(broker.address, worker_id="b") as b,
    ):
        estimators = [make(), make()]
        for _ in range(3):
            for worker, estimator, (x, y) in zip((a, b), estimators, parts, strict=True):
                # In turn, from one thread: nobody waits, as the other has not pushed anything yet.
                partial_fit(worker, estimator, x, y, CLASSES)
            mean = np.average([flat(estimator) for estimator in estimators], axis=0, weights=weights)
            for worker, estimator in zip((a, b), estimators, strict=True):
                pull(worker, estimator)
                assert close(flat(estimator), mean)


def test_without_a_mean_the_changes_of_all_workers_add_up(broker: Broker, worker: Worker) -> None:
    with Worker(broker.address, worker_id="other") as other:
        estimators = [linear(), linear()]
        partial_fit(worker, estimators[0], X, Y, CLASSES)
        start = pull(worker, estimators[0])
        estimators[1].partial_fit(X[:1], Y[:1], CLASSES)
        set_parameters(estimators[1], start)
        before = flat(estimators[1])

        for each, estimator in zip((worker, other), estimators, strict=True):
            estimator.partial_fit(X, Y)
            push(each, estimator, start)
            each.flush()
        changes = np.sum([flat(estimator) - before for estimator in estimators], axis=0)

        assert close(flat_of(worker), before + changes)


def test_who_comes_late_begins_with_the_brokers_parameters(worker: Worker, broker: Broker) -> None:
    first = network()
    for _ in range(20):
        partial_fit(worker, first, X, Y, CLASSES)
    pull(worker, first)
    with Worker(broker.address, worker_id="late") as late:
        newcomer = MLPClassifier((8,), random_state=7)
        partial_fit(late, newcomer, X, Y, CLASSES)

    pull(worker, first)
    assert np.abs(flat(newcomer) - flat(first)).max() < 0.01, "one step from there, not from its own beginning"


def test_the_example_of_the_documentation_runs(worker: Worker) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "sklearn.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"my_parts": lambda: [(X, Y)] * 3}

    exec(compile(code, "docs/sklearn.md", "exec"), names)
    names["train"](worker)

    assert worker.pull().version == 3


# What does not fit


def test_an_estimator_without_partial_fit_is_refused(worker: Worker) -> None:
    with pytest.raises(ConfigError, match=r"LogisticRegression\(\) has no partial_fit"):
        partial_fit(worker, LogisticRegression(), X, Y, CLASSES)


@pytest.mark.parametrize("average", [True, 10])
def test_an_estimator_that_averages_by_itself_is_refused(worker: Worker, average: Any) -> None:
    with pytest.raises(ConfigError, match="average=False"):
        partial_fit(worker, linear(average=average), X, Y, CLASSES)


def test_an_estimator_of_another_kind_is_refused(worker: Worker) -> None:
    with pytest.raises(StateError, match="coef_ and intercept_ or coefs_ and intercepts_"):
        partial_fit(worker, MiniBatchKMeans(n_init=1, n_clusters=1, random_state=0), X, Y)


def test_an_estimator_that_was_never_fitted_cannot_be_given_parameters(worker: Worker) -> None:
    worker.initialize({"coef_": np.zeros((10, 64)), "intercept_": np.zeros(10)})

    with pytest.raises(StateError, match="fit it first"):
        pull(worker, linear())


def test_a_broker_with_another_model_is_told_apart_before_anything_changes(worker: Worker) -> None:
    worker.initialize({"coef_": np.ones((10, 64)), "intercept_": np.ones(3)})
    estimator = linear().partial_fit(X, Y, CLASSES)
    before = flat(estimator)

    with pytest.raises(LayoutError, match=r"\(10,\).*but the broker.*\(3,\)"):
        pull(worker, estimator)

    assert np.array_equal(flat(estimator), before)


def test_pulling_from_an_empty_broker_says_so(worker: Worker) -> None:
    with pytest.raises(NoParameters):
        pull(worker, linear().partial_fit(X, Y, CLASSES))
