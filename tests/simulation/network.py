"""What is on its way between processes: late, lost, twice, in another order, or held up until a partition ends.

Messages of one PUSH connection arrive in order, if they arrive; requests and replies each for themselves, because a
client that repeats a request does so on a new connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulation.worker_process import WorkerProcess
    from simulation.world import World

Frames = list[bytes]


class Link:
    """How one process and the broker are connected at present."""

    def __init__(self) -> None:
        self.slow_until = 0.0
        self.cut_until = 0.0
        self.repeats_until = 0.0
        # Until when replies are lost, but not requests.
        self.deaf_until = 0.0
        # Whether what is sent while it is cut arrives afterwards; else it is lost.
        self.holds = False


class Pipe:
    """A PUSH connection of a worker."""

    __slots__ = ("arrives_at", "is_closed", "is_half_open", "sent", "worker")

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker
        self.arrives_at = 0.0
        self.is_closed = False
        # Nothing arrives any more, and its owner does not notice.
        self.is_half_open = False
        # Batches on their way.
        self.sent: list[list[Frames]] = []

    def lose(self, first: int, last: int) -> int:
        """Lose batches on their way; tell how many gradients were in them."""
        count = sum(len(batch) for batch in self.sent[first:last])
        for batch in self.sent[first:last]:
            batch.clear()
        return count


class Network:
    """Carries messages between the world's processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        # What was sent to a broker that was not there, and arrives at the next one.
        self._waiting: list[tuple[tuple[bytes, ...], Frames]] = []

    def send_gradients(self, pipe: Pipe, batch: list[Frames]) -> None:
        """Send a worker's gradients."""
        world, link = self._world, pipe.worker.link
        if pipe.is_half_open or (world.now < link.cut_until and not link.holds):
            pipe.worker.losses += 1
            return
        delay = self._delay(link)
        arrives_at = max(world.now + delay, pipe.arrives_at)
        pipe.arrives_at = arrives_at
        pipe.sent.append(batch)
        world.at(arrives_at - world.now, self._deliver_gradients, pipe, batch)
        if world.now < link.repeats_until:
            world.at(arrives_at - world.now + self._delay(link), self._deliver_again, list(batch))

    def send_request(self, link: Link, envelope: tuple[bytes, ...], frames: Frames) -> None:
        """Send a request; its envelope leads the reply back."""
        world = self._world
        if world.now < link.cut_until and not link.holds:
            return
        world.at(self._delay(link), self._deliver_request, envelope, frames)
        if world.now < link.repeats_until:
            world.at(self._delay(link), self._deliver_request, envelope, frames)

    def send_reply(self, envelope: Sequence[bytes], frames: Frames, broker: int) -> None:
        """Send a reply to whoever asked."""
        world = self._world
        link = world.link_of(envelope)
        if world.now < link.deaf_until or (world.now < link.cut_until and not link.holds):
            return
        world.at(self._delay(link), world.deliver_reply, envelope, frames, broker)

    def cut(self, pipe: Pipe, *, is_noticed: bool) -> None:
        """Break a connection: what is on its way is lost from some point on, or in the middle."""
        world = self._world
        first = world.random.randrange(len(pipe.sent) + 1)
        last = len(pipe.sent) if is_noticed else world.random.randrange(first, len(pipe.sent) + 1)
        pipe.worker.losses += bool(pipe.lose(first, last))
        if is_noticed:
            world.at(self._delay(pipe.worker.link), pipe.worker.connection_lost, pipe)

    def broker_ended(self, *, is_noticed: bool) -> None:
        """All connections of a broker are gone with it."""
        world = self._world
        for worker in world.workers:
            if worker.pipe is not None:
                if worker.pipe.lose(0, len(worker.pipe.sent)):
                    worker.losses += 1
                if is_noticed:
                    world.at(self._delay(worker.link), worker.connection_lost, worker.pipe)

    def broker_began(self) -> None:
        """Let arrive what waited for a broker."""
        waiting, self._waiting = self._waiting, []
        for envelope, frames in waiting:
            self._world.at(self._delay(self._world.link_of(envelope)), self._deliver_request, envelope, frames)

    def _delay(self, link: Link) -> float:
        world = self._world
        chance = world.random.random()
        delay = world.plan.latency_s * (1 + chance if chance < 0.98 else 30 * chance)
        if world.now < link.slow_until:
            delay += 0.1 * chance
        if world.now < link.cut_until:
            delay += link.cut_until - world.now
        return delay

    def _deliver_gradients(self, pipe: Pipe, batch: list[Frames]) -> None:
        del pipe.sent[0]  # they arrive in order, and what was lost stands there empty
        broker = self._world.broker
        if broker is not None and batch:
            broker.receive_gradients(batch)
        elif batch:
            pipe.worker.losses += 1

    def _deliver_again(self, batch: list[Frames]) -> None:
        if self._world.broker is not None:
            self._world.broker.receive_gradients(batch)

    def _deliver_request(self, envelope: tuple[bytes, ...], frames: Frames) -> None:
        world = self._world
        if world.broker is not None:
            world.broker.receive_request(envelope, frames)
        elif world.random.random() < 0.5:
            self._waiting.append((envelope, frames))
