"""Whom a step waits for gets room, whoever was there before: the real core, and workers that keep to their grants."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad.policies import Bounded, Chain, Policy, Synchronous
from distgrad_broker.events import TimePassed
from support.core_kit import ONE, Kit
from support.durable_kit import DurableKit


class Honest:
    """A worker that pushes no more than it was granted, and says truly what it has."""

    def __init__(self, kit: Kit, name: str) -> None:
        self.kit = kit
        self.name = name
        self.sent = self.settled = self.processes = 0
        self.way: list[tuple[int, list[Any]]] = []
        self.is_there = False
        self.come()

    @property
    def in_flight(self) -> int:
        return (self.sent - self.settled) * ONE

    @property
    def is_held(self) -> bool:
        return any(held.gradient.worker == self.name for held in self.kit.state.held)

    def come(self) -> None:
        """Join, or be a new process that begins behind what the broker has."""
        self.processes += 1
        header = self.kit.hello(self.name, nonce=f"process {self.processes} of {self.name}".encode())
        self.is_there, self.way = bool(header["ok"]), []
        if not self.is_there:
            assert header["error"] == "too_large"  # no member, and there is no room beside them
            return
        self.sent, self.settled = header["accepted"], header["settled"]
        self.grant, self.grant_seq = header["grant"], header["grant_seq"]

    def beat(self, want: int = 0) -> None:
        held = max(self.grant, self.in_flight)
        keys = {"sent": self.sent, "settled": self.settled, "grant_seq": self.grant_seq, "held": held, "want": want}
        header = self.kit.beat(self.name, **keys)
        self.grant, self.grant_seq, self.settled = header["grant"], header["grant_seq"], header["settled"]

    def send(self, count: int = 1) -> None:
        """Have gradients on the way, as far as the grant allows."""
        for _ in range(count):
            if self.in_flight + ONE <= self.grant:
                self.sent += 1
                self.way.append((self.sent, list(self.kit.state.name)))

    def arrive(self, count: int = 99) -> None:
        for number, base in self.way[:count]:
            self.kit.push(number, worker=self.name, base=base)
        del self.way[:count]
        self.kit.work(50)


def step_closes(kit: Kit, workers: list[Honest]) -> bool:
    """Let everybody go on as a training loop would, for a while, and tell whether there is a new version."""
    before = kit.holder.version
    workers = [worker for worker in workers if worker.is_there]
    for _ in range(60):
        for worker in workers:
            is_waiting = not worker.is_held and worker.in_flight + ONE > worker.grant
            worker.beat(ONE if is_waiting else 0)
            if not worker.is_held and not worker.way:
                worker.send()
            worker.arrive()
        kit.now += 0.1
        kit.handle(TimePassed())
        if kit.holder.version > before:
            return True
    return False


def lapse(kit: Kit, gone: Honest, others: list[Honest]) -> None:
    """Let one worker's lease end, and nobody else's."""
    kit.now += kit.state.members.lease_s - 1
    for other in others:
        if other is not gone and other.is_there:
            other.beat()
    kit.wait(2.0)
    gone.is_there = False


def test_what_was_on_its_way_when_others_came_takes_no_room_from_who_comes_back() -> None:
    """Found by a review: nothing had the grants looked at again when it arrived."""
    kit = Kit(policy=Synchronous(workers=3), queue_bytes=6 * ONE + 300)
    a, b, c = workers = [Honest(kit, name) for name in "abc"]
    assert step_closes(kit, workers)
    lapse(kit, c, workers)
    for worker in (a, b) * 3:
        worker.beat()
        worker.send(9)
    outsider = Honest(kit, "x")
    for worker in (a, b, outsider) * 3:
        worker.beat()

    c.come()
    a.arrive()
    b.arrive()

    assert step_closes(kit, [a, b, c, outsider])


def test_workers_that_hold_all_of_the_room_are_seen_though_the_others_are_live() -> None:
    kit = Kit(queue_bytes=4 * ONE, is_stopped=True)
    for name in "ab":
        worker = Honest(kit, name)
        worker.beat()
        worker.send(9)
        worker.arrive()
    for name in "cd":
        Honest(kit, name)
    assert kit.state.queued_bytes == 4 * ONE

    refused = kit.ask("configure", settings={"policy": "sync", "workers": 4})

    assert refused["error"] == "too_large"
    assert f"leaves {2 * ONE} bytes too few" in refused["message"]


def test_a_larger_set_keeps_its_members_places() -> None:
    kit = Kit(policy=Synchronous(workers=2), queue_bytes=4 * ONE)
    a, b = workers = [Honest(kit, name) for name in "ab"]
    assert step_closes(kit, workers)
    lapse(kit, b, workers)
    for _ in range(2):
        a.beat()
        a.send(9)
    a.arrive()
    for name in "xy":
        workers.append(Honest(kit, name))
    for worker in [a, *workers[2:]] * 2:
        worker.beat()

    assert kit.ask("configure", settings={"workers": 4})["error"] == "too_large"
    b.come()
    assert step_closes(kit, workers)


@pytest.mark.parametrize("asked", [{"workers": 3}, {"quorum": 3}])
def test_a_place_whose_gradient_is_in_the_step_needs_no_room_once_more(asked: dict[str, int]) -> None:
    kit = Kit(policy=Synchronous(workers=3), queue_bytes=3 * ONE)
    a, b, c = workers = [Honest(kit, name) for name in "abc"]
    for worker in workers * 2:
        worker.beat(ONE)
    for worker in (a, c):
        worker.send()
        worker.arrive()
    lapse(kit, c, workers)

    assert kit.ask("configure", settings=asked)["ok"]
    assert step_closes(kit, [a, b])


def test_a_quorum_keeps_no_room_for_more_than_it_needs() -> None:
    kit = Kit(policy=Synchronous(quorum=2, workers=5), queue_bytes=3 * ONE)
    workers = [Honest(kit, name) for name in "ab"]
    for worker in workers:
        worker.beat()

    assert [worker.grant for worker in workers] == [3 * ONE // 2] * 2
    assert step_closes(kit, workers)


def test_when_somebody_leaves_the_others_have_its_room() -> None:
    kit = Kit(policy=Synchronous(workers=2), queue_bytes=4 * ONE)
    a, x = Honest(kit, "a"), Honest(kit, "x")
    assert step_closes(kit, [a, x])
    assert step_closes(kit, [a, x])
    y = Honest(kit, "y")
    for worker in (a, x, y) * 3:
        worker.beat()
    y.send()
    assert kit.ask("leave", worker="x", session=kit.sessions["x"], client=b"client x", id=1)["ok"]
    y.arrive()  # and takes its place before anybody's heartbeat

    for worker in (a, y) * 2:
        worker.beat()

    assert (a.grant, y.grant) == (2 * ONE, 2 * ONE)


def test_a_gradient_that_must_come_again_later_takes_no_members_room() -> None:
    """After a crash an outsider's was computed on a version that the members have yet to make again."""
    config: dict[str, Any] = {"policy": "sync", "workers": 2, "queue_bytes": 2 * ONE}
    kit = DurableKit(**config)
    for number in (1, 2):
        base = list(kit.state.name)
        for worker in "ab":
            if number == 1:
                kit.greet(worker)
            kit.beat(worker, want=ONE, sent=number - 1, settled=number - 1)
            kit.push(number, worker=worker, base=base)
        kit.work(3)
        if number == 1:
            kit.write()
    lost = list(kit.state.name)
    assert lost[2] == 2

    again = kit.crash("two", **config)
    again.greet("x")
    for _ in range(3):
        again.beat("x", want=ONE)
    again.push(1, worker="x", base=lost)
    for worker in "ab":
        again.greet(worker, session=kit.sessions[worker], lowest=2)
        for _ in range(2):
            again.beat(worker, want=ONE, sent=1, settled=1)
        again.push(2, worker=worker, base=["one", 0, 1])
        again.work(3)

    assert again.holder.version == 2


