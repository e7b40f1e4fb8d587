"""`DistributedOptimizer`: a ``torch.optim.Optimizer`` whose rule and state are the broker's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from distgrad import log
from distgrad.admin import Admin
from distgrad.errors import ConfigError, GradientRefused, LayoutError, StateError
from distgrad_worker.slot import Slot
from distgrad_worker.torch.ahead import Ahead, Collected
from distgrad_worker.torch.buffers import SharedBuffers
from distgrad_worker.torch.learning_rate import LearningRate
from distgrad_worker.torch.outgoing import Outgoing
from distgrad_worker.torch.parameters import Parameters, trained_of
from distgrad_worker.worker import Worker

_LOGGER = logging.getLogger(__name__)

_GROUP_KEYS = {"params", "param_names", "lr"}


class DistributedOptimizer(torch.optim.Optimizer):  # type: ignore[misc]  # torch is not installed everywhere
    """Optimizer whose ``step`` pushes the gradients to a broker and brings the broker's parameters back.

    The first worker's parameters become the broker's; the model of every other gets those in place of its own, when
    the optimizer is made. What happens to a gradient is the broker's to say: its rule (``--optimizer``), and its policy
    (``--policy``).

    Parameters
    ----------
    params : Module, or iterable of Parameter, of (str, Parameter), or of dict
        A model, or what other optimizers take. From a model or ``named_parameters()`` a parameter has its name at the
        broker, else its position. Parameters that are frozen now are left alone, and must be the same in all workers. A
        group may have its own ``lr``, and nothing else of a rule.
    worker : Worker
        Connection to the broker. It is not closed by this object.
    lr : float, optional
        Learning rate; by default the broker's, or 1 where it has no rule. See `docs/torch.md` for what a change does.
    wait : bool
        Whether a step waits until its gradient is settled, so that it is in what is brought back. Without, the broker's
        policy alone decides: under ``async`` mostly parameters without this gradient.
    overlap : bool
        Whether gradients are copied within the backward pass, and a step returns at once: pushing and pulling go on
        until the next forward pass, which waits. `params` must be the model. Gradients cannot be changed after
        ``backward()`` then, nor added up over several.
    buffers : SharedBuffers, optional
        Shares batch-norm statistics and the like after each step. Without, each worker keeps its own.
    admin : Admin, optional
        Who tells the broker a changed ``lr``, if that is needed and the worker's key does not allow it.

    Raises
    ------
    LayoutError
        If a parameter cannot be trained, two share memory, or the broker has parameters of another model.
    ConfigError
        If an argument is impossible.
    DistgradError
        As `Worker.initialize`.

    Examples
    --------
    >>> optimizer = DistributedOptimizer(model, worker)  # doctest: +SKIP
    >>> loss = F.cross_entropy(model(x), y)  # doctest: +SKIP
    >>> optimizer.zero_grad()  # doctest: +SKIP
    >>> loss.backward()  # doctest: +SKIP
    >>> optimizer.step(loss=loss)  # doctest: +SKIP
    """

    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        worker: Worker,
        *,
        lr: float | None = None,
        wait: bool = True,
        overlap: bool = False,
        buffers: SharedBuffers | None = None,
        admin: Admin | None = None,
    ) -> None:
        module = params if isinstance(params, torch.nn.Module) else None
        if overlap and module is None:
            raise ConfigError(
                "overlap=True waits in the model's forward pass: pass the model instead of its parameters"
            )
        if lr is not None and not lr >= 0:
            raise ConfigError(f"lr must be at least 0, got {lr}")
        self._parameters: Parameters | None = None
        self._worker = worker
        self._waits = wait
        self._buffers = buffers
        self._rate = LearningRate(worker, admin)
        if lr is None and not self._rate.has_rule:
            log.event(
                _LOGGER,
                logging.WARNING,
                "the broker has no optimizer and no lr is given: steps are the gradients themselves, as with lr=1",
            )
        given = params if module is None else module.named_parameters()
        super().__init__(given, {"lr": self._rate.value if lr is None else float(lr)})
        self._parameters = Parameters(trained_of(self.param_groups))
        self.initialize()
        self._outgoing = Outgoing(worker, self._parameters)
        self._ahead: Ahead | None = None
        self._collected: Collected | None = None
        # What the gradients of each group are multiplied by, looked up when the first of a backward pass is there.
        self._factors: list[float] | None = None
        if overlap:
            assert module is not None  # checked above
            self._ahead = Ahead(module)
            self._collected = Collected(self._parameters, self._outgoing, self._factor)

    @property
    def version(self) -> int:
        """Version of the broker's parameters that the model has."""
        self.synchronize()
        return self._trained.snapshot.version

    def initialize(self) -> None:
        """Offer the model's parameters to the broker, and take what it has then.

        The constructor does this. Call it again after `BrokerRestarted` from a broker without a data folder: the first
        worker that does gives its parameters to all.

        Raises
        ------
        LayoutError
            If the broker has parameters of another model.
        DistgradError
            As `Worker.initialize`.
        """
        with torch.no_grad():
            self._trained.take(self._worker.initialize(self._trained.offered()))

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Any = None,
        examples: int = 1,
        cursor: bytes | str | None = None,
    ) -> Any:
        """Push the gradients, and bring the broker's parameters into the model.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes the loss and its gradients, and returns the loss; called once.
        loss : float or Tensor, optional
            For the broker's display; by default what `closure` returns.
        examples : int
            Training examples behind the gradients.
        cursor : bytes or str, optional
            Where this worker stands in its data, as for `Worker.push`.

        Returns
        -------
        object
            What `closure` returned.

        Raises
        ------
        StateError
            If no parameter has a gradient.
        LayoutError
            If a gradient is sparse, or the broker's parameters were replaced by others.
        GradientRefused
            If the broker refused this gradient, or one before it. The model has the broker's parameters as they were.
        DistgradError
            As `Worker.push`, `Worker.flush` and `Worker.pull`.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        details = {"loss": _number(value if loss is None else loss), "examples": examples, "cursor": cursor}
        self.synchronize()
        with torch.no_grad():
            self._write()
            if self._outgoing.is_empty:
                raise StateError("no parameter has a gradient: call loss.backward() before step()")
            slot = self._outgoing.finish(details)
            if self._ahead is not None:
                self._ahead.start(lambda: self._exchange(slot))
            else:
                self._exchange(slot)
            if self._buffers is not None:
                self._buffers.synchronize()
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Parameters
        ----------
        set_to_none : bool
            Whether to drop them instead of filling them with zeros.
        """
        if self._collected is not None:
            self._collected.drop()
            self._factors = None
        super().zero_grad(set_to_none)

    def synchronize(self) -> None:
        """Wait until the model has what the last step has brought; needed only with ``overlap``.

        The model's forward pass and its ``state_dict`` do so by themselves.

        Raises
        ------
        DistgradError
            What the last step would have raised.
        """
        if self._ahead is not None:
            self._ahead.join()

    def close(self) -> None:
        """Take everything off the model that `overlap` has put there; the model keeps its parameters."""
        if self._ahead is not None and self._collected is not None:
            self._collected.close()
            self._ahead.close()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; only the constructor can.

        Parameters
        ----------
        param_group : dict
            ``params``, and ``lr`` if it has its own.

        Raises
        ------
        StateError
            After the constructor: the broker's parameters are laid out once.
        ConfigError
            If the group has a setting that is the broker's.
        LayoutError
            If it has a parameter twice.
        """
        if self._parameters is not None:
            raise StateError("parameters cannot be added later: make a new DistributedOptimizer, with another broker")
        foreign = sorted(set(param_group) - _GROUP_KEYS)
        if foreign:
            raise ConfigError(f"a group may set lr only, got {', '.join(foreign)}: give it to the broker's rule")
        given = param_group["params"]
        tensors = [given] if isinstance(given, torch.Tensor) else list(given)
        bare = [item[1] if isinstance(item, tuple) else item for item in tensors]
        if len({id(tensor) for tensor in bare}) < len(bare):
            raise LayoutError("a parameter is given twice: leave remove_duplicate=False out, tied ones count once")
        super().add_param_group({**param_group, "params": tensors})

    def state_dict(self) -> dict[str, Any]:
        """Give the parameter groups; the rule's state is the broker's (``distgrad broker --data``).

        Returns
        -------
        dict
            As other optimizers', with an empty ``state``.
        """
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the learning rates of the parameter groups.

        Parameters
        ----------
        state_dict : dict
            From `state_dict`.

        Raises
        ------
        ConfigError
            If it has the state of another optimizer.
        """
        if state_dict.get("state"):
            raise ConfigError(
                "this state_dict is of an optimizer that keeps its state here; here the broker keeps it, and goes on "
                "with it by itself if it has a data folder"
            )
        super().load_state_dict(state_dict)

    @property
    def _trained(self) -> Parameters:
        assert self._parameters is not None  # None only while torch's constructor runs
        return self._parameters

    def _factor(self, group: int) -> float:
        if self._factors is None:
            self._factors = self._rate.factors([float(each["lr"]) for each in self.param_groups])
        return self._factors[group]

    def _write(self) -> None:
        """Have all gradients written where they are sent from."""
        try:
            if self._collected is not None:
                self._collected.check()
                return
            for place, (_, parameter, group) in enumerate(self._trained.trained):
                if parameter.grad is not None:
                    self._outgoing.write(place, self._factor(group))
        finally:
            self._factors = None

    def _exchange(self, slot: Slot) -> None:
        with torch.no_grad():
            if not self._waits:
                slot.push()
                self._trained.take(self._worker.pull(out=self._trained.snapshot))
                return
            snapshot = slot.push_pull(out=self._trained.snapshot)
            refused: GradientRefused | None = None
            try:
                self._worker.flush()  # at once, unless it was refused or is not on the broker's disk yet
            except GradientRefused as error:  # the parameters are as good as ever
                refused = error
            self._trained.take(snapshot)
            if refused is not None:
                raise refused


def _number(loss: Any) -> float | None:
    if isinstance(loss, torch.Tensor):
        loss = loss.detach()
    return None if loss is None else float(loss)
