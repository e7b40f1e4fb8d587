"""Tests of `distgrad_worker.jax`: pytrees go to a broker and come back as they were."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX: pip install '.[jax]'")

import jax
import jax.numpy as jnp

from distgrad import Admin
from distgrad.errors import LayoutError, NoParameters, StateError
from distgrad.layout import DTYPES, Layout
from distgrad_broker import Broker
from distgrad_worker import Worker
from distgrad_worker import jax as adapter

jax.config.update("jax_num_cpu_devices", 2)


class Dense(NamedTuple):
    kernel: Any
    bias: Any


@dataclasses.dataclass
class Model:
    dense: Any
    rate: Any


jax.tree_util.register_dataclass(Model)


class Unnamed:
    """A node whose children have no keys."""

    def __init__(self, *children: Any) -> None:
        self.children = children


jax.tree_util.register_pytree_node(Unnamed, lambda node: (node.children, None), lambda _, children: Unnamed(*children))


def ones(*shape: int) -> Any:
    return jnp.ones(shape, jnp.float32)


TREES = {
    "dict": {"w": ones(2, 3), "b": ones(2)},
    "ordered": collections.OrderedDict(w=ones(2, 3), b=ones(2)),
    "nested": {"layers": [{"w": ones(1)}, {"w": ones(2)}], "head": (ones(3), ones())},
    "namedtuple": [Dense(ones(2, 2), ones(2)), Dense(ones(2, 1), ones(1))],
    "dataclass": {"model": Model(Dense(ones(2, 2), ones(2)), ones())},
    "no keys": {"node": Unnamed(ones(1), [ones(2)])},
    "none": {"layers": [None, ones(2), (None, ones(1))], "left_out": None},
    "leaf": ones(4),
    "integers": {1: ones(1), 0: ones(2)},
}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as running:
        yield running


@pytest.fixture
def worker(broker: Broker) -> Iterator[Worker]:
    with Worker(broker.address, worker_id="w", timeout=20) as connected:
        yield connected


def same(one: Any, other: Any) -> bool:
    """Tell whether two pytrees have the same nodes, and the same arrays at their leaves."""
    (leaves, structure), (others, other_structure) = map(jax.tree_util.tree_flatten, (one, other))
    return bool(structure == other_structure) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(leaves, others, strict=True)
    )


def zeros_like(tree: Any) -> Any:
    return jax.tree_util.tree_map(jnp.zeros_like, tree)


# Names


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_leaves_are_named_as_jax_writes_their_paths(tree: Any) -> None:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]

    assert adapter.leaf_names(tree) == [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_broker_gives_the_leaves_the_same_names(tree: Any) -> None:
    layout = Layout.of(adapter.as_nest(tree))

    assert [leaf.name for leaf in layout.leaves] == adapter.leaf_names(tree)


def test_a_numpy_program_finds_its_own_nest_at_the_broker(worker: Worker) -> None:
    mine = {"layers": [{"w": np.ones(1, np.float32)}, {"w": np.ones(2, np.float32)}], "head": (np.ones(3),)}

    adapter.initialize(worker, jax.tree_util.tree_map(jnp.asarray, mine))
    found = worker.pull().parameters

    assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(mine)


# There and back


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_tree_comes_back_as_it_went_and_gradients_find_their_leaves(worker: Worker, tree: Any) -> None:
    numbered = jax.tree_util.tree_structure(tree).unflatten(
        [leaf * number for number, leaf in enumerate(jax.tree_util.tree_leaves(tree), start=1)]
    )

    assert same(adapter.initialize(worker, numbered), numbered)
    adapter.push(worker, numbered)
    worker.flush()

    assert same(adapter.pull(worker, numbered), zeros_like(numbered))


def test_parameters_that_another_program_set_are_found_by_name(broker: Broker, worker: Worker) -> None:
    """Whatever the order and the containers: here flat names, as torch has them."""
    with Admin(broker.address) as admin:
        admin.set_model_parameters(
            {"dense.bias": np.full(2, 7.0), "dense.kernel": np.full((2, 2), 5.0), "rate": np.array(3.0)}
        )
    like = Model(Dense(ones(2, 2), ones(2)), ones())

    found = adapter.initialize(worker, like)
    adapter.push(worker, like)
    worker.flush()

    assert same(found, Model(Dense(ones(2, 2) * 5, ones(2) * 7), ones() * 3))
    assert {name: float(array.max()) for name, array in worker.pull().parameters.items()} == {
        "dense.bias": 6.0,
        "dense.kernel": 4.0,
        "rate": 2.0,
    }


def test_shapes_and_dtypes_alone_tell_what_a_pull_is_like(worker: Worker) -> None:
    tree = TREES["dataclass"]
    adapter.initialize(worker, tree)

    assert same(adapter.pull(worker, jax.eval_shape(lambda: tree)), tree)


def test_arrays_come_back_in_the_dtype_of_their_counterparts(worker: Worker) -> None:
    worker.initialize({"w": np.full(2, 1 / 3)})

    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        pulled = adapter.pull(worker, {"w": jnp.zeros(2, dtype)})["w"]
        assert pulled.dtype == dtype
        assert np.array_equal(pulled, np.full(2, 1 / 3).astype(dtype))


def test_without_x64_a_float64_comes_back_as_float32(worker: Worker) -> None:
    tree = {"w": np.ones(2)}

    assert adapter.initialize(worker, tree)["w"].dtype == jnp.float32
    assert worker.pull().parameters["w"].dtype == np.float64


@pytest.mark.skipif("bfloat16" not in DTYPES, reason="distgrad carries no bfloat16")
def test_bfloat16_travels_as_such(worker: Worker) -> None:
    tree = {"w": jnp.full(3, 1.5, jnp.bfloat16)}

    assert same(adapter.initialize(worker, tree), tree)
    adapter.push(worker, {"w": jnp.full(3, 0.5, jnp.bfloat16)})
    worker.flush()

    assert same(adapter.pull(worker, tree), {"w": jnp.ones(3, jnp.bfloat16)})


def test_gradients_are_cast_to_the_parameters_dtype(worker: Worker) -> None:
    worker.initialize({"w": np.zeros(2)})

    adapter.push(worker, {"w": jnp.full(2, 0.5, jnp.bfloat16)})
    worker.flush()

    assert worker.pull().parameters["w"].tolist() == [-0.5, -0.5]


def test_integers_are_carried_and_have_no_gradient(worker: Worker) -> None:
    tree = {"w": ones(2), "count": jnp.arange(3), "on": jnp.array([True, False])}
    adapter.initialize(worker, tree)
    gradient = jax.grad(lambda p: p["w"].sum() + p["count"].sum() * 1.0, allow_int=True)(tree)

    adapter.push(worker, gradient)
    worker.flush()

    assert same(adapter.pull(worker, tree), tree | {"w": ones(2) * 0})


def test_what_is_pulled_shares_no_memory_with_the_snapshot(worker: Worker) -> None:
    """JAX may keep memory that it is given, and a later pull may write into a snapshot's."""
    tree = {"w": jnp.ones(1 << 14)}
    adapter.initialize(worker, tree)
    snapshot = worker.pull()

    pulled = adapter.as_tree(snapshot, tree)
    snapshot.parameters["w"][:] = 9

    assert same(pulled, tree)


