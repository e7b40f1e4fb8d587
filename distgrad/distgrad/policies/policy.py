"""What a consistency policy is asked, and what it may answer: values only, no sockets, no threads, no clock.

The one who holds the parameters shows a policy every gradient in the order of its acceptance (`Policy.offer`). A policy
that holds gradients back is asked after each of them, when workers come or go, and at its own deadline whether a step
is complete (`Policy.complete`). It never sees the numbers of a gradient, only who sent it and what it was computed on.

A gradient that is held stays unsettled, with its worker's grant, until its step is applied. Whoever writes a policy
therefore says how many gradients it must hold (`Policy.must_hold`), so that a budget too small is refused beforehand.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar


class Action(Enum):
    """What becomes of a gradient."""

    APPLY = "apply"
    HOLD = "hold"
    SUPERSEDE = "supersede"
    REFUSE = "refuse"


class Base(Protocol):
    """The state that a gradient was computed on, as its worker named it."""

    @property
    def version(self) -> int:
        """Updates that had been applied."""
        ...


class Offered(Protocol):
    """What a policy may look at in a gradient."""

    @property
    def worker(self) -> str:
        """Who sent it."""
        ...

    @property
    def number(self) -> int:
        """Its place in that worker's order."""
        ...

    @property
    def examples(self) -> int:
        """Training examples behind it."""
        ...

    @property
    def base(self) -> Base | None:
        """What it was computed on; None if its worker did not say."""
        ...


Gradient = TypeVar("Gradient", bound=Offered)


class Decision(NamedTuple):
    """A policy's answer to one gradient.

    Attributes
    ----------
    action : Action
        Apply it now, hold it for a step, settle it as superseded, or refuse it.
    factor : float
        What the gradient is multiplied by when it is applied, now or later; 1 leaves it as it is.
    reason, message : str
        For a refusal: the word that it is counted under, and a sentence for the person whose worker it was.
    """

    action: Action
    factor: float = 1.0
    reason: str = ""
    message: str = ""


APPLY = Decision(Action.APPLY)
HOLD = Decision(Action.HOLD)
SUPERSEDE = Decision(Action.SUPERSEDE)


class Held(NamedTuple, Generic[Gradient]):
    """A gradient that waits for its step, and the factor that it goes in with."""

    gradient: Gradient
    factor: float = 1.0


class Situation(NamedTuple):
    """What a policy is told of the world when it is asked something.

    Attributes
    ----------
    version : int
        Updates applied so far.
    live : collection of str
        Ids of the workers whose lease runs.
    now : float
        Seconds on the caller's clock, which never goes back.
    """

    version: int
    live: Collection[str]
    now: float


class Places(NamedTuple):
    """Whom a step waits for, however long.

    Attributes
    ----------
    named : collection of str
        Ids of workers that must all come.
    others : int
        How many more must come.
    among : collection of str or None
        Who these may be; None if it may be anybody.
    """

    named: Collection[str]
    others: int
    among: Collection[str] | None = None


NO_PLACES = Places((), 0)


