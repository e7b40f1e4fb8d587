"""Tests of `distgrad_worker.jax.distributed`: a broker in the place of an optax optimizer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX: pip install '.[jax]'")
pytest.importorskip("optax", reason="needs optax: pip install '.[jax]'")

import jax
import jax.numpy as jnp
import optax

import distgrad
from distgrad import Admin
from distgrad.errors import BrokerRestarted, ConfigError, GradientRefused, LayoutError, StateError
from distgrad_broker import Broker
from distgrad_worker import Worker
from distgrad_worker.jax import begin, distributed, pull, push
from support.ports import free_port

START = {"w": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), "b": np.array([0.1, -0.1], np.float32)}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as running:
        yield running


@pytest.fixture
def worker(broker: Broker) -> Iterator[Worker]:
    with Worker(broker.address, worker_id="w", timeout=20) as connected:
        yield connected


def start() -> Any:
    return jax.tree_util.tree_map(jnp.asarray, START)


def same(one: Any, other: Any) -> bool:
    return all(jax.tree_util.tree_leaves(jax.tree_util.tree_map(np.array_equal, one, other)))


def loss(params: Any, x: Any, y: Any) -> Any:
    return ((x @ params["w"] + params["b"] - y) ** 2).mean()


def train(optimizer: Any, steps: int = 20) -> Any:
    rng = np.random.default_rng(3)
    params = start()
    state = optimizer.init(params)
    gradient = jax.jit(jax.grad(loss))
    for _ in range(steps):
        grads = gradient(params, rng.normal(size=(8, 2)), rng.normal(size=(8, 2)))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("rule", "twin"),
    [
        (None, optax.sgd(1.0)),
        (distgrad.SGD(lr=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
        (distgrad.Adam(lr=0.05), optax.adam(0.05)),
        (distgrad.AdamW(lr=0.05, weight_decay=0.1), optax.adamw(0.05, weight_decay=0.1)),
    ],
    ids=["plain", "momentum", "adam", "adamw"],
)
def test_one_worker_trains_as_the_same_optimizer_of_optax(rule: distgrad.Rule | None, twin: Any) -> None:
    with Broker(optimizer=rule) as broker, Worker(broker.address) as worker:
        trained, expected = train(distributed(worker)), train(twin)

    for name, value in expected.items():
        np.testing.assert_allclose(trained[name], value, rtol=1e-4, atol=1e-5)


def test_an_optimizer_of_the_workers_own_may_come_before(worker: Worker) -> None:
    """A plain broker subtracts, and optax's updates are to be added: hence the sign."""
    chained = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05), optax.scale(-1.0), distributed(worker))
    twin = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))

    trained, expected = train(chained), train(twin)

    for name, value in expected.items():
        np.testing.assert_allclose(trained[name], value, rtol=1e-4, atol=1e-5)
    assert same(trained, pull(worker, start()))


def test_its_keywords_pass_through_a_chain(broker: Broker, worker: Worker) -> None:
    optimizer = optax.chain(optax.clip(1.0), optax.GradientTransformationExtraArgs(*distributed(worker)))
    params = start()
    state = optimizer.init(params)

    optimizer.update(params, state, params, value=jnp.float32(2.5), examples=7, cursor="here", grad_fn=None)

    with Admin(broker.address) as admin:
        [member] = admin.workers()
    assert member["loss"] == 2.5
    assert worker.pull().version == 1


def test_the_update_leads_to_the_brokers_parameters_to_the_bit_where_they_changed_little(
    broker: Broker, worker: Worker
) -> None:
    rng = np.random.default_rng(0)
    old = {"w": jnp.asarray(rng.normal(size=10_000), jnp.float32)}
    new = {"w": old["w"] * rng.uniform(0.5, 2.0, 10_000).astype(np.float32)}
    optimizer = distributed(worker)
    state = optimizer.init(old)

    updates, _ = optimizer.update({"w": old["w"] - new["w"]}, state, old)

    assert same(optax.apply_updates(old, updates), pull(worker, old))


def test_the_update_leads_to_the_brokers_parameters_but_for_the_last_bit_of_the_larger(
    broker: Broker, worker: Worker
) -> None:
    rng = np.random.default_rng(0)
    old, new = (
        {"w": (rng.normal(size=10_000) * 10.0 ** rng.integers(-4, 5, 10_000)).astype(np.float32)} for _ in range(2)
    )
    optimizer = distributed(worker)
    state = optimizer.init(old)
    with Admin(broker.address) as admin:
        admin.set_model_parameters(new)

    updates, _ = optimizer.update({"w": np.zeros(10_000)}, state, old)
    error = np.abs(np.float64(optax.apply_updates(old, updates)["w"]) - new["w"])

    assert (error <= np.spacing(np.maximum(np.abs(old["w"]), np.abs(new["w"])))).all()


def test_it_needs_no_optax(worker: Worker) -> None:
    init, update = distributed(worker)
    params = start()

    updates, state = update(params, init(params), params)
    params = jax.tree_util.tree_map(jnp.add, params, updates)

    assert same(params, jax.tree_util.tree_map(jnp.zeros_like, params))
    assert (state.version, state.number) == (1, 1)


def test_who_comes_late_first_takes_over_what_there_is(broker: Broker, worker: Worker) -> None:
    """A gradient at parameters that are not the broker's would be wrong."""
    worker.initialize({name: value + 1 for name, value in START.items()})
    params = start()
    with Worker(broker.address, worker_id="late") as late:
        optimizer = distributed(late)
        state = optimizer.init(params)

        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)

        assert late.pull().version == 0
        np.testing.assert_allclose(params["w"], START["w"] + 1, rtol=1e-6)
        _, state = optimizer.update(params, state, params)
        assert (state.version, state.number) == (1, 1)