# Devices


def test_an_array_goes_back_to_the_device_that_it_was_put_on(worker: Worker) -> None:
    _, second = jax.devices()
    tree = {"here": ones(2), "there": jax.device_put(ones(2), second)}

    pulled = adapter.initialize(worker, tree)

    assert pulled["there"].devices() == {second}
    assert pulled["there"].committed
    assert not pulled["here"].committed


def test_an_array_that_is_spread_over_devices_is_spread_again(worker: Worker) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    tree = {"w": jax.device_put(jnp.arange(8.0).reshape(4, 2), rows)}

    adapter.initialize(worker, tree)
    adapter.push(worker, tree)
    worker.flush()
    pulled = adapter.pull(worker, tree)

    assert pulled["w"].sharding == rows
    assert same(pulled, {"w": jnp.zeros((4, 2))})


# What does not fit


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"w": ones(2), "v": ones(1)}, "'v' is not one of the broker's parameters .'w', 'b'."),
        ({"w": ones(3)}, r"'w' has shape \(3,\) here and \(2,\) at the broker"),
        ({"w": jnp.arange(2)}, "'w' is int32 here and float32 at the broker"),
    ],
)
def test_a_pull_that_does_not_fit_says_where(worker: Worker, like: Any, words: str) -> None:
    worker.initialize({"w": np.ones(2, np.float32), "b": np.ones(1, np.float32)})

    with pytest.raises(LayoutError, match=words):
        adapter.pull(worker, like)


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        ({"w": ones(2)}, "'b' is missing"),
        ({"w": ones(2), "b": ones(1), "v": ones(1)}, "'v' is not one of the parameters"),
        ({"w": ones(3), "b": ones(1)}, r"'w' must have shape \(2,\)"),
        ({"w": ones(2), "b": None}, "'b' is missing"),
    ],
)
def test_a_gradient_that_does_not_fit_is_not_queued(worker: Worker, gradient: Any, words: str) -> None:
    adapter.initialize(worker, {"w": ones(2), "b": ones(1)})

    with pytest.raises(LayoutError, match=words):
        adapter.push(worker, gradient)

    assert adapter.push(worker, {"w": ones(2), "b": ones(1)}) == 1