@pytest.mark.parametrize("quorum", [None, 1])
def test_who_could_never_have_room_beside_a_full_set_is_told(quorum: int | None) -> None:
    kit = Kit(policy=Synchronous(workers=2, quorum=quorum), queue_bytes=2 * ONE)
    workers = [Honest(kit, name) for name in "ab"]
    for _ in range(2):
        assert step_closes(kit, workers)

    told = kit.ask("hello", worker="x", nonce=b"nonce of x")

    if quorum:
        assert told["ok"]
    else:
        assert told["error"] == "too_large"
        assert f"at least {3 * ONE}" in told["message"]


def build(n_members: int, quorum: int | None, is_chained: bool) -> Policy:
    sync = Synchronous(workers=n_members, quorum=quorum and min(quorum, n_members))
    return Chain([Bounded(3), sync]) if is_chained else sync


ACTIONS = ["beat", "want", "fill", "fill", "send", "arrive", "arrive", "arrive one", "come", "lapse", "leave", "evict"]
LIVES = st.lists(st.tuples(st.sampled_from([*ACTIONS, "workers"]), st.integers(0, 5), st.integers(1, 4)), max_size=40)


def live(kit: Kit, worker: Honest, workers: list[Honest], action: str, amount: int) -> None:
    """Do one of the actions."""
    if action in ("beat", "want"):
        worker.beat(ONE if action == "want" else 0)
    elif action == "send":
        worker.send(amount)
    elif action == "fill":
        for _ in range(2):
            worker.beat(ONE)
            worker.send(9)
    elif action in ("arrive", "arrive one"):
        worker.arrive(1 if action == "arrive one" else 99)
    elif action == "come":
        worker.come()
    elif action == "lapse":
        lapse(kit, worker, workers)
    elif action == "leave":
        session, client = kit.sessions[worker.name], b"client %d" % kit.now
        left = kit.ask("leave", worker=worker.name, session=session, client=client, id=amount)
        worker.is_there = not left["ok"]
    elif action == "evict":
        kit.ask("evict", worker=worker.name)
        worker.is_there = False
    else:
        kit.ask("configure", settings={"workers": amount})
        kit.work(50)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(2, 4), st.sampled_from([None, None, 1, 2]), st.booleans(), st.booleans(), LIVES)
