"""What every policy has in common."""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distgrad import policies
from distgrad.errors import ConfigError
from distgrad.policies import Asynchronous, Bounded, Buffered, Chain, Policy, Staleness, Synchronous
from support.policy_world import Accounts

MODULES = sorted(Path(policies.__file__).parent.glob("*.py"))
MAKERS: dict[str, Callable[[], Policy]] = {
    "base": Policy,
    "async": Asynchronous,
    "staleness": lambda: Staleness(3, "sqrt"),
    "bounded": lambda: Bounded(2),
    "sync": lambda: Synchronous(quorum=3, grace=1.0),
    "fixed": lambda: Synchronous(workers=3),
    "buffered": lambda: Buffered(3),
    "chain": lambda: Chain([Bounded(2), Staleness(staleness_decay=0.5), Buffered(3)]),
}
every_policy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_the_standard_library_errors_and_its_neighbours_only(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            imported.add(node.module)
    own = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}

    assert {name for name in own if not name.startswith("distgrad.policies.")} <= {"distgrad.errors"}


@every_policy
def test_a_copy_in_mid_run_goes_the_same_way_and_shares_nothing(make: Callable[[], Policy]) -> None:
    original = Accounts(make(), "a", "b", "c")
    for worker in ("a", "b"):
        original.pull_and_push(worker)
    before = (original.version, list(original.held), original.waits_for())

    copied = copy.deepcopy(original)
    for world in (copied, original):
        assert (world.version, world.held, world.waits_for()) == before, "nothing is shared"
        world.pull_and_push("c")
        world.depart("b")
        world.wait(2.0)

    assert (copied.version, copied.steps) == (original.version, original.steps)


@every_policy
def test_a_policy_does_what_it_says_of_itself(make: Callable[[], Policy]) -> None:
    world = Accounts(make(), "a", "b", "c")
    for worker in "abcabcaaaa":
        decision = world.pull_and_push(worker)
        assert decision is not None or world.policy.gates_pulls
        assert world.held == [] or world.policy.holds
        assert decision == policies.APPLY or not world.policy.is_immediate


@pytest.mark.parametrize("value", [2.5, "3", True, float("nan")])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("bounded", "bound"),
        ("buffered", "buffer_size"),
        ("sync", "quorum"),
        ("sync", "workers"),
        ("async", "max_staleness"),
    ],
)
def test_what_is_no_whole_number_is_refused_where_one_is_meant(name: str, setting: str, value: object) -> None:
    """`configure` brings what a peer has sent: a bound that is not a number would let nobody pull again."""
    with pytest.raises(ConfigError, match=f"{setting} must be a whole number, got "):
        policies.build(name, {setting: value})
