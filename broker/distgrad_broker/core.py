"""The broker's decisions, without sockets, files, threads, clocks or chance: `Core.handle(event, now) -> effects`.

A gradient's life: **received** → *dropped* (another session or attempt, a repeat, a gap, not covered by its grant:
as if it had never come; its worker sends it again if it still matters) or **accepted** (next number of its worker,
in the queue) → **settled** as *applied*, *superseded*, *refused* or *cleared*. Only settling frees window and
grant.

The core is: *open* (the usual state), *closing* (`ShutdownAsked`: applies what is queued, accepts nothing) or
*destroyed* (answers everything with ``destroyed``). Beside that the updater is running or stopped; a stop that
drains first works through what was accepted when it came.

Invariants, each held by a property test:

- each number of a worker is settled once, in the worker's order;
- the sum of what is committed in grants stays within the budget, and what is queued within what is committed;
- nothing is remembered of a peer before its role was checked;
- a reply is given once for each request: at once, or when what it waits for happens, or at its deadline.

Here are the queue and the clockwork. What the operations mean is in `operations`, who may send in `members`,
how much in `grants`; when a gradient counts is for `distgrad.policies` to say, and `updates` does it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from distgrad.durable.books import Recovered
from distgrad.durable.disk_events import CheckpointEnded, DiskTroubled, RecordsWritten
from distgrad.durable.records import Record
from distgrad.errors import MalformedMessage
from distgrad.policies import Policy, Weighing
from distgrad.wire import Gradient, State
from distgrad_broker import bookkeeping, checkpoints, intake, membership, operations, saving, settling, updates
from distgrad_broker.core_settings import JOURNAL, CoreSettings
from distgrad_broker.events import (
    BadRequestReceived,
    Effect,
    Event,
    HooksCounted,
    MessageRejected,
    RequestReceived,
    SaveEnded,
    ShutdownAsked,
    SocketsDrained,
    TimePassed,
    WorkDue,
)
from distgrad_broker.requests import ClientKey, RequestError
from distgrad_broker.shared_slots import SharedSlots
from distgrad_broker.state import CoreState
from distgrad_broker.versions import Versions
from distgrad_broker.waiting import Waiter

# Leases and quiet readers are looked at this often at most: both are counted in seconds.
SWEEP_S = 0.25

_NOTHING: Sequence[Effect] = ()


class Core:
    """The state machine.

    Parameters
    ----------
    settings : CoreSettings
        As the broker was started.
    versions : Versions
        The parameters; from now on touched by the core alone.
    policy : Policy
        When a gradient counts; from now on the core's alone.
    weighing : Weighing, optional
        How the gradients of a step are combined; by default their mean.
    slots : SharedSlots, optional
        Where workers on this host leave gradients; without, nothing is shared.
    recovered : Recovered, optional
        What an earlier broker left behind, beside the parameters.
    now : float
        Seconds on the shell's clock.

    Raises
    ------
    RequestError
        If the parameters are already set and what the policy must hold does not fit in the budget.
    ConfigError
        If the policy cannot work with so many workers as are allowed.
    """

    def __init__(
        self,
        settings: CoreSettings,
        versions: Versions,
        policy: Policy,
        weighing: Weighing | None = None,
        *,
        slots: SharedSlots | None = None,
        recovered: Recovered | None = None,
        now: float = 0.0,
    ) -> None:
        policy.check(settings.max_workers)
        self.state = state = CoreState(settings, versions, policy, weighing or Weighing())
        state.slots = slots
        if recovered is not None:
            bookkeeping.restore(state, recovered, now)
        if versions.layout is not None:
            state.resize_budget(versions.layout.gradient_bytes)
        if state.records is not None:
            had_parameters = recovered is not None and recovered.has_parameters
            bookkeeping.note_start(state, state.records, is_recovered=had_parameters)
        state.checkpoints.begun_at = now
        state.checkpoints.version, state.checkpoints.generation = versions.version, state.generation
        if settings.data is not None:
            state.checkpoints.sequence = settings.data.sequence
        if recovered is not None:
            state.checkpoints.bytes = -recovered.bytes  # the next recovery would have to read that as well

    @property
    def has_work(self) -> bool:
        """Whether a gradient can be settled now."""
        return updates.has_work(self.state)

    @property
    def name(self) -> State:
        """The name of the current state of the parameters."""
        return self.state.name

    @property
    def is_drained(self) -> bool:
        """Whether a broker that is closing has nothing left to do."""
        return not self.has_work and not self.state.saves and checkpoints.are_done(self.state)

    def take_records(self) -> list[Record]:
        """Take what is to be written to the journal.

        Returns
        -------
        list of Record
            In order; none without a journal.
        """
        state, records = self.state, self.state.records
        if records is None:
            return []
        if not state.applies_at_once:
            records.remember(state.policy.memory())
        return records.take()

    @property
    def is_known(self) -> bool:
        """Whether all live workers have said that they know what is settled."""
        return all(member.known >= member.settled for member in self.state.members.live())

    @property
    def ask_s(self) -> float:
        """How often a worker asks where nobody waits, seconds."""
        return settling.ask_s(self.state)

    def expects(self, gradient: Gradient) -> bool:
        """Tell whether a gradient is the next of its worker.

        Parameters
        ----------
        gradient : Gradient
            Just received.

        Returns
        -------
        bool
            False also if there is no such worker.
        """
        member = self.state.members.get(gradient.worker)
        return member is not None and gradient.number == member.accepted + 1

    def next_deadline(self) -> float | None:
        """Tell when the core wants to be called even if nothing happens.

        Returns
        -------
        float or None
            Seconds on the shell's clock.
        """
        state = self.state
        request = state.deadlines.next()
        step = state.policy.next_deadline() if state.held and updates.is_updating(state) else None
        return step if request is None else request if step is None else min(request, step)

    def handle(self, event: Event | Gradient, now: float) -> Sequence[Effect]:
        """Take in one event.

        Parameters
        ----------
        event : Event or Gradient
            What happened.
        now : float
            Seconds on the shell's clock, which never goes back.

        Returns
        -------
        sequence of Effect
            What the shell must do, in order.
        """
        state = self.state
        if type(event) is Gradient:
            intake.accept(state, event, now)
        elif type(event) is WorkDue:
            updates.work(state, now, event.gradients)
        elif type(event) is RequestReceived:
            self._request(event, now)
        elif type(event) is TimePassed:
            self._answer_late(now)
        elif type(event) is SocketsDrained:
            self._answer_late(now)
            state.busy_s += event.busy_s
            checkpoints.look(state, now)
            if now >= state.next_sweep:
                state.next_sweep = now + SWEEP_S
                membership.expire_leases(state, now)
                state.versions.expire(now)
        elif type(event) is RecordsWritten:
            self._records_written(event.sequence)
        elif type(event) is CheckpointEnded:
            checkpoints.end(state, event, now)
        elif type(event) is DiskTroubled:
            self._disk_troubled(event.reason)
        elif type(event) is MessageRejected:
            state.rejected[event.reason] += 1
        elif type(event) is BadRequestReceived:
            self._count(event.code)
            state.fail(Waiter(event.envelope, None, None, now), RequestError(event.code, event.message))
        elif type(event) is HooksCounted:
            state.hooks = event
        elif type(event) is SaveEnded:
            saving.end_save(state, event)
        elif type(event) is ShutdownAsked:
            state.is_closing = True
            checkpoints.retry(state)
            state.log(logging.INFO, "shutting down", queued=len(state.queue), held=len(state.held))
        if not state.effects:
            return _NOTHING
        effects = state.effects
        state.effects = []
        return effects

    def _records_written(self, sequence: int) -> None:
        """Settle what the disk has, and answer who waited for it."""
        state = self.state
        assert state.records is not None  # only then does the shell write any
        state.records.written(sequence)
        if state.durability == JOURNAL:
            settling.settle_durable(state, sequence)

    def _disk_troubled(self, reason: str | None) -> None:
        state = self.state
        if reason == state.disk_trouble:
            return
        state.disk_trouble = reason
        if reason is None:
            checkpoints.retry(state)
            state.log(logging.INFO, "the disk takes the journal again", unsettled=len(state.unsettled))
        else:
            state.log(logging.ERROR, "the journal cannot be written; nothing is settled until it can", reason=reason)

    def _request(self, request: RequestReceived, now: float) -> None:
        """Check who asks for what, and whether it was done already, before anything is done."""
        state = self.state
        header = request.header
        request_id = header.get("id")
        client: ClientKey | None = None
        waiter = Waiter(request.envelope, request_id if type(request_id) is int else None, None, now)
        try:
            nonce = header.get("client")
            if nonce is not None and not (type(nonce) is bytes and 8 <= len(nonce) <= 64 and type(request_id) is int):
                raise MalformedMessage("'client' must be 8 to 64 bytes, and come with an integer 'id'")
            op = header.get("op")
            operation = operations.OPERATIONS.get(op) if type(op) is str else None
            if operation is None:
                known = ", ".join(operations.OPERATIONS)
                raise RequestError("unknown_op", f"unknown operation {op!r:.40}; there are {known}")
            if request.role is not None and request.role not in operation.roles:
                needed = " or ".join(sorted(operation.roles))
                raise RequestError("forbidden", f"{op!r} needs a key with role {needed}; this one has {request.role}")
            if nonce is not None:
                client = waiter.client = (request.user, nonce)
            if operation.is_mutating:
                if client is not None and self._was_seen(client, waiter, now):
                    return
                self._check_incarnation(header)
            if state.is_destroyed:
                raise RequestError("destroyed", "destroy was called; start a new broker")
            if operation.is_mutating and client is not None and waiter.request_id is not None:
                forgotten = state.remembered.begin(client, waiter.request_id)
                if forgotten is not None:
                    state.forget_request(forgotten)
                state.under_way[client] = waiter
            operation.handle(state, request, waiter, now)
        except RequestError as error:
            self._count(error.code)
            state.fail(waiter, error)
        except MalformedMessage as error:
            self._count("malformed")
            state.fail(waiter, RequestError("malformed", error.message))

    def _answer_late(self, now: float) -> None:
        state = self.state
        for waiter in state.deadlines.due(now):
            waiter.on_deadline(waiter, now)
        if state.held:
            deadline = state.policy.next_deadline()
            if deadline is not None and deadline <= now:
                updates.advance(state, now)

    def _count(self, code: str) -> None:
        self.state.rejected[code] += 1

    def _was_seen(self, client: ClientKey, waiter: Waiter, now: float) -> bool:
        """Answer a repeat from memory, or let it replace the request that still waits."""
        state = self.state
        assert waiter.request_id is not None  # a client without an id was refused
        was_seen, reply = state.remembered.find(client, waiter.request_id)
        if reply is not None:
            reply_waiter = Waiter(waiter.envelope, None, None, 0.0)
            state.send(reply_waiter, reply)
        elif was_seen:
            former = state.under_way.get(client)
            if former is not None and former.request_id == waiter.request_id:
                former.envelope = waiter.envelope
                if former.on_repeat is not None:
                    on_repeat, former.on_repeat = former.on_repeat, None
                    on_repeat(now)
        return was_seen

    def _check_incarnation(self, header: dict[str, Any]) -> None:
        meant = header.get("incarnation")
        if meant != self.state.incarnation:
            raise RequestError(
                "restarted",
                f"the request means incarnation {meant!r:.40}, but this is {self.state.incarnation!r}; look first",
            )
