"""What a seed stands for: the broker's settings, the workers, what goes wrong and when, and what people ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

GRADIENTS = 200
"""What the workers of a world push at least, between them."""

# Faults of a plan, but for one that comes close behind another thing.
FAULTS_A_SEED = 5

# What can go wrong, and how often beside the others.
FAULTS = {
    "kill broker": 1,
    "kill broker in a disk call": 3,
    "cut power": 1,
    "cut power in a disk call": 3,
    "file thread dies": 1,
    "shut broker down": 1,
    "freeze broker": 1,
    "broker's clock jumps": 1,
    "disk full": 2,
    "disk errors": 4,
    "slow disk": 1,
    "kill worker": 3,
    "supersede worker": 2,
    "freeze worker": 1,
    "worker's clock jumps": 1,
    "cut connections": 2,
    "half-open connection": 1,
    "partition": 2,
    "slow link": 1,
    "repeats": 1,
}
# Those that end a broker: at least one is in every plan, late enough for checkpoints and a tail.
ENDS_BROKER = ("kill broker", "kill broker in a disk call", "cut power", "cut power in a disk call")
# What administrators and workers do besides.
COMMANDS = {
    "stop": 2,
    "drain": 1,
    "clear": 3,
    "configure": 3,
    "configure policy": 1,
    "set": 2,
    "set another layout": 1,
    "save": 2,
    "leave": 2,
}


@dataclass(frozen=True)
class Incident:
    """One thing that is to happen.

    Attributes
    ----------
    index : int
        Its name, for leaving it out.
    at : int
        After so many pushes.
    kind : str
        A key of `FAULTS` or `COMMANDS`.
    seed : int
        What decides its details.
    """

    index: int
    at: int
    kind: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """A world before its first event; see `BrokerConfig` for the settings of the broker."""

    seed: int
    broker: dict[str, Any]
    n_workers: int
    quota: int
    window_bytes: int | None
    pull_chance: float
    compute_s: float
    burst: int
    latency_s: float
    sync_s: float
    pace_s: float
    work: int
    bad_chance: float
    is_bytes: bool
    disk_seed: int
    incidents: Sequence[Incident] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether sums come out the same to the last bit, in whatever order."""
        settings = self.broker
        return (
            settings.get("optimizer") != "adam"
            and settings.get("reduction") == "sum"
            and settings.get("staleness_scaling") is None
        )

    @property
    def is_fixed(self) -> bool:
        """Whether the set of workers is fixed: a step then waits for all of them."""
        return "workers" in self.broker


def make_plan(seed: int) -> Plan:
    """Draw the world of a seed."""
    random = Random(seed)
    n_workers = random.choice([3, 3, 3, 3, 3, 4, 5])
    policy = _policy(random, n_workers)
    # Small windows and queues take a request or two for each gradient, so there are few of them: one costs two others.
    queue_bytes = random.choices([2_048, 8_192, 40_000, 200_000], [1, 2, 6, 71])[0]
    if policy["policy"] in ("sync", "buffered"):
        queue_bytes = max(queue_bytes, 1_024 * (n_workers + 3))
    rules: list[dict[str, Any]] = [
        {}, {"mode": "ascent"}, {"optimizer": "sgd", "lr": 0.5}, {"optimizer": "adam", "lr": 0.125}
    ]  # fmt: skip
    durability = random.choice(["journal", "journal", "journal", "checkpoint"])
    sync_every = random.choices(["0", "0.005", "0.03", "2KiB"], [8, 6, 5, 1])[0]
    if sync_every == "2KiB":
        # What a worker may send must be enough for a sync, or each takes the second after which there is one anyway.
        queue_bytes = max(queue_bytes, 20_000)
    broker = {
        "data": "/data",
        "durability": durability,
        "sync_every": sync_every,
        "checkpoint_updates": random.choice([8, 20, 50, 100]),
        "checkpoint_every": random.choice([0.5, 2.0, 300.0]),
        "checkpoint_journal": random.choice([10_000, 40_000, 2**31]),
        "keep_checkpoints": random.choice([1, 2, 2, 3]),
        "segment_bytes": random.choice([4_096, 16_384, 65_536]),
        "queue_bytes": queue_bytes,
        "workers_silent_after": 2.0,
        "reduction": random.choice(["sum", "sum", "sum", "mean"]),
        "threads": 1,
        **policy,
        **random.choices(rules, [8, 4, 6, 1])[0],
    }
    return Plan(
        seed=seed,
        broker=broker,
        n_workers=n_workers,
        quota=-(-GRADIENTS // n_workers),
        window_bytes=random.choices([None, 1, 3_000], [78, 1, 1])[0],
        pull_chance=random.choice([1.0, 0.9, 0.6] if policy["policy"] in ("sync", "bounded") else [0.02, 0.05, 0.2]),
        compute_s=random.choices([0.0, 0.002, 0.01], [2, 2, 1])[0],
        burst=random.choices([1, 4, 8, 16], [1, 3, 3, 3])[0],
        latency_s=random.choice([0.0003, 0.001, 0.004]),
        sync_s=random.choice([0.001, 0.005, 0.02]),
        pace_s=random.choice([0.003, 0.01, 0.02]),
        work=random.choices([1, 16, 64], [1, 14, 14])[0],
        bad_chance=random.choice([0.0, 0.0, 0.02]),
        is_bytes=random.random() < 0.3,
        disk_seed=random.getrandbits(32),
        incidents=_incidents(random, is_fixed="workers" in policy),
    )


def _policy(random: Random, n_workers: int) -> dict[str, Any]:
    # Where every step waits for news a gradient costs twice the events.
    drawn: list[tuple[float, dict[str, Any]]] = [
        (22, {"policy": "async"}),
        (1, {"policy": "async", "max_staleness": 3}),
        (1, {"policy": "async", "staleness_scaling": "sqrt", "max_staleness": 20}),
        (1, {"policy": "sync"}),
        (0.5, {"policy": "sync", "quorum": 2}),
        (0.5, {"policy": "sync", "quorum": 2, "grace": 0.02}),
        (1, {"policy": "sync", "workers": n_workers}),
        (1, {"policy": "bounded", "bound": 2}),
        (1, {"policy": "buffered", "buffer_size": 3, "grace": 0.05}),
    ]
    return random.choices([policy for _, policy in drawn], [weight for weight, _ in drawn])[0]


def _incidents(random: Random, *, is_fixed: bool) -> list[Incident]:
    n_commands = random.choice([1, 2, 2, 3])
    faults = random.choices(list(FAULTS), list(FAULTS.values()), k=FAULTS_A_SEED)
    drawn = [(random.randrange(5, GRADIENTS - 5), kind) for kind in faults[1:]]
    drawn.append((random.randrange(GRADIENTS * 2 // 5, GRADIENTS - 10), random.choice(ENDS_BROKER)))
    for kind in random.choices(list(COMMANDS), list(COMMANDS.values()), k=n_commands):
        if not (is_fixed and kind in ("leave", "configure policy")):
            drawn.append((random.randrange(5, GRADIENTS - 5), kind))
    if random.random() < 0.3:
        # Close behind something else: before the disk has it, perhaps, or before anybody was told.
        drawn.append((random.choice(drawn)[0] + random.randrange(3), random.choice(ENDS_BROKER)))
    drawn.sort()
    return [Incident(index, at, kind, random.getrandbits(32)) for index, (at, kind) in enumerate(drawn)]
