"""How each incident happens; what it is, and when, is in the plan."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from distgrad.codec import encode
from distgrad_broker.events import ShutdownAsked
from simulation.plan import Incident
from simulation.reference import OTHER, SMALL
from support.sim_disk import SimDisk, Stage

if TYPE_CHECKING:
    from simulation.world import World

# For how long something may be broken; leases last 2 seconds.
SHORT_S, LONG_S = 0.1, 3.0


def happen(world: World, incident: Incident) -> None:
    """Let an incident happen."""
    if world.trace is not None:
        world.note("incident", f"{incident.index}: {incident.kind}")
    _KINDS[incident.kind](world, Random(incident.seed))


# Brokers


def _kill(world: World, random: Random) -> None:
    broker = world.broker
    if broker is None:
        return
    # In the middle of one of its next turns, and at the end of that turn at the latest.
    broker.steps_left = random.choice([0, 1, 2, 3, 5, 8, 13, 40])
    world.at(random.random() * 0.05, lambda: None if broker.is_ended else world.broker_died(broker, machine=False))


def _crash_in_call(world: World, random: Random, dies_with: str) -> None:
    stage, ahead = random.choice(list(Stage)), random.choice([1, 1, 2, 3, 4, 5, 6, 8, 12, 20])
    is_at_start = random.random() < 0.3

    def arm(disk: SimDisk) -> None:
        world.dies_at_start_with = dies_with
        disk.crash_at(len(disk.calls) + ahead, stage)

    broker = world.broker
    if broker is None or is_at_start:
        world.start_faults.append(arm)
        if broker is not None:
            world.broker_died(broker, machine=random.random() < 0.5)
        return
    broker.files.dies_with = dies_with
    arm(broker.disk)
    # If it has nothing to write.
    world.at(1.0, lambda: None if broker.is_ended else world.broker_died(broker, machine=dies_with == "machine"))


def _power_cut(world: World, random: Random) -> None:
    if world.broker is None:
        world.disk = world.disk.crash(world.random, machine=True)
    else:
        world.broker_died(world.broker, machine=True)


def _file_thread_dies(world: World, random: Random) -> None:
    broker = world.broker
    if broker is None:
        return
    broker.files.dies_with = "thread"
    broker.disk.crash_at(len(broker.disk.calls) + random.choice([1, 2, 3, 5]), random.choice(list(Stage)))
    machine = random.random() < 0.5
    # It goes on without, and nothing is settled, until somebody kills it.
    world.at(random.random(), lambda: None if broker.is_ended else world.broker_died(broker, machine=machine))


def _shut_down(world: World, random: Random) -> None:
    if world.broker is not None:
        world.broker.post(ShutdownAsked())


def _freeze_broker(world: World, random: Random) -> None:
    if world.broker is not None:
        world.broker.frozen_until = world.now + random.uniform(SHORT_S, LONG_S)


def _broker_clock(world: World, random: Random) -> None:
    if world.broker is not None:
        world.broker.clock_offset += random.choice([0.3, 1.5, 5.0, 100.0])


# The disk


def _disk_full(world: World, random: Random) -> None:
    disk = world.disk
    # The disk after a crash is another object, with the same capacity.
    disk.capacity = disk.used + random.choice([0, 100, 700, 3_000])

    def end() -> None:
        world.disk.capacity = None

    world.at(random.uniform(SHORT_S, LONG_S), end)


def _disk_errors(world: World, random: Random) -> None:
    name = random.choice(
        ["write", "write", "sync", "sync", "sync", "create", "allocate", "truncate", "rename", "remove", "sync_folder"]
    )
    code = random.choice([errno.EIO, errno.ENOSPC])
    times, stage = random.choice([1, 1, 2, 4]), random.choice(list(Stage))

    def arm(disk: SimDisk) -> None:
        disk.fail_next(name, code, times=times, stage=stage)

    if random.random() < 0.2:
        world.start_faults.append(arm)
    arm(world.disk)


def _slow_disk(world: World, random: Random) -> None:
    world.slow_disk_until = world.now + random.uniform(SHORT_S, LONG_S)


# Workers


def _kill_worker(world: World, random: Random) -> None:
    if alive := [worker for worker in world.workers if worker.is_alive]:
        worker = random.choice(alive)
        worker.end()
        world.succeed(worker, random.choice([0.02, 0.3, 1.0, 3.0]))


def _supersede_worker(world: World, random: Random) -> None:
    if alive := [worker for worker in world.workers if worker.is_alive and not worker.is_generated]:
        worker = random.choice(alive)
        if random.random() < 0.5:
            worker.frozen_until = world.now + random.uniform(SHORT_S, LONG_S)
        worker_id = worker.session.worker_id
        successor = world.join(worker_id)
        if random.random() < 0.4:
            # It gets a session and does not hear of it: it asks again when the next one may have superseded it.
            successor.link.deaf_until = world.now + random.uniform(0.3, LONG_S)
            world.succeed(successor, random.choice([0.05, 0.3]))


def _freeze_worker(world: World, random: Random) -> None:
    if alive := [worker for worker in world.workers if worker.is_alive]:
        random.choice(alive).frozen_until = world.now + random.uniform(SHORT_S, LONG_S)


def _worker_clock(world: World, random: Random) -> None:
    if alive := [worker for worker in world.workers if worker.is_alive]:
        random.choice(alive).clock_offset += random.choice([0.3, 3.0, 100.0])


# The network


def _cut(world: World, random: Random) -> None:
    for worker in world.workers:
        if worker.pipe is not None and random.random() < 0.6:
            world.network.cut(worker.pipe, is_noticed=random.random() < 0.6)


def _half_open(world: World, random: Random) -> None:
    if pipes := [worker.pipe for worker in world.workers if worker.pipe is not None]:
        pipe = random.choice(pipes)
        pipe.is_half_open = True
        pipe.worker.losses += bool(pipe.lose(0, len(pipe.sent)))


def _partition(world: World, random: Random) -> None:
    until = world.now + random.uniform(SHORT_S, LONG_S)
    for link in [*(worker.link for worker in world.workers if worker.is_alive), world.administrator.link]:
        if random.random() < 0.5:
            link.cut_until, link.holds = until, random.random() < 0.5


def _slow_link(world: World, random: Random) -> None:
    if alive := [worker for worker in world.workers if worker.is_alive]:
        random.choice(alive).link.slow_until = world.now + random.uniform(SHORT_S, LONG_S)


def _repeats(world: World, random: Random) -> None:
    until = world.now + random.uniform(SHORT_S, LONG_S)
    for worker in world.workers:
        worker.link.repeats_until = until


# Commands


def _stop(world: World, random: Random, *, drain: bool = False) -> None:
    administrator = world.administrator
    administrator.give("stop", drain=drain, wait_s=random.choice([0.0, 0.2, 5.0]))
    world.at(random.choice([0.05, 0.5]), administrator.give, "start")


def _configure(world: World, random: Random) -> None:
    mode = {"mode": random.choice(["descent", "ascent"])}
    number = {"lr": random.choice([0.25, 0.5, 2.0])}
    world.administrator.give("configure", settings=number if "optimizer" in world.plan.broker else mode)


def _configure_policy(world: World, random: Random) -> None:
    settings: dict[str, Any] = random.choice(
        [
            {"policy": "async"},
            {"policy": "buffered", "buffer_size": 2, "grace": 0.05},
            {"policy": "sync", "quorum": 2},
            {"policy": "bounded", "bound": 3},
        ]
    )
    if world.plan.pull_chance == 1.0:  # else workers do not wait for their turn
        world.administrator.give("configure", settings=settings)
    else:
        world.administrator.give(
            "configure", settings=settings if settings["policy"] != "sync" else {"max_staleness": 5}
        )


def _set(world: World, random: Random, *, is_other: bool = False) -> None:
    layout = OTHER if is_other else SMALL
    arenas = [np.full(arena.size, random.randrange(100), arena.dtype) for arena in layout.arenas]
    parts = [bytes(part) for part in encode(layout, arenas, trained_only=False)]
    world.administrator.give("set", [layout.to_frame(), *parts])


def _leave(world: World, random: Random) -> None:
    if alive := [worker for worker in world.workers if worker.is_alive]:
        worker = random.choice(alive)
        worker.training.must_leave = True
        worker.wake(0.0)


_KINDS: dict[str, Callable[[World, Random], None]] = {
    "kill broker": _kill,
    "kill broker in a disk call": lambda world, random: _crash_in_call(world, random, "process"),
    "cut power": _power_cut,
    "cut power in a disk call": lambda world, random: _crash_in_call(world, random, "machine"),
    "file thread dies": _file_thread_dies,
    "shut broker down": _shut_down,
    "freeze broker": _freeze_broker,
    "broker's clock jumps": _broker_clock,
    "disk full": _disk_full,
    "disk errors": _disk_errors,
    "slow disk": _slow_disk,
    "kill worker": _kill_worker,
    "supersede worker": _supersede_worker,
    "freeze worker": _freeze_worker,
    "worker's clock jumps": _worker_clock,
    "cut connections": _cut,
    "half-open connection": _half_open,
    "partition": _partition,
    "slow link": _slow_link,
    "repeats": _repeats,
    "stop": _stop,
    "drain": lambda world, random: _stop(world, random, drain=True),
    "clear": lambda world, random: world.administrator.give("clear"),
    "configure": _configure,
    "configure policy": _configure_policy,
    "set": _set,
    "set another layout": lambda world, random: _set(world, random, is_other=True),
    "save": lambda world, random: world.administrator.give("save"),
    "leave": _leave,
}