@pytest.mark.parametrize("key", [(1, 2), 1.5, True])
def test_keys_that_cannot_travel_are_refused(worker: Worker, key: Any) -> None:
    with pytest.raises(LayoutError, match="keys must be strings or"):
        adapter.initialize(worker, {key: ones(1)})


def test_random_keys_are_no_parameters(worker: Worker) -> None:
    with pytest.raises(LayoutError, match=r"'key'.*key_data"):
        adapter.initialize(worker, {"key": jax.random.key(0)})


def test_pulling_from_an_empty_broker_says_so(worker: Worker) -> None:
    with pytest.raises(NoParameters):
        adapter.pull(worker, {"w": ones(1)})


def test_nothing_can_be_done_inside_a_function_that_is_traced(worker: Worker) -> None:
    tree = adapter.initialize(worker, {"w": ones(2)})

    for function in (
        lambda p: adapter.initialize(worker, p),
        lambda p: adapter.push(worker, p),
        lambda p: adapter.pull(worker, p),
    ):
        with pytest.raises(StateError, match="traces"):
            jax.jit(function)(tree)


# Flax


def test_structures_of_flax_come_back_as_they_are(worker: Worker) -> None:
    flax = pytest.importorskip("flax", reason="needs Flax: pip install '.[flax]'")
    train_state = flax.struct.dataclass(
        type("TrainState", (), {"__annotations__": {"params": Any, "scale": Any}, "__module__": __name__})
    )
    tree = train_state(params=flax.core.freeze({"dense": {"kernel": ones(2, 2), "bias": ones(2)}}), scale=ones())

    pulled = adapter.initialize(worker, tree)

    assert same(pulled, tree)
    assert adapter.leaf_names(tree) == ["params.dense.bias", "params.dense.kernel", "scale"]
    assert set(worker.pull().parameters["params"]["dense"]) == {"kernel", "bias"}


def test_a_module_of_flax_nnx_takes_over_what_is_pulled(worker: Worker) -> None:
    pytest.importorskip("flax", reason="needs Flax: pip install '.[flax]'")
    from flax import nnx

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    adapter.initialize(worker, before)
    adapter.push(worker, jax.tree_util.tree_map(jnp.ones_like, before))
    worker.flush()

    nnx.update(model, adapter.pull(worker, before))

    state = nnx.state(model, nnx.Param)

    assert same(adapter.pull(worker, before), nnx.to_pure_dict(state))
    assert adapter.leaf_names(before) == ["bias", "kernel"]
    assert adapter.leaf_names(state) == ["bias.value", "kernel.value"]
    assert np.array_equal(model.kernel[...], before["kernel"] - 1)