def test_a_step_closes_once_its_members_are_there_whatever_was_before(
    data: st.DataObject,
    n_members: int,
    quorum: int | None,
    is_chained: bool,
    has_begun: bool,
    lives: list[tuple[str, int, int]],
) -> None:
    policy = build(n_members, quorum, is_chained)
    spare = data.draw(st.integers(0, n_members))
    budget = (policy.must_hold(9) + spare) * ONE + data.draw(st.sampled_from([0, 0, 500]))
    kit = Kit(policy=policy, queue_bytes=budget)
    workers: dict[str, Honest] = {}
    if has_begun:
        for name in "abcd"[:n_members]:
            workers[name] = Honest(kit, name)
        assert step_closes(kit, list(workers.values()))
        lapse(kit, workers["a"], list(workers.values()))
    for action, who, amount in lives:
        name = "abcdef"[who % (n_members + 2)]
        if name in workers and workers[name].is_there:
            live(kit, workers[name], list(workers.values()), action, amount)
        elif action == "come" and name in workers:
            workers[name].come()
        elif action == "come":
            workers[name] = Honest(kit, name)
        assert kit.state.grants.committed_bytes(kit.state.members) <= budget
        assert all(max(m.queued_bytes, m.promised) <= m.committed for m in kit.state.members)

    for name in "abcdef":
        if name not in workers:
            workers[name] = Honest(kit, name)
        elif not workers[name].is_there:
            workers[name].come()
    for _ in range(3):
        assert step_closes(kit, list(workers.values())), kit.state.policy.waits_for(kit.state.situation(kit.now))
