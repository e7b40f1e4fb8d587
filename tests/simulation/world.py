"""A world of one seed: processes, network, disk and clock, what goes wrong, and the verdict at the end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

from distgrad.durable.books import Recovered
from distgrad.errors import CheckpointError, DataDamaged
from distgrad.layout import Layout
from distgrad.policies import registry
from distgrad_broker import updates
from distgrad_broker.config import BrokerConfig
from distgrad_broker.events import ShutdownAsked
from distgrad_broker.members import MAX_PENDING_REFUSALS
from simulation import faults
from simulation.administrator import Administrator
from simulation.broker_process import BrokerProcess
from simulation.clockwork import Clockwork, Violation
from simulation.network import Frames, Link, Network
from simulation.plan import Incident, Plan, make_plan
from simulation.reference import Push
from simulation.told import Told, batch_of
from simulation.training import Training
from simulation.watch import Watch, watched_settle
from simulation.worker_process import WorkerProcess
from support.sim_disk import Crash, SimDisk

# After the last fault everything must be settled within this much simulated time; and an event is a few microseconds.
END_S = 120.0
MAX_EVENTS = 100_000
# Events between two looks for the end; those that come after it change nothing.
STEPS_A_LOOK = 8
# Without a push for this long, the next incident comes.
STUCK_S = 1.2


class World(Clockwork):
    """Everything there is.

    Parameters
    ----------
    plan : Plan
        What is to happen.
    without : collection of int
        Incidents that are left out.
    traces : bool
        Whether to write down what happens.
    """

    def __init__(self, plan: Plan, *, without: Collection[int] = (), traces: bool = False) -> None:
        super().__init__(plan.seed, traces=traces)
        self.plan = plan
        self.config = BrokerConfig(**{**plan.broker, "data": Path(plan.broker["data"])})
        self.network = Network(self)
        self.administrator: Administrator = Administrator(self)
        self.disk = SimDisk(plan.disk_seed)
        self.broker: BrokerProcess | None = None
        self.former: Watch | None = None
        self.workers: list[WorkerProcess] = []
        self.pushes: dict[tuple[str, bytes | str], Push] = {}
        self.told = Told()
        self.counts: Counter[str] = Counter()
        self.target = plan.quota
        self.slow_disk_until = 0.0
        self.dies_at_start_with = "process"
        self.start_faults: list[Callable[[SimDisk], None]] = []
        self.is_ending = False
        self._brokers = 0
        self._incidents = [incident for incident in plan.incidents if incident.index not in without][::-1]
        self._pushed_before = 0
        self._done: set[str] = set()
        self.ids = [f"w{index}" for index in range(plan.n_workers)]

    # From the beginning to the end

    def run(self) -> None:
        """Let everything happen, and check it."""
        self._start_broker()
        for name in self.ids:
            self.join(name)
        self.at(STUCK_S, self._look_for_progress)
        done, n_ids, steps = self._done, len(self.ids), self.steps
        while len(done) < n_ids:
            steps(STEPS_A_LOOK)
            self._look_for_end()
        self._finish()

    def _step(self) -> None:
        self.steps(1)
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self.happened > MAX_EVENTS or (self.is_ending and self.now > self._ends_at):
            raise Violation(f"not settled after {self.now:.1f} s and {self.happened} events: {self._unsettled()}")

    def _finish(self) -> None:
        """Shut the broker down, and see what is left."""
        if not self.is_ending:
            self._end_faults()
        while self.broker is None or not self.administrator.is_idle:
            self._step()
        watch = self.broker.watch
        for worker in self.workers:
            self._check_worker(worker, watch)
        self.broker.post(ShutdownAsked())
        brokers = self._brokers
        while self._brokers == brokers or self.broker is None:
            self._step()
        if self.broker.watch.reference.pending:
            raise Violation("gradients were left in the queue by a clean end")

    def _check_worker(self, worker: WorkerProcess, watch: Watch) -> None:
        """Everything that a process pushed was settled once, if it lived on, and it was told what was refused."""
        own = watch.reference.workers.get(worker.session.worker_id)
        if not worker.has_completed or own is None:
            return
        if len(worker.session.window):
            raise Violation(f"{worker.name} ended with {len(worker.session.window)} gradients unsettled")
        refused = []
        for push in worker.training.pushed:
            outcome = own.outcomes.get(push.number)
            if outcome is None or batch_of(outcome[2]) != push.batch + 1:
                raise Violation(f"{push} was not settled, but {outcome}")
            # The same batch may have been decided on for a process before this one.
            if outcome[0] == "refused" and outcome[2] == push.cursor:
                refused.append(push.number)
        # A worker that was cut off hears of the last ones only.
        if not set(refused[-MAX_PENDING_REFUSALS:]) <= set(worker.refused):
            raise Violation(f"{worker.name} was told that {worker.refused} were refused, but {refused} were")

    def _unsettled(self) -> str:
        return ", ".join(
            f"{worker.name} {worker.session.phase} doing {worker.training.doing} with {len(worker.session.window)}"
            for worker in self.workers
            if worker.is_alive
        )

    # Incidents

    def was_pushed(self, push: Push) -> None:
        """Note that a worker has pushed: the plan counts that."""
        self.pushes[push.worker, push.cursor] = push
        self.counts["pushed"] += 1
        while self._incidents and self.counts["pushed"] >= self._incidents[-1].at:
            self._begin(self._incidents.pop())

    def _begin(self, incident: Incident) -> None:
        self.counts["incidents"] += 1
        self.at(self.random.random() * 0.01, faults.happen, self, incident)

    def _look_for_progress(self) -> None:
        """Go on with the plan where nothing gets on; when it is through, end all faults."""
        if self.counts["pushed"] == self._pushed_before:
            if self._incidents:
                self._begin(self._incidents.pop())
            elif not self.is_ending:
                self._end_faults()
        self._pushed_before = self.counts["pushed"]
        if not self.is_ending:
            self.at(STUCK_S, self._look_for_progress)

    def _end_faults(self) -> None:
        """Mend everything; from here on all must be settled within a bounded time."""
        if self.trace is not None:
            self.note("incident", "all faults end")
        self.is_ending = True
        self._ends_at = self.now + END_S
        self.disk.mend()
        self.disk.capacity = None
        self.start_faults.clear()
        self.slow_disk_until = 0.0
        for link in [self.administrator.link, *(worker.link for worker in self.workers)]:
            link.cut_until = link.slow_until = link.repeats_until = link.deaf_until = 0.0
        for worker in self.workers:
            worker.frozen_until = 0.0
        if self.broker is not None:
            self.broker.frozen_until = 0.0
            if self.broker.files.is_dead:
                self.broker_died(self.broker, machine=False)
        self.administrator.give("start")

    # Brokers and their disk

    def _start_broker(self) -> None:
        disk = self.disk
        for arm in self.start_faults:
            arm(disk)
        self.start_faults.clear()
        self._brokers += 1
        try:
            self.broker = BrokerProcess(self, self._brokers, disk)
        except Crash:
            self._crash_disk(machine=self.dies_at_start_with == "machine")
            self.at(0.05, self._start_broker)
            if self.trace is not None:
                self.note(f"broker {self._brokers}", "dies while it recovers")
            return
        except CheckpointError as error:
            if isinstance(error, DataDamaged) or (
                self.is_ending and disk.capacity is None and not self._is_armed(disk)
            ):
                raise
            if self.trace is not None:
                self.note(f"broker {self._brokers}", f"cannot start: {error}")
            self.counts["could not start"] += 1
            self.at(0.2, self._start_broker)
            return
        self.former = self.broker.watch
        if self.trace is not None:
            self.note(self.broker.name, f"begins at version {self.former.reference.version}")
        self.network.broker_began()

    @staticmethod
    def _is_armed(disk: SimDisk) -> bool:
        return any(disk._next_faults.values())

    def broker_died(self, broker: BrokerProcess, *, machine: bool) -> None:
        """End a broker's process, and its machine as well, perhaps."""
        broker.is_ended = True
        self.broker = None
        self.counts["power cuts" if machine else "kills"] += 1
        if self.trace is not None:
            self.note(broker.name, "loses its power" if machine else "is killed")
        self._crash_disk(machine=machine)
        self.network.broker_ended(is_noticed=not machine)
        self.at(self.random.choice([0.02, 0.1, 0.5]), self._start_broker)

    def broker_ended(self, broker: BrokerProcess) -> None:
        """Let a broker end as it should."""
        if not broker.files.is_dead:
            try:
                broker.files.close()
            except Crash:
                self.broker_died(broker, machine=broker.files.dies_with == "machine")
                return
        if self.trace is not None:
            self.note(broker.name, "ends")
        broker.is_ended = True
        self.broker = None
        self._crash_disk(machine=False)
        self.network.broker_ended(is_noticed=True)
        self.at(self.random.choice([0.02, 0.1, 0.5]), self._start_broker)

    def disk_crashed(self, broker: BrokerProcess, dies_with: str) -> None:
        """Let end what was to end in this disk call."""
        if dies_with != "thread":
            self.broker_died(broker, machine=dies_with == "machine")

    def disk_time(self, calls: Sequence[str]) -> float:
        """Give the seconds that some calls take."""
        syncs = calls.count("sync") + calls.count("sync_folder")
        seconds = self.plan.sync_s * syncs * (0.5 + self.random.random())
        return seconds + 0.2 * syncs if self.now < self.slow_disk_until else seconds

    def _crash_disk(self, *, machine: bool) -> None:
        self.disk = self.disk.crash(self.random, machine=machine)

    def count_recovery(self, recovered: Recovered) -> None:
        """Note what a recovery had to do, so that a campaign can tell what it has covered."""
        counts = self.counts
        counts["recoveries"] += 1
        counts["from a checkpoint and a tail"] += recovered.checkpoint is not None and recovered.records > 0
        counts["with a queue"] += bool(recovered.pending)
        counts["with decisions ahead"] += any(book.ahead for book in recovered.books.members.values())

    # Workers

    def join(self, worker_id: str) -> WorkerProcess:
        """Start a process under an id."""
        uid = len(self.workers)
        worker = WorkerProcess(self, uid, worker_id, generated=False)
        worker.training = Training(worker, self.ids.index(worker_id), self.plan.quota)
        self.workers.append(worker)
        if self.trace is not None:
            self.note(worker.name, "begins")
        worker.wake(0.0)
        return worker

    def succeed(self, worker: WorkerProcess, delay_s: float) -> None:
        """Start another process under a worker's id, unless there is one."""
        self.at(delay_s, self._succeed, worker)

    def _succeed(self, worker: WorkerProcess) -> None:
        worker_id = worker.session.worker_id
        if worker_id not in self._done and not self.has_successor(worker):
            self.join(worker_id)

    def is_superseded(self, worker: WorkerProcess) -> bool:
        """Tell whether another process may have a worker's session: a newer one, or one whose hello was late."""
        worker_id = worker.session.worker_id
        sessions = self.told.sessions.get(worker_id, [])
        late = any(other.session.worker_id == worker_id and other.uid not in sessions for other in self.workers)
        return late or self.has_successor(worker) or sessions[-1] != worker.uid

    def has_successor(self, worker: WorkerProcess) -> bool:
        """Tell whether a newer process was started under a worker's id."""
        return any(other.session.worker_id == worker.session.worker_id for other in self.workers[worker.uid + 1 :])

    def has_ended(self, worker: WorkerProcess, *, is_complete: bool) -> None:
        """Note that a process has ended by itself."""
        if is_complete:
            self._done.add(worker.session.worker_id)
        else:
            self.succeed(worker, self.random.choice([0.02, 0.5, 2.5]))

    def check_sender(self, push: Push) -> None:
        """Check that an accepted gradient is of the newest process that was told of a session."""
        sessions = self.told.sessions.get(push.worker)
        if not sessions or sessions[-1] != push.uid:
            raise Violation(f"{push} was accepted, but process {sessions and sessions[-1]} has superseded it")

    # Messages

    def link_of(self, envelope: Sequence[bytes]) -> Link:
        """Find the connection that an envelope leads to."""
        name = envelope[0]
        return self.administrator.link if name == b"admin" else self.workers[int(name)].link

    def replied(self, broker: BrokerProcess, envelope: Sequence[bytes], header: Mapping[str, Any]) -> None:
        """Note what a broker lets out: from now on it counts as told."""
        if not header["ok"]:
            return
        name, channel = envelope[0], envelope[1]
        if channel == b"lease":
            worker = self.workers[int(name)]
            worker_id = worker.session.worker_id
            if "cursor" in header:
                is_first = worker.uid not in self.told.sessions.get(worker_id, ())
                is_awaited = worker.awaits(header["id"])
                self.told.hello(worker_id, worker.uid, header, is_first=is_first, is_awaited=is_awaited)
            else:
                self.told.heartbeat(worker_id, header, broker.watch.reference)
        elif channel == b"pull":
            if "settled" in header:
                self.told.pull(self.workers[int(name)].session.worker_id, header, broker.watch.reference)
        elif channel == b"command":
            self.told.command(b"administrator", header["id"], header)

    def deliver_reply(self, envelope: Sequence[bytes], frames: Frames, broker: int) -> None:
        """Hand a reply to whoever asked."""
        name, channel = envelope[0], envelope[1]
        if name == b"admin":
            self.administrator.receive(frames)
            return
        worker = self.workers[int(name)]
        if channel == b"lease":
            worker.receive(frames)
        elif channel == b"pull":
            worker.training.receive_pull(frames)
        else:
            worker.training.receive_goodbye(frames)


def run_seed(seed: int, *, without: Collection[int] = (), traces: bool = False) -> World:
    """Make the world of a seed and run it.

    Raises
    ------
    Violation
        If something happened that must not; any other exception is a bug of the code under test, too.
    """
    world = make_world(seed, without=without, traces=traces)
    run_world(world)
    return world


def make_world(seed: int, *, without: Collection[int] = (), traces: bool = False) -> World:
    """Make the world of a seed, as it is before its first event."""
    with mock.patch.object(registry, "_parameters", _parameters):
        return World(make_plan(seed), without=without, traces=traces)


# Two layouts are read again and again, by whoever says hello and by every recovery, and a few signatures.
_layout = lru_cache(maxsize=16)(Layout.from_frame)
_parameters: Any = lru_cache(maxsize=64)(registry._parameters)


def run_world(world: World) -> None:
    """Run a world."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            mock.patch.object(updates, "settle", watched_settle),
            mock.patch.object(Layout, "from_frame", lambda frame: _layout(bytes(frame))),
            mock.patch.object(registry, "_parameters", _parameters),
        ):
            world.run()
    finally:
        logging.disable(logging.NOTSET)
