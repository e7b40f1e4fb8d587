"""A worker's side of the protocol, without sockets, threads or clocks (PROTOCOL 4-11).

States: **greeting** (`hello` must be sent; nothing else is) → **resuming** (a new attempt was begun; the next
heartbeat tells from where to send) → **open** (gradients flow) → **ended** (fenced, history lost, gave up: every
call raises the same error).

- A lost connection, a missing number or no progress begin a new attempt: the shell closes its PUSH socket, opens
  another and sends from the broker's number on. A missing number counts once, within the current attempt.
- ``unknown_worker`` or another incarnation in a reply lead back to greeting.
- What the user must be told (a refusal, a restart of the broker) is queued in `problems` and raised by the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from distgrad.errors import DistgradError, Fenced, Forbidden, GradientRefused, HistoryLost, LayoutError
from distgrad.layout import Layout
from distgrad.wire import ASK_S, State, charge
from distgrad_worker.headers import Header
from distgrad_worker.losses import Progress, cost_of_restart, settles_on_disk
from distgrad_worker.window import Entry, Window

MAX_PROBLEMS = 64

GREETING, RESUMING, OPEN = "greeting", "resuming", "open"


class Session:
    """The state machine.

    Parameters
    ----------
    worker_id : str
        The worker's name, unique among those that run.
    nonce : bytes
        Random, one per process.
    generated : bool
        Whether the id was made up.
    window_bytes : int or None
        Limit of the window.
    """

    def __init__(self, worker_id: str, nonce: bytes, *, generated: bool, window_bytes: int | None) -> None:
        self.worker_id = worker_id
        self.window = Window(window_bytes)
        self.phase = GREETING
        self.layout: Layout | None = None
        self.state: State | None = None
        self.cursor: bytes | str | None = None
        self.gradients = ""
        self.lease_s = 30.0
        # How often to ask where nobody waits.
        self.ask_s = ASK_S
        self.is_running = True
        self.superseded = 0
        # The broker's host, its name for lanes, and the slots of shared memory that it knows.
        self.host: str | None = None
        self.lane: Any = None
        self.shared: set[int] = set()
        # Those that it was told of since it was last asked: an answer that is under way does not know of them.
        self.told: set[int] = set()
        self.must_reopen = False
        self.ended: DistgradError | None = None
        self.problems: deque[DistgradError] = deque(maxlen=MAX_PROBLEMS)
        self.attempt = 1
        self.nonce = nonce
        self.is_generated = generated
        # As issued by the last `hello`.
        self.name: str | None = None
        self._progress = Progress()
        self.grant = self.grant_seq = self._queue_bytes = 0
        self._echo_due = self._rewind_due = False
        self.want = 0
        # Numbers whose settling somebody waits for, to be told of it as soon as it happens.
        self.awaited: list[int] = []

    # What the user's threads do

    def can_push(self, payload_bytes: int, fingerprint: int) -> bool:
        """Tell whether a gradient can be numbered now; if not, its bytes are asked for.

        Parameters
        ----------
        payload_bytes : int
            Bytes of its payload.
        fingerprint : int
            Of the layout that it was made for.

        Returns
        -------
        bool
            Whether to go on with `push`.

        Raises
        ------
        LayoutError
            If the parameters have another layout now. While a push waits they may be replaced, and there may never
            be a grant for a gradient of the former size.
        GradientRefused
            If it is larger than the broker's whole queue.
        """
        if self.layout is not None and self.layout.fingerprint != fingerprint:
            raise LayoutError("the parameters were replaced by others of another layout; pull and go on with those")
        needed = charge(payload_bytes)
        has_room = self.window.has_room(needed, self.grant)
        if not has_room and self.phase == OPEN and needed > self._queue_bytes:
            budget = f"the broker's --queue-bytes {self._queue_bytes}"
            raise GradientRefused("too_large", f"a gradient of {payload_bytes} bytes does not fit in {budget}")
        self.want = 0 if has_room else needed
        return has_room

    def stop_wanting(self) -> None:
        """Take back what `can_push` asked for: the push was given up."""
        self.want = 0

    def push(
        self,
        header: Header,
        details: Mapping[str, Any],
        parts: Sequence[Any],
        payload_bytes: int,
        slot: int | None = None,
        asks: int | None = None,
    ) -> int:
        """Give a gradient its number, after `can_push` was true.

        Parameters
        ----------
        header, details : Header, mapping
            What its header shares with others; from `checked_details`.
        parts : sequence of buffers
            Its payload, which nobody changes until it is settled.
        payload_bytes : int
            Bytes of its payload.
        slot : int, optional
            The slot that the payload lies in.
        asks : int, optional
            The pull that its message stands for.

        Returns
        -------
        int
            Its number.
        """
        return self.window.add(header, details, parts, charge(payload_bytes), slot, asks).number

    def sendable(self, now: float) -> list[Entry]:
        """Take what is to be sent now.

        Parameters
        ----------
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        list of Entry
            In order, addressed.
        """
        window, progress = self.window, self._progress
        if self.phase != OPEN or self.must_reopen or window.sent >= window.last or now < progress.resend_at:
            return []
        if window.sent <= progress.accepted:
            progress.since = now
        entries = window.send(self.grant, progress.accepted + 1 if progress.is_in_doubt else window.last)
        for entry in entries:
            entry.header.address(self.name, self.attempt)
        return entries

    # What the shell's thread does

    @property
    def is_busy(self) -> bool:
        """Whether there is something to hear from the broker soon; else a heartbeat now and then is enough."""
        return self.phase != OPEN or self.window.settled < self.window.last or self.want > 0 or self._echo_due

    @property
    def is_urgent(self) -> bool:
        """Whether to ask now: somebody waits, or will soon, as half of what may be on the way is."""
        is_open = self.phase == OPEN and not self._echo_due
        return not is_open or bool(self.want or self.hurry) or 2 * self.window.in_flight_bytes > self.grant

    @property
    def hurry(self) -> int:
        """The number whose settling somebody waits for, 0 if nobody does."""
        if not (self.awaited or self.want):
            return 0
        window = self.window
        awaited = min((number for number in self.awaited if number > window.settled), default=0)
        if awaited or not (self.want and len(window)):
            return awaited
        # A push waits for room in the window: a quarter of it at a time keeps requests few.
        return window.settled + max(1, len(window) // 4)

    def connection_lost(self) -> None:
        """Begin a new attempt if something was on the way: it may be gone. ZeroMQ itself connects again."""
        if self.window.sent > self._progress.accepted:
            self._begin_attempt()

    def reopened(self) -> None:
        """Note that the shell has a fresh PUSH socket."""
        self.must_reopen = False

    def on_hello(self, header: Mapping[str, Any], layout_frame: Any, now: float) -> None:
        """Take in the reply to a `hello`.

        Parameters
        ----------
        header : mapping
            Of the reply.
        layout_frame : buffer or None
            The frame behind it.
        now : float
            Seconds on the shell's clock.

        Raises
        ------
        MalformedMessage
            If the layout cannot be decoded.
        """
        window = self.window
        layout = Layout.from_frame(layout_frame) if layout_frame is not None else None
        if layout is None or self.layout is None or layout.fingerprint != self.layout.fingerprint:
            self.layout = layout
        accepted = int(header["accepted"])
        is_first = self.name is None
        session = str(header["session"])
        if not is_first and header["incarnation"] != str(self.name).partition(":")[0]:
            self._on_restart(header)
            if self.ended is not None:
                return
        if session != self.name:
            self.name, self.shared, self.told = session, set(), set()
            # Everything on the way belongs to the former session.
            self.attempt += 0 if is_first else 1
            self.must_reopen = self._rewind_due = True
        if is_first:
            window.inherit(int(header["settled"]), accepted, int(header["queued"]))
            self.cursor = header["cursor"]
        self.gradients = str(header["gradients"])
        self.host, self.lane = header.get("host"), header.get("lane")
        self.lease_s = float(header["lease_s"])
        # What waits for the broker's disk makes nobody staler, and is kept for longer: as much as the grant allows.
        self.window.keeps_all = settles_on_disk(header)
        self._queue_bytes = int(header["queue_bytes"])
        self._progress.accepted = accepted
        self._take_news(header)
        # What is settled is taken from heartbeats alone: they also tell what was refused, and a flush must not end
        # before that is known.
        if self._rewind_due:
            window.rewind(accepted)
        self._open(now)

    def on_heartbeat(self, header: Mapping[str, Any], now: float) -> None:
        """Take in the reply to a `heartbeat`.

        Parameters
        ----------
        header : mapping
            Of the reply.
        now : float
            Seconds on the shell's clock.
        """
        window = self.window
        # A pull may have told more than this reply knew when it was sent.
        accepted, settled = max(int(header["accepted"]), window.settled), int(header["settled"])
        progress = self._progress
        progress.hear(accepted, now, is_news=settled > window.settled or bool(header.get("early")))
        for number, reason, leaf, message in header["refused"]:
            # What a predecessor under this id left in the queue is not for this process to hear of.
            if number > max(window.settled, window.inherited):
                self.problems.append(GradientRefused(reason, message, leaf=leaf, number=number))
        window.settle(min(settled, window.last))
        window.disown(int(header["queued"]))
        self.superseded = int(header.get("superseded", 0))
        self.shared = self.told.union(header.get("slots", ()))
        self._take_news(header)
        if self.phase == RESUMING and header["attempt"] == self.attempt:
            if window.sent > accepted and (failure := progress.count_try(accepted, self.gradients, now)):
                self._end(failure)
                return
            window.rewind(accepted)
            self._open(now)
        elif self.phase == OPEN:
            is_missing = header["resend"] and header["attempt"] == self.attempt and window.sent > accepted
            is_stalled = window.sent > accepted and progress.is_stalled(window.in_flight_bytes, now)
            if is_missing or is_stalled:
                self._begin_attempt()
        if self.phase == OPEN and header["fingerprint"] != (self.layout.fingerprint if self.layout else None):
            # The parameters were replaced. Hello brings the layout; until then a push that needs it asks for it.
            self.phase, self.layout = GREETING, None

    def on_pulled(self, session: str | None, settled: int, superseded: int, now: float) -> bool:
        """Take in what the reply to a `get` told of this worker's gradients.

        Parameters
        ----------
        session : str or None
            The session that it was asked in.
        settled, superseded : int
            Up to which number all is settled, of which nothing was refused that a heartbeat did not tell; and how many
            were superseded.
        now : float
            Seconds on the shell's clock.

        Returns
        -------
        bool
            Whether it is news.
        """
        if session != self.name or settled <= self.window.settled:
            return False
        self._progress.hear(settled, now, is_news=True)
        self.superseded = max(self.superseded, superseded)
        self.window.settle(min(settled, self.window.last))
        return True

    def on_pulled_layout(self, state: State, fingerprint: int) -> bool:
        """Note that a pull has brought parameters of another layout, before a heartbeat told of them.

        Parameters
        ----------
        state : State
            What was pulled.
        fingerprint : int
            Of its layout.

        Returns
        -------
        bool
            Whether it is news, and `hello` has to be said for it.
        """
        known, layout = self.state, self.layout
        if self.phase != OPEN or known is None or layout is None or layout.fingerprint == fingerprint:
            return False
        if state.incarnation != known.incarnation or state.generation <= known.generation:
            return False
        self.phase, self.layout = GREETING, None
        return True

    def on_error(self, error: DistgradError, code: str) -> None:
        """Take in an error that the broker answered a request of this session with.

        Parameters
        ----------
        error : DistgradError
            As built by `distgrad.errors.from_code`.
        code : str
            Its code on the wire.
        """
        if code == "failed":
            return  # the broker is shutting down, or its disk is slow: it or its successor may answer
        if code in ("unknown_worker", "restarted"):
            self.phase = GREETING
        elif isinstance(error, Fenced):
            self._end(Fenced("fenced", f"{error}; a fenced worker does not come back by itself"))
        elif isinstance(error, Forbidden) or self.phase == GREETING or code == "destroyed":
            self._end(error)
        else:
            self.problems.append(error)

    def _on_restart(self, header: Mapping[str, Any]) -> None:
        """Tell the user once what went with the old incarnation (PROTOCOL 6)."""
        settled = (self.window.lowest or self.window.last + 1) - 1
        is_adopted, is_durable = bool(header["adopted"]), settles_on_disk(header)
        if not is_durable:
            self.window.disown()
        has, kept = int(header["accepted"]), header.get("kept")
        cost = cost_of_restart(self.worker_id, settled, has, is_adopted=is_adopted, is_durable=is_durable, kept=kept)
        if isinstance(cost, HistoryLost):
            self._end(cost)
        elif cost is not None:
            self.problems.append(cost)

    def _begin_attempt(self) -> None:
        self.attempt += 1
        self.must_reopen = self._rewind_due = True
        self.phase = RESUMING if self.phase == OPEN else self.phase

    def _open(self, now: float) -> None:
        """Let gradients flow, now that the window agrees with the broker."""
        self._rewind_due = False
        if self.layout is not None:
            self.window.give_up_payloads(self.layout.fingerprint)
        self.phase = OPEN
        self._progress.since = now

    def _take_news(self, header: Mapping[str, Any]) -> None:
        self._echo_due = header["grant_seq"] != self.grant_seq
        self.grant, self.grant_seq = int(header["grant"]), int(header["grant_seq"])
        self.state = State(header["incarnation"], header["generation"], header["version"])
        self.is_running = bool(header["running"])
        self.ask_s = min(float(header.get("ask_s", ASK_S)), self.lease_s / 4)

    def _end(self, error: DistgradError) -> None:
        self.ended = self.ended or error
