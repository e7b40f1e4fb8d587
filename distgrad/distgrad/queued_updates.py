"""From gradients taken out of the queue to one update, within one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .durable.replay import recut
from .durable.stored_gradient import EARLY, stored_arrays
from .errors import ConfigError, GradientRefused, LayoutError
from .gradient_queue import QueuedGradient
from .holder import ParameterHolder
from .policies import Asynchronous, Buffered, Policy, Weighing
from .wire import Gradient


def step_size(policy: Policy | None, max_queue: int) -> int:
    """Tell how many gradients make an update.

    Parameters
    ----------
    policy : Policy or None
        As the user gave it.
    max_queue : int
        Gradients that may wait.

    Returns
    -------
    int
        1 without a policy.

    Raises
    ------
    ConfigError
        If the policy means nothing within one process, or needs more gradients than may wait; if none may wait.
    """
    if type(max_queue) is not int or max_queue < 1:
        raise ConfigError(f"max_queue must be an integer of at least 1, got {max_queue!r}")
    if policy is None or isinstance(policy, Asynchronous):
        return 1
    if isinstance(policy, Buffered):
        step = policy.buffer_size
        if step > max_queue:
            raise ConfigError(
                f"the policy must hold {step} gradients, but max_queue is {max_queue}; raise it to {step}"
            )
        return step
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"policy must be a policy such as distgrad.policies.Buffered(10), or None, got {policy!r:.80}; "
            "within one process there are no names"
        )
    raise ConfigError(f"policy {policy.name!r} tells workers apart; start a broker for it: distgrad_broker.Broker")


def apply_together(
    holder: ParameterHolder,
    step: Sequence[QueuedGradient],
    weighing: Weighing,
    refuse: Callable[[GradientRefused], None],
    applied: Callable[[Sequence[int], Sequence[float] | None], None] = lambda numbers, weights: None,
) -> None:
    """Make one update of some gradients; a bad one is refused alone.

    Parameters
    ----------
    holder : ParameterHolder
        With parameters.
    step : sequence of QueuedGradient
        At least one.
    weighing : Weighing
        Mean or sum.
    refuse : callable
        Is told of each gradient that is not applied.
    applied : callable, optional
        Is told the numbers of those that are, and what they were multiplied by; None for one that was not.
    """
    good: list[tuple[int, Any]] = []
    for gradient in step:
        try:
            content = _fitted(holder, gradient)
            if len(step) > 1:
                holder.check(content)
        except (GradientRefused, LayoutError) as error:
            refuse(_refusal(gradient.number, error))
        else:
            good.append((gradient.number, content))
    if not good:
        return
    numbers = [number for number, _ in good]
    weights: list[float] | None = None
    try:
        if len(step) == 1:
            holder.apply(good[0][1])
        else:
            weights = [1.0 if weighing.reduction == "sum" else 1 / len(good)] * len(good)
            holder.apply_sum([content for _, content in good], weights)
    except GradientRefused as error:
        for number in numbers:
            refuse(_refusal(number, error))
    else:
        applied(numbers, weights)


def _fitted(holder: ParameterHolder, gradient: QueuedGradient) -> Any:
    """Give a gradient's arrays in the order of the holder's arenas."""
    if gradient.layout is None:
        assert holder.layout is not None  # the caller has looked
        if not isinstance(gradient.content, Gradient):
            return holder.layout.pack_gradient(gradient.content)
        stored = gradient.content
        if stored.encoding == EARLY or stored.fingerprint == holder.layout.fingerprint:
            recut(holder.layout, stored)
            return stored_arrays(holder.layout, stored)
    if gradient.layout is None or gradient.layout != holder.layout:
        raise LayoutError("the parameters have another layout than when the gradient was added")
    return gradient.content


def _refusal(number: int, error: GradientRefused | LayoutError) -> GradientRefused:
    reason = error.reason if isinstance(error, GradientRefused) else "layout"
    text = f"gradient {number} was refused: {error.message}"
    return GradientRefused(reason, text, leaf=error.leaf, number=number)
