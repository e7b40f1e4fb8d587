"""Small gradients that are applied at one go: the same bits, counters and replies as one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distgrad.codec import encode
from distgrad.layout import Layout
from distgrad.rules import Adam, Rule
from distgrad_broker.events import Reply, WorkDue
from support.core_kit import Kit

ONE_ARENA = Layout.of(np.zeros(5, np.float32))
VALUES = st.floats(-2, 2, width=32) | st.just(float("nan"))
GRADIENTS = st.lists(
    st.tuples(
        st.sampled_from("vw"),
        VALUES,
        st.sampled_from([None, 0.5, 0.25]),
        st.sampled_from([None, b"here", "there"]),
        st.integers(1, 3),
    ),
    max_size=12,
)


def together(kit: Kit, worker: str, group: list[Any], numbers: dict[str, int], base: Any) -> None:
    """Hand gradients over that came in one message: they have their base in common, the same object."""
    for _, value, loss, cursor, examples in group:
        numbers[worker] += 1
        parts = [bytes(part) for part in encode(ONE_ARENA, [np.full(5, value, np.float32)])]
        details = {"loss": loss, "cursor": cursor, "examples": examples}
        gradient = kit.gradient(numbers[worker], worker, layout=ONE_ARENA, parts=parts, **details)
        gradient.base = base
        kit.handle(gradient)


def outcome(groups: list[list[Any]], rule: Rule | None, limit: int, *, is_based: bool, until: int) -> Any:
    kit = Kit(ONE_ARENA, rule=rule)
    numbers = {"v": 0, "w": 0}
    for worker in numbers:
        kit.hello(worker)
    base = kit.core.name if is_based else None
    if until:
        kit.send("heartbeat", until=until, **kit.beat_keys("w", wait_s=0.05))
    for group in groups:
        for worker in numbers:
            together(kit, worker, [one for one in group if one[0] == worker], numbers, base)
    while kit.core.has_work:
        kit.handle(WorkDue(limit))
    state = kit.state
    assert kit.holder.storage is not None
    # The first heartbeat's reply depends on when it was asked for news, the last one's does not.
    return (
        kit.holder.storage.arenas[0].tobytes(),
        kit.core.name,
        [(member.describe(kit.now), member.decided_cursor, list(member.refusals)) for member in state.members],
        (state.outcomes, state.refused, state.staleness, state.staleness_sum, state.queued_bytes),
        [effect.header for effect in kit.effects if isinstance(effect, Reply)],
    )


@given(
    groups=st.lists(GRADIENTS, max_size=3),
    rule=st.sampled_from([None, Adam(lr=0.5)]),
    is_based=st.booleans(),
    until=st.integers(0, 6),
)
def test_a_run_is_what_its_gradients_are_one_by_one(
    groups: list[list[Any]], rule: Rule | None, is_based: bool, until: int
) -> None:
    run, alone = (outcome(groups, rule, limit, is_based=is_based, until=until) for limit in (16, 1))

    assert run == alone


def test_runs_are_made_unless_somebody_reads_in_ranges() -> None:
    large = Layout.of(np.zeros(5 << 20, np.float32))
    for layout, is_read, n_applied in ((ONE_ARENA, False, 4), (large, False, 1), (large, True, 0)):
        kit = Kit(layout)
        kit.hello()
        kit.push(1, layout=layout)
        kit.work()  # now there is a spare buffer
        versions = kit.state.versions
        parts = [bytes(part) for part in encode(layout, [np.ones(layout.arenas[0].size, np.float32)])]
        if is_read:
            assert versions.open(kit.now) is not None
        gradients = [kit.gradient(number, layout=layout, parts=parts) for number in range(2, 6)][: max(1, n_applied)]

        assert versions.apply_run(gradients) == n_applied
        assert versions.version == 1 + n_applied