class Policy:
    """Decides when a gradient counts. The answers here are those of a policy that has no opinion.

    A policy is made once for each holder of parameters and is not shared: it may remember workers and gradients.

    Attributes
    ----------
    name : str
        Its name in options and in status.
    is_immediate : bool
        Whether `offer` would apply every gradient at once with a factor of 1: then it need not be called.
    gates_pulls : bool
        Whether `may_pull` may be False.
    holds : bool
        Whether `offer` may hold a gradient.
    is_repeatable : bool
        Whether the same gradients make the same versions, bit for bit, in whatever order they come. A version that a
        crash took back then comes again, and what was computed on it waits for that, before it is offered.
    """

    name = "policy"
    is_immediate = False
    gates_pulls = False
    holds = False
    is_repeatable = False

    def offer(self, gradient: Offered, staleness: int | None, situation: Situation) -> Decision:
        """Decide on one gradient, the next in the order of acceptance.

        Parameters
        ----------
        gradient : Offered
            The gradient.
        staleness : int or None
            Updates since the state that it was computed on, at least 0. None if that state was not told, belongs to
            parameters that were replaced since, or was taken back by a crash.
        situation : Situation
            As of now.

        Returns
        -------
        Decision
            What to do with it.
        """
        return APPLY

    def complete(self, situation: Situation) -> Sequence[Offered] | None:
        """Give the gradients of the next update, if all that it waits for is there.

        Parameters
        ----------
        situation : Situation
            As of now.

        Returns
        -------
        sequence of Offered or None
            Gradients that were held, in the order in which they are to be summed; the policy forgets them. None if
            there is nothing to do yet.
        """
        return None

    def withdrawn(self, gradient: Offered) -> None:
        """Forget a gradient that was held: it turned out to be bad, or its worker's numbers began anew.

        Parameters
        ----------
        gradient : Offered
            The same object that was offered.
        """

    def reset(self) -> None:
        """Forget all that is held: it was cleared, or will be offered again for other parameters."""

    def may_pull(self, worker: str, situation: Situation) -> bool:
        """Tell whether a worker may have the present parameters; all that it has pushed was offered before.

        Parameters
        ----------
        worker : str
            Who asks.
        situation : Situation
            As of now.

        Returns
        -------
        bool
            False lets it wait; it is asked again after each gradient, and when workers come or go.
        """
        return True

    def joined(self, worker: str, situation: Situation) -> None:
        """Note that a worker has come, or has come back after its lease had ended.

        Parameters
        ----------
        worker : str
            Who; among `situation.live`.
        situation : Situation
            As of now.
        """

    def departed(self, worker: str, *, left: bool) -> None:
        """Note that a worker is gone.

        Parameters
        ----------
        worker : str
            Who.
        left : bool
            Whether it said goodbye; otherwise its lease ran out.
        """

    def awaited(self, worker: str, situation: Situation) -> None:
        """Note that a worker sits and waits for a gradient of its to be settled, while some of them are held.

        Parameters
        ----------
        worker : str
            Who.
        situation : Situation
            As of now.
        """

    def next_deadline(self) -> float | None:
        """Tell when `complete` may change its answer by time alone.

        Returns
        -------
        float or None
            Seconds on the caller's clock.
        """
        return None

    def must_hold(self, workers: int) -> int:
        """Tell how many gradients must fit in the queue at once for this to get on.

        Parameters
        ----------
        workers : int
            How many are live.

        Returns
        -------
        int
            At least 1.
        """
        return 1

    def places(self) -> Places:
        """Tell for whom room in the queue must be kept though they may not be there: a step waits until they come.

        Returns
        -------
        Places
            None by default.
        """
        return NO_PLACES

    def check(self, max_workers: int) -> None:
        """Refuse settings that cannot work for so many workers.

        Parameters
        ----------
        max_workers : int
            The most that are allowed.

        Raises
        ------
        ConfigError
            Naming the setting and its bound.
        """

    def waits_for(self, situation: Situation) -> Sequence[str]:
        """Name the workers that the present step waits for, for people.

        Parameters
        ----------
        situation : Situation
            As of now.

        Returns
        -------
        sequence of str
            Ids, or words such as "2 more workers".
        """
        return ()

    def memory(self) -> dict[str, Any]:
        """Give what must outlive the process; what can be offered again need not.

        Returns
        -------
        dict
            For `recall`; small, and of what msgpack knows.
        """
        return {}

    def step_memory(self) -> dict[str, Any]:
        """Give what must outlive the process of the open step; it holds for the present version only.

        Returns
        -------
        dict
            For `recall`, joined with `memory`; small, and of what msgpack knows. Gradients that are held are offered
            again by themselves.
        """
        return {}

    def recall(self, memory: dict[str, Any]) -> None:
        """Take back what an earlier process remembered, or the policy before this one if it had the same name.

        Parameters
        ----------
        memory : dict
            From `memory`, perhaps of a policy with other settings: take what still means the same. After a restart
            also from `step_memory`.
        """

    def settings(self) -> dict[str, Any]:
        """Give the settings in force.

        Returns
        -------
        dict
            Names as in the configuration; plain numbers and words.
        """
        return {}
