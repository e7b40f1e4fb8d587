"""What stands behind a `Worker`: its session, its thread, its pulls' client, and when to give up waiting for them."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distgrad import addresses
from distgrad.client import ControlClient
from distgrad.errors import (
    BrokerRestarted,
    BrokerUnreachable,
    ConfigError,
    DistgradError,
    Forked,
    GradientRefused,
    StateError,
)
from distgrad.link_history import cause_of
from distgrad.quantities import checked_timeout
from distgrad.sockets import Context, PeerKeys
from distgrad.wire import MAX_ID_CHARACTERS
from distgrad_worker.driver import Driver
from distgrad_worker.patience import Patience
from distgrad_worker.session import Session

# A blocked call looks this often whether the broker still answers; Ctrl-C ends it at once anyway.
LOOK_S = 0.5
# An unfinished worker is given this long to deliver when the program ends.
EXIT_FLUSH_S = 10.0


def new_session(worker_id: str | None, window_bytes: int | None) -> Session:
    """Begin a session of this process.

    Parameters
    ----------
    worker_id : str or None
        The worker's name; None makes one up, which the broker forgets when the worker leaves.
    window_bytes : int or None
        The most that unsettled gradients may take.

    Returns
    -------
    Session
        Not greeted yet.

    Raises
    ------
    ConfigError
        If an argument is impossible.
    """
    if worker_id is not None and not _is_id(worker_id):
        raise ConfigError(f"worker_id must have 1 to {MAX_ID_CHARACTERS} printable characters, got {worker_id!r}")
    if window_bytes is not None and window_bytes < 1:
        raise ConfigError(f"window_bytes must be at least 1, got {window_bytes}")
    nonce = os.urandom(16)
    name = worker_id or f"worker-{nonce[:6].hex()}"
    return Session(name, nonce, generated=worker_id is None, window_bytes=window_bytes)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARACTERS and value.isprintable()


class Connection:
    """One worker's connection to its broker.

    Parameters
    ----------
    session : Session
        Guarded by `lock` from now on.
    address : str
        The broker's control channel.
    keys : PeerKeys or None
        For CURVE.
    timeout : float
        How long the broker may be unreachable before a call gives up, seconds.
    gradients : str or None
        Where to send gradients, if not where the broker says.
    context : zmq.Context or None
        Whose sockets to use, if not those of a context of its own.
    host : str or None
        This host's name, if memory is to be shared with a broker on it.

    Attributes
    ----------
    lock : threading.RLock
        Guards the session and the PUSH socket. Taken as itself, not as `changed`: Ctrl-C in the methods of a condition,
        which are Python, would leave it taken for ever.
    changed : threading.Condition
        Of `lock`; notified whenever the session has changed.
    driver : Driver
        The thread that keeps the lease.
    puller : ControlClient
        For pulls and offers.
    is_closed : bool
        Set by `shut`.
    is_closing : bool
        Whether `close` has begun: nothing more is pushed, so that all that is has been waited for.
    """

    def __init__(
        self,
        session: Session,
        address: str,
        keys: PeerKeys | None,
        timeout: float,
        gradients: str | None,
        context: Context | None = None,
        host: str | None = None,
    ) -> None:
        self._timeout = checked_timeout(timeout)
        self.session = session
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.is_closed = self.is_closing = False
        self._closes = threading.RLock()
        self.is_forked = False
        # Told by the fork itself: asking for the process id in every push would cost as much as encoding it.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_note_fork(weakref.ref(self)))
        self._address = addresses.parse(address, addresses.CONTROL_PORT)
        if gradients is not None:
            addresses.parse(gradients, addresses.GRADIENTS_PORT)
        self.driver = Driver(session, self.changed, self.lock, self._address, keys, gradients, context, host)
        self.puller = ControlClient(address, keys, timeout, context=self.driver.context)
        # What a program leaves behind when it ends without `close` is delivered, whoever still has the worker.
        atexit.register(self.close, EXIT_FLUSH_S)
        self.driver.start()

    def check(self) -> None:
        """Raise what the user must be told before anything else is done.

        Raises
        ------
        Forked
            In a child of ``fork``.
        StateError
            If the worker is closed.
        DistgradError
            What happened since the last call: a refusal, a restart, the end of the session.
        """
        self._check_usable(self.is_closed)
        if self.session.problems or self.session.ended or self.driver.failure:
            with self.lock:
                self.raise_problem()

    def check_open(self) -> None:
        """Raise if nothing may be pushed any more. To be asked again under the lock, and before it, after a fork.

        Raises
        ------
        Forked
            In a child of ``fork``.
        StateError
            If the worker is closed, or another thread closes it.
        """
        self._check_usable(self.is_closing)

    def raise_problem(self) -> None:
        """Raise the oldest thing that the user was not told yet, if there is one; the caller holds the lock.

        Raises
        ------
        DistgradError
            That thing.
        """
        session = self.session
        failure = self.driver.failure
        if isinstance(failure, DistgradError):
            raise failure
        if failure is not None:
            raise StateError("the worker's own thread ended; this is a bug in distgrad") from failure
        if session.problems:
            problem = session.problems.popleft()
            refused = [p for p in session.problems if isinstance(p, GradientRefused)]
            if isinstance(problem, GradientRefused) and refused:
                problem.add_note(f"{len(refused)} more gradient(s) were refused; each is raised in turn")
            raise problem
        if session.ended is not None:
            raise session.ended

    def catch_up(self, known: str | None, timeout: float = math.inf) -> None:
        """Let the lease hear of a new broker that a pull has met before it; `check` then tells what that has cost.

        Until then nothing that is pushed reaches that broker: all of it would be computed on what it began with.

        Parameters
        ----------
        known : str or None
            The incarnation that the session knew before that pull.
        timeout : float
            How long to wait at most, seconds.

        Raises
        ------
        DistgradError
            If the session has ended, or the new broker waits for parameters.
        """
        session = self.session

        def has_heard() -> bool:
            return session.state is not None and session.state.incarnation != known

        if self.puller.incarnation != known:
            with self.lock:
                if not has_heard():
                    # Its first question is on its way, to whom the pull has met.
                    if known is not None:
                        self.driver.ask_now()
                    # Not for ever: the broker that the pull has met may be gone again.
                    with suppress(TimeoutError):
                        self.wait(has_heard, min(timeout, self._timeout))

    @property
    def incarnation(self) -> str | None:
        """The broker that the session knows, None before its first answer."""
        state = self.session.state
        return None if state is None else state.incarnation

    @property
    def must_initialize(self) -> bool:
        """Whether a new broker waits for parameters, which nobody offers before the user is told of it."""
        session = self.session
        return session.layout is None and any(isinstance(problem, BrokerRestarted) for problem in session.problems)

    def wait(self, is_done: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait until something is true; the caller holds the lock.

        Parameters
        ----------
        is_done : callable
            Asked whenever the session has changed.
        timeout : float, optional
            Seconds; None waits as long as the broker answers.

        Raises
        ------
        TimeoutError
            If it was not true in time, or (as `BrokerUnreachable`) the broker does not answer.
        DistgradError
            If waiting is in vain.
        """
        started = time.monotonic()
        deadline = math.inf if timeout is None else started + timeout
        patience = Patience(self._address.endpoint, self._timeout)
        while not is_done():
            if self.is_closed:
                raise StateError("this worker is closed")
            if self.session.ended is not None or self.driver.failure is not None or self.must_initialize:
                self.raise_problem()
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError(f"{len(self.session.window)} gradient(s) are not settled after {timeout} s")
            silent_s = now - max(started, self.driver.last_answer)
            if silent_s >= self._timeout:
                raise self._unreachable()
            patience.note_silence(silent_s, self.driver.link)
            patience.note_rest(now - started, is_running=self.session.is_running)
            self.changed.wait(min(LOOK_S, deadline - now, self._timeout))

    def flush(self, timeout: float | None) -> None:
        """Wait until everything pushed so far is settled.

        Parameters
        ----------
        timeout : float or None
            As for `Worker.flush`, whose errors these are.
        """
        self.check()
        with self.lock:
            self.wait_settled(self.session.window.last, timeout)
            self.raise_problem()

    def wait_settled(self, number: int, timeout: float | None = None) -> None:
        """Wait until a gradient is settled.

        Parameters
        ----------
        number : int
            Its number.
        timeout : float, optional
            As for `wait`, whose errors these are.
        """
        session = self.session
        if session.window.settled >= number:
            return
        with self.lock:
            try:
                session.awaited.append(number)
                self.driver.send_due()
                self.driver.wake()
                self.wait(lambda: session.window.settled >= number, timeout)
            finally:
                session.awaited.remove(number)

    def close(self, timeout: float | None = None) -> None:
        """Flush, say goodbye, and close everything. Idempotent; a second thread waits for the first.

        Parameters
        ----------
        timeout : float, optional
            As for `Worker.close`, whose errors these are.
        """
        if self.is_forked:
            return
        if not self._closes.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError(f"another thread closes this worker, and has not done so after {timeout} s")
        try:
            if not self.is_closed:
                self._finish(timeout)
        finally:
            self._closes.release()

    def abandon(self) -> None:
        """Close without waiting: nobody has the worker any more, and it may not be the program that finds that out."""
        if not (self.is_closed or self.is_forked):
            threading.Thread(target=self._close_abandoned, name="distgrad-abandoned", daemon=True).start()

    def _check_usable(self, is_over: bool) -> None:
        if self.is_forked:
            raise Forked("this worker belongs to the parent process; make a new Worker after fork")
        if is_over:
            raise StateError("this worker is closed")

    def _close_abandoned(self) -> None:
        # There is nobody who could be told.
        with suppress(DistgradError, TimeoutError):
            self.close(self._timeout)

    def _finish(self, timeout: float | None) -> None:
        session, is_settled = self.session, False
        try:
            # What is told here is raised after everything is settled, not instead of settling.
            with self.lock:
                self.is_closing = True
                self.changed.notify_all()
                if self.must_initialize:
                    self.raise_problem()
                told = list(session.problems)
                session.problems.clear()
            try:
                self.flush(timeout)
            finally:
                is_settled = not len(session.window)
                with self.lock:
                    session.problems.extendleft(reversed(told))
            with self.lock:
                self.raise_problem()
        finally:
            self.shut(leaves=is_settled)

    def shut(self, *, leaves: bool) -> None:
        """Close everything.

        Parameters
        ----------
        leaves : bool
            Say goodbye to the broker: nothing is unsettled.
        """
        with self.lock:
            self.is_closed = self.is_closing = True
            self.changed.notify_all()
        self.puller.close()
        self.driver.close(leaves=leaves and self.session.ended is None, timeout_s=min(self._timeout, 1.0))
        # Last: until then the end of the program waits for whichever thread closes.
        atexit.unregister(self.close)

    def _unreachable(self) -> BrokerUnreachable:
        cause = cause_of(self.driver.link)
        return BrokerUnreachable(
            f"no answer from a broker at {self._address.endpoint} within {self._timeout:g} s: {cause}",
            hint="start one with `distgrad broker`, or check the address and the keys",
        )


def _note_fork(reference: weakref.ref[Connection]) -> Any:
    """Make the hook that tells a connection in a forked child that it is the parent's."""

    def note() -> None:
        connection = reference()
        if connection is not None:
            connection.is_forked = True

    return note