def test_who_begins_with_the_brokers_parameters_counts_every_batch(broker: Broker, worker: Worker) -> None:
    worker.initialize({name: value + 1 for name, value in START.items()})
    with Worker(broker.address, worker_id="late") as late:
        params, state = begin(late, start())
        push(worker, params)  # another worker goes on meanwhile
        worker.flush()

        _, state = distributed(late).update(params, state, params, cursor="batch 0")

    assert (state.version, state.number) == (2, 1)
    with Worker(broker.address, worker_id="late") as again:
        assert again.cursor == "batch 0"


def test_after_a_restart_the_worker_begins_again_with_what_it_has() -> None:
    at: dict[str, Any] = {"control": f"127.0.0.1:{free_port()}", "gradients": f"127.0.0.1:{free_port()}"}
    with contextlib.ExitStack() as stack:
        with Broker(**at):
            worker = stack.enter_context(Worker(at["control"], worker_id="w", timeout=20))
            optimizer = distributed(worker)
            params, state = begin(worker, start())
            updates, state = optimizer.update(params, state, params)
            params = jax.tree_util.tree_map(jnp.ones_like, optax.apply_updates(params, updates))
        stack.enter_context(Broker(**at))
        with pytest.raises(BrokerRestarted):
            optimizer.update(params, state, params)

        params, state = begin(worker, params)
        updates, state = optimizer.update(params, state, params)

        # What was pushed before the news came is kept, and applied to what was offered.
        assert same(optax.apply_updates(params, updates), pull(worker, params))
        assert state.version == state.number - 1


def test_without_waiting_the_gradient_comes_in_a_later_update(broker: Broker, worker: Worker) -> None:
    params = start()
    optimizer = distributed(worker, wait=False)
    state = optimizer.init(params)
    with Admin(broker.address) as admin:
        admin.stop()
        updates, state = optimizer.update(params, state, params)
        assert not any(np.any(leaf) for leaf in jax.tree_util.tree_leaves(updates))

        admin.start()
    worker.flush()
    updates, state = optimizer.update(jax.tree_util.tree_map(jnp.zeros_like, params), state, params)

    assert state.number == 2
    assert same(updates, jax.tree_util.tree_map(jnp.negative, params))


def test_integers_and_booleans_stay_as_they_are(worker: Worker) -> None:
    params = {"w": jnp.ones(2), "count": jnp.arange(3), "on": jnp.array([True, False])}
    optimizer = distributed(worker)
    state = optimizer.init(params)

    updates, _ = optimizer.update({"w": jnp.ones(2), "count": None, "on": None}, state, params)

    assert same(optax.apply_updates(params, updates), params | {"w": jnp.zeros(2)})


def test_the_state_is_a_pytree_of_plain_numbers(worker: Worker) -> None:
    state = distributed(worker).init(start())

    assert jax.tree_util.tree_leaves(state) == [0, 0, True]


def test_without_parameters_an_update_says_what_it_needs(worker: Worker) -> None:
    optimizer = distributed(worker)

    with pytest.raises(ConfigError, match=r"update\(grads, state, params\)"):
        optimizer.update(start(), optimizer.init(start()))


def test_an_update_inside_jit_says_where_it_belongs(worker: Worker) -> None:
    optimizer = distributed(worker)
    state = optimizer.init(start())

    with pytest.raises(StateError, match="jit what computes the gradients"):
        jax.jit(lambda g, p: optimizer.update(g, state, p))(start(), start())


def test_a_gradient_that_is_refused_changes_nothing_and_is_told(worker: Worker) -> None:
    optimizer = distributed(worker)
    params = start()
    state = optimizer.init(params)

    def update_until_told() -> None:
        updates, _ = optimizer.update(jax.tree_util.tree_map(lambda leaf: leaf * np.nan, params), state, params)
        assert not any(np.any(leaf) for leaf in jax.tree_util.tree_leaves(updates))
        worker.flush()

    with pytest.raises(GradientRefused):
        update_until_told()
    assert worker.pull().version == 0


def test_a_gradient_with_a_missing_leaf_is_told_by_the_update(worker: Worker) -> None:
    optimizer = distributed(worker)
    state = optimizer.init(start())

    with pytest.raises(LayoutError, match="'b' is missing"):
        optimizer.update({"w": jnp.ones((2, 2))}, state, start())


def test_the_examples_of_the_documentation_run(worker: Worker) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "jax.md").read_text()
    whole, chained, trees = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(8, 2)), rng.normal(size=(8, 2))) for _ in range(5)]
    names: dict[str, Any] = {
        "optax": optax,
        "worker": worker,
        "batches": lambda: batches,
        "new_parameters": start,
        "value_and_grad": lambda params, batch: jax.value_and_grad(loss)(params, *batch),
    }

    exec(compile(whole, "docs/jax.md", "exec"), names)
    names["train"](worker)
    assert worker.pull().version == len(batches)

    exec(compile(chained, "docs/jax.md", "exec"), names)
    trained = train(names["optimizer"], steps=3)
    assert worker.pull().version == len(batches) + 2, "the first brings what the broker has"

    names |= {"params": start(), "grads": trained, "loss": 0.5}
    exec(compile(trees, "docs/jax.md", "exec"), names)
    worker.flush()
    assert same(pull(worker, trained), jax.tree_util.tree_map(jnp.zeros_like, trained))
