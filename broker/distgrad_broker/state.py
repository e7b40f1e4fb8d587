"""Everything that the core owns, in one place: what is queued, who waits for what, and the counters.

Only the core's own modules change it, and only inside `Core.handle`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from distgrad.durable.books import Lineage
from distgrad.durable.records import Records
from distgrad.errors import GradientRefused
from distgrad.policies import Held, Policy, Situation, Weighing
from distgrad.wire import PROTOCOL_VERSION, Gradient, State, charge
from distgrad_broker.checkpoint_memory import Checkpoints
from distgrad_broker.core_settings import JOURNAL, NONE, CoreSettings
from distgrad_broker.events import Effect, HooksCounted, Log, Reply
from distgrad_broker.grants import Grants
from distgrad_broker.holds import Hold
from distgrad_broker.members import Member, Members
from distgrad_broker.requests import ClientKey, RememberedReplies, RequestError
from distgrad_broker.shared_slots import SharedSlots
from distgrad_broker.versions import Versions
from distgrad_broker.waiting import Deadlines, Waiter

DEFAULT_QUEUE_BYTES = 256 * 1024 * 1024
# A request whose effect must be on the disk before its reply is told after this long that it is not yet.
MAX_DISK_WAIT_S = 5.0
# A staleness of b bits is in class b; versions have 63 bits.
STALENESS_CLASSES = 64


class CoreState:
    """The core's memory.

    Parameters
    ----------
    settings : CoreSettings
        As the broker was started.
    versions : Versions
        The parameters.
    policy : Policy
        When a gradient counts.
    weighing : Weighing
        How the gradients of a step are combined.
    """

    def __init__(self, settings: CoreSettings, versions: Versions, policy: Policy, weighing: Weighing) -> None:
        self.settings = settings
        self.versions = versions
        # Where workers on this host leave gradients; None if nothing is shared.
        self.slots: SharedSlots | None = None
        # By worker: the version that it computes on where it is.
        self.leases: dict[str, Hold] = {}
        self.adopt_policy(policy, weighing)
        self.incarnation = settings.incarnation
        self.generation = 0
        self.is_running = not settings.is_stopped
        self.is_closing = False
        self.is_destroyed = False
        # How many gradients at the head of the queue a draining stop still lets through; 0 otherwise.
        self.drain_left = 0
        self.queue: deque[Gradient] = deque()
        self.queued_bytes = 0
        self.received_bytes = 0  # by accepted gradients, since this broker began
        # How many gradients were 0, 1, 2-3, 4-7, ... updates old when their turn came, since this broker began.
        self.staleness = [0] * STALENESS_CLASSES
        self.staleness_sum = 0
        # What the policy holds for a step, in the order of acceptance.
        self.held: list[Held[Gradient]] = []
        self.members = Members(settings.incarnation, settings.max_workers, settings.lease_s)
        self.grants = Grants(settings.queue_bytes or DEFAULT_QUEUE_BYTES)
        self.lineage = Lineage()
        # Incarnations of which versions that a crash took back come again, to the bit (see `Policy.is_repeatable`).
        self.repeatable: list[str] = []
        data = settings.data
        self.durability = NONE if data is None else data.durability
        self.records: Records | None = None
        if data is not None and self.durability != NONE:
            self.records = Records(data.sequence, keeps_gradients=self.durability == JOURNAL)
            self.records.step_memory = lambda: self.policy.step_memory()
        # What is decided and not on the disk yet: its mark, and what settles it.
        self.unsettled: deque[tuple[int, Member, int, GradientRefused | None]] = deque()
        self.checkpoints = Checkpoints()
        self.disk_trouble: str | None = None
        self.hooks: HooksCounted | None = None  # until something was told to users' hooks
        self.remembered = RememberedReplies()
        # Mutating requests that wait for their replies, by client.
        self.under_way: dict[ClientKey, Waiter] = {}
        self.pulls: dict[Any, Waiter] = {}
        self.drains: dict[Any, Waiter] = {}
        # Offers of first parameters: who was asked to send them, until when, and who waits for the outcome.
        self.asked: tuple[Any, float] | None = None
        self.offers: dict[Any, Waiter] = {}
        self.saves: dict[int, tuple[str, Waiter]] = {}
        self.saves_asked = 0
        self.busy_s = 0.0
        self.relieved_at = 0.0
        self.next_sweep = 0.0
        self.outcomes: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.effects: list[Effect] = []
        self.deadlines = Deadlines()

    def adopt_policy(self, policy: Policy, weighing: Weighing) -> None:
        """Decide by this policy from now on.

        Parameters
        ----------
        policy : Policy
            When a gradient counts.
        weighing : Weighing
            How the gradients of a step are combined.
        """
        self.policy = policy
        self.weighing = weighing
        # Looked up for every gradient: whether there is anything to ask.
        self.applies_at_once = policy.is_immediate and weighing.is_neutral

    def mark(self) -> int | None:
        """Tell what the disk must have before what is decided now is settled.

        Returns
        -------
        int or None
            A record's sequence, or a checkpoint's ticket; None if it is settled at once.
        """
        if self.records is None:
            return None
        return self.records.sequence if self.durability == JOURNAL else self.checkpoints.last + 1

    def situation(self, now: float) -> Situation:
        """Describe the world to a policy.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        Situation
            As of now.
        """
        return Situation(self.versions.version, self.members.live_ids, now)

    @property
    def name(self) -> State:
        """The name of the current state of the parameters."""
        return State(self.incarnation, self.generation, self.versions.version)

    @property
    def fingerprint(self) -> int | None:
        """Of the current layout, or None while there are no parameters."""
        layout = self.versions.layout
        return None if layout is None else layout.fingerprint

    def resize_budget(self, gradient_payload_bytes: int) -> None:
        """Fit the budget to the size of a gradient, or refuse that size.

        Parameters
        ----------
        gradient_payload_bytes : int
            Bytes of one gradient's payload.

        Raises
        ------
        RequestError
            As `check_budget`.
        """
        self.grants.resize(*self.check_budget(gradient_payload_bytes))

    def check_budget(
        self, gradient_payload_bytes: int, *, workers: int | None = None, policy: Policy | None = None
    ) -> tuple[int, int]:
        """Work out the budget for a size of gradients, or refuse that size.

        Parameters
        ----------
        gradient_payload_bytes : int
            Bytes of one gradient's payload.
        workers : int, optional
            How many there are to be; by default those that are live.
        policy : Policy, optional
            Which is to hold them; by default the one in force.

        Returns
        -------
        budget_bytes : int
            The budget.
        gradient_bytes : int
            What one gradient is charged.

        Raises
        ------
        RequestError
            ``too_large`` if what the policy must hold does not fit.
        """
        one = charge(gradient_payload_bytes)
        budget = self.settings.queue_bytes or max(DEFAULT_QUEUE_BYTES, 2 * one)
        policy = policy or self.policy
        workers = len(self.members.live_ids) if workers is None else workers
        held = policy.must_hold(max(workers, 1))
        if held * one > budget:
            raise RequestError(
                "too_large",
                f"with {workers} worker(s) the {policy.name} policy must hold {held} gradient(s), {held * one} bytes, "
                f"but --queue-bytes is {budget}; raise it to at least {held * one}",
            )
        return budget, one

    def log(self, level: int, phrase: str, **fields: Any) -> None:
        """Ask the shell for a line in the log.

        Parameters
        ----------
        level : int
            As in `logging`.
        phrase : str
            Fixed words.
        **fields : object
            What varies.
        """
        self.effects.append(Log(level, phrase, fields))

    def reply_header(self, request_id: int | None, fields: dict[str, Any]) -> dict[str, Any]:
        """Build the header of a successful reply.

        Parameters
        ----------
        request_id : int or None
            The request's.
        fields : dict
            The operation's own keys.

        Returns
        -------
        dict
            The header.
        """
        return {
            "v": PROTOCOL_VERSION,
            "ok": True,
            "id": request_id,
            "incarnation": self.incarnation,
            "generation": self.generation,
            "version": self.versions.version,
            "running": self.is_running,
            "fingerprint": self.fingerprint,
            **fields,
        }

    def error_header(self, request_id: int | None, error: RequestError) -> dict[str, Any]:
        """Build the header of a reply that tells of an error.

        Parameters
        ----------
        request_id : int or None
            The request's.
        error : RequestError
            What went wrong.

        Returns
        -------
        dict
            The header.
        """
        header = self.reply_header(request_id, {"error": error.code, "message": error.message})
        header["ok"] = False
        if error.detail is not None:
            header["detail"] = error.detail
        return header

    def answer(
        self, waiter: Waiter, fields: dict[str, Any], frames: Sequence[Any] = (), *, lends: bool = False
    ) -> None:
        """Give a waiting request its reply, once.

        Parameters
        ----------
        waiter : Waiter
            Who waits.
        fields : dict
            The operation's own keys.
        frames : sequence of buffers
            Raw frames behind the header.
        lends : bool
            Whether they may be sent without a copy.
        """
        self._give(waiter, self.reply_header(waiter.request_id, fields), frames, lends)

    def answer_when_durable(
        self, waiter: Waiter, fields: dict[str, Any], frames: Sequence[Any] = (), *, now: float
    ) -> None:
        """Give a request its reply when all that has happened so far is on the disk.

        Parameters
        ----------
        waiter : Waiter
            Who waits; told after `MAX_DISK_WAIT_S` that the disk does not take it.
        fields : dict
            The operation's own keys.
        frames : sequence of buffers
            Raw frames behind the header.
        now : float
            Seconds on the shell's clock.
        """
        if self.records is None:
            self.answer(waiter, fields, frames)
            return
        records = self.records
        wait = records.when_durable(lambda: self.answer(waiter, fields, frames))
        self.limit_disk_wait(waiter, lambda: records.forget(wait), now=now)

    def limit_disk_wait(self, waiter: Waiter, give_up: Callable[[], None], *, now: float) -> None:
        """Let a request wait for the disk, for `MAX_DISK_WAIT_S` at a time.

        Parameters
        ----------
        waiter : Waiter
            Who waits, if it has no reply yet.
        give_up : callable
            Called when it is told that the disk does not take it.
        now : float
            Seconds on the shell's clock.
        """

        def begin(then: float) -> None:
            waiter.deadline = then + MAX_DISK_WAIT_S
            self.deadlines.wait(waiter, tell)

        def tell(late: Waiter, _: float) -> None:
            message = f"it was done, but is not on the disk yet: {self.trouble or 'the disk is slow'}"
            if late.client is None or self.under_way.get(late.client) is not late:
                give_up()  # no repeat of it would be recognised
                self.fail(late, RequestError("failed", message))
            else:  # it can ask again, by the same id, and wait on
                late.on_repeat, late.give_up = begin, give_up
                header = self.error_header(late.request_id, RequestError("pending", message))
                self.effects.append(Reply(late.envelope, header))

        if not waiter.is_done:
            begin(now)

    def forget_request(self, client: ClientKey) -> None:
        """Let go of a request that its client was told to ask for again, and never did.

        Parameters
        ----------
        client : tuple
            That is not remembered any more.
        """
        waiter = self.under_way.get(client)
        if waiter is not None and waiter.on_repeat is not None:
            waiter.is_done = True
            waiter.give_up()
            del self.under_way[client]

    @property
    def trouble(self) -> str | None:
        """What keeps the disk from taking what is to be settled; None if nothing does."""
        return self.disk_trouble or self.checkpoints.error

    def fail(self, waiter: Waiter, error: RequestError) -> None:
        """Give a waiting request an error, once.

        Parameters
        ----------
        waiter : Waiter
            Who waits.
        error : RequestError
            What went wrong.
        """
        self._give(waiter, self.error_header(waiter.request_id, error), ())

    def send(self, waiter: Waiter, header: dict[str, Any]) -> None:
        """Send a remembered reply once more.

        Parameters
        ----------
        waiter : Waiter
            Who asked again.
        header : dict
            The reply as it was.
        """
        self._give(waiter, header, ())

    def _give(self, waiter: Waiter, header: dict[str, Any], frames: Sequence[Any], lends: bool = False) -> None:
        if waiter.is_done:
            return
        waiter.is_done = True
        if waiter.client is not None and waiter.request_id is not None:
            self.remembered.finish(waiter.client, waiter.request_id, header)
            if self.under_way.get(waiter.client) is waiter:
                del self.under_way[waiter.client]
        self.effects.append(Reply(waiter.envelope, header, frames, lends, waiter.session))
