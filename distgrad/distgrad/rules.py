"""Update rules as values: what an optimizer is called, its numbers, and which kernel runs it.

A rule holds no array and does no arithmetic on one. It names a kernel of `distgrad.kernels` (or of
`distgrad.blocked`, which has the same ones) and gives the constants for one update. With ``s`` = 1
for descent and -1 for ascent, the kernels are::

    step      p <- p - n0 g                                              n = (s lr)
    decay     p <- p - n1 (n0 g + n2 p)                                  n = (s, lr, wd)
    momentum  d = n0 g + n2 p;  b <- n3 b + n4 d;  p <- p - n1 b         n = (s, lr, wd, momentum, 1 - dampening)
    nesterov  the same, but                        p <- p - n1 (d + n3 b)
    adam      d = n2 g + n3 p;  m <- m + n5 (d - m);  v <- n6 v + n7 d d
              p <- n4 p - n0 m / (n1 sqrt(v) + n8)

These are the formulas of ``torch.optim`` (SGD, Adam and AdamW as of torch 2.13), term by term, and so
the results agree to rounding. Adam is Kingma & Ba 2015, algorithm 1; AdamW is Loshchilov & Hutter
2019, algorithm 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from .arrays import largest
from .errors import ConfigError

_LARGEST_LR = 1e30  # float32 must hold it
_SMALLEST_EPS = 1e-30  # likewise; with 0, an element that never had a gradient would become 0 / 0


def state_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Tell in which type a rule keeps its state and computes.

    Parameters
    ----------
    dtype : dtype_like
        The parameters' type.

    Returns
    -------
    dtype
        float32 for parameters of 16 bits, otherwise the same type.
    """
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def plain_numbers(sign: float) -> tuple[float, ...]:
    """Give the constants of ``step`` without a rule: the gradient is the step.

    Parameters
    ----------
    sign : float
        1 for descent, -1 for ascent.

    Returns
    -------
    tuple of float
        The kernel's constants.
    """
    return (sign,)


@dataclass(frozen=True)
class Rule:
    """What every rule has.

    Attributes
    ----------
    name : str
        As in settings: ``"sgd"``, ``"adam"``, ``"adamw"``.
    """

    name: ClassVar[str] = ""
    _ranges: ClassVar[dict[str, tuple[float, float, str]]] = {}

    def __post_init__(self) -> None:
        for field, (low, high, text) in self._ranges.items():
            value = getattr(self, field)
            if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
                raise ConfigError(f"{self.name}: {field} must be a number, {text}, got {value!r}")
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if not low <= number <= high:
                raise ConfigError(f"{self.name}: {field} must be {text}, got {value!r}")
            object.__setattr__(self, field, number)

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        raise NotImplementedError

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state arrays, each as large as the parameters."""
        raise NotImplementedError

    @property
    def varies(self) -> bool:
        """Whether the constants differ from one update to the next."""
        raise NotImplementedError

    def numbers(self, sign: float, step: int) -> tuple[float, ...]:
        """Give the kernel's constants for one update.

        Parameters
        ----------
        sign : float
            1 for descent, -1 for ascent.
        step : int
            Number of the update since the state was reset, from 1.

        Returns
        -------
        tuple of float
            Constants in the kernel's order; always equally many.
        """
        return self._numbers(sign, step)

    def limit(self, dtype: DTypeLike) -> float:
        """Give the largest absolute value of a gradient that keeps state and step finite.

        Parameters
        ----------
        dtype : dtype_like
            The parameters' type.

        Returns
        -------
        float
            At most the largest finite number of the type. Decaying parameters have as much room again.
        """
        own = largest(np.dtype(dtype))
        return min(own, self._limit(own, largest(state_dtype(dtype))))

    def settings(self) -> dict[str, float | bool]:
        """List the rule's numbers.

        Returns
        -------
        dict
            Everything that the constructor takes.
        """
        return dataclasses.asdict(self)

    def replace(self, **numbers: Any) -> Self:
        """Make a rule with some numbers changed.

        Parameters
        ----------
        **numbers : float or bool
            Settings by name.

        Returns
        -------
        Rule
            A new rule of the same class.

        Raises
        ------
        ConfigError
            If there is no such setting, or its value is out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in numbers:
            if name not in known:
                raise ConfigError(f"{self.name} has no setting {name!r}; it has {', '.join(known)}")
        return dataclasses.replace(self, **numbers)

    def _numbers(self, sign: float, step: int) -> tuple[float, ...]:
        raise NotImplementedError

    def _limit(self, own: float, state: float) -> float:
        """Limit |g|, given the largest numbers of the parameters' and of the state's type."""
        raise NotImplementedError


_NON_NEGATIVE = (0.0, _LARGEST_LR, f"from 0 to {_LARGEST_LR:g}")
_FRACTION = (0.0, math.nextafter(1.0, 0.0), "at least 0 and less than 1")


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent, as ``torch.optim.SGD``.

    Parameters
    ----------
    lr : float
        Learning rate, from 0 to 1e30.
    momentum : float, default 0.0
        At least 0 and less than 1.
    dampening : float, default 0.0
        From 0 to 1: the buffer takes ``1 - dampening`` of each gradient, all of the first.
    nesterov : bool, default False
        Needs momentum, and no dampening.
    weight_decay : float, default 0.0
        Added to the gradient, times the parameter.

    Raises
    ------
    ConfigError
        If a number is out of range.

    Examples
    --------
    >>> SGD(lr=0.1, momentum=0.9).slots
    ('momentum_buffer',)
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    name: ClassVar[str] = "sgd"
    _ranges: ClassVar[dict[str, tuple[float, float, str]]] = {
        "lr": _NON_NEGATIVE,
        "momentum": _FRACTION,
        "dampening": (0.0, 1.0, "from 0 to 1"),
        "weight_decay": _NON_NEGATIVE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.nesterov, (bool, np.bool_)):
            raise ConfigError(f"sgd: nesterov must be true or false, got {self.nesterov!r}")
        object.__setattr__(self, "nesterov", bool(self.nesterov))
        if self.nesterov and (not self.momentum or self.dampening):
            raise ConfigError("sgd: nesterov needs a momentum above 0 and a dampening of 0")

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        if self.momentum:
            return "nesterov" if self.nesterov else "momentum"
        return "decay" if self.weight_decay else "step"

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state arrays, each as large as the parameters."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def varies(self) -> bool:
        """Whether the constants differ from one update to the next."""
        return bool(self.momentum and self.dampening)

    def _numbers(self, sign: float, step: int) -> tuple[float, ...]:
        if self.momentum:
            # torch starts the buffer with the whole first gradient.
            taken = 1.0 if step == 1 else 1.0 - self.dampening
            return (sign, self.lr, self.weight_decay, self.momentum, taken)
        return (sign, self.lr, self.weight_decay) if self.weight_decay else (sign * self.lr,)

    def _limit(self, own: float, state: float) -> float:
        # The buffer of equal gradients tends to g / (1 - momentum), and the step to lr times that. Half of
        # what then fits, wherever something is added; anything finite where nothing is.
        room = (1.0 - self.momentum) * (0.5 if self.momentum or self.weight_decay or self.lr > 1.0 else 1.0)
        return (
            min(state * room, own * room / self.lr) if self.momentum and self.lr else state * room / max(self.lr, 1.0)
        )


@dataclass(frozen=True)
class Adam(Rule):
    """Adam, as ``torch.optim.Adam``: weight decay is added to the gradient.

    Parameters
    ----------
    lr : float, default 1e-3
        Learning rate, from 0 to 1e30.
    beta1, beta2 : float, default 0.9 and 0.999
        Decay of the two moments; at least 0 and less than 1.
    eps : float, default 1e-8
        Added to the denominator; from 1e-30 to 1e30.
    weight_decay : float, default 0.0
        From 0 to 1e30.

    Raises
    ------
    ConfigError
        If a number is out of range.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    name: ClassVar[str] = "adam"
    _ranges: ClassVar[dict[str, tuple[float, float, str]]] = {
        "lr": _NON_NEGATIVE,
        "beta1": _FRACTION,
        "beta2": _FRACTION,
        "eps": (_SMALLEST_EPS, _LARGEST_LR, f"from {_SMALLEST_EPS:g} to {_LARGEST_LR:g}"),
        "weight_decay": _NON_NEGATIVE,
    }

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return "adam"

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state arrays, each as large as the parameters."""
        return ("exp_avg", "exp_avg_sq")

    @property
    def varies(self) -> bool:
        """Whether the constants differ from one update to the next."""
        return True

    def _numbers(self, sign: float, step: int) -> tuple[float, ...]:
        step_size = self.lr / (1.0 - self.beta1**step)
        root = 1.0 / math.sqrt(1.0 - self.beta2**step)
        added, kept = self._decay()
        return (step_size, root, sign, added, kept, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.eps)

    def _limit(self, own: float, state: float) -> float:
        # One gradient whose square overflows would make the second moment infinite for ever.
        return 0.5 * math.sqrt(state)

    def _decay(self) -> tuple[float, float]:
        """Return what of the parameter is added to the gradient, and what is kept of it."""
        return self.weight_decay, 1.0


@dataclass(frozen=True)
class AdamW(Adam):
    """AdamW, as ``torch.optim.AdamW``: weight decay shrinks the parameter itself.

    Parameters
    ----------
    lr, beta1, beta2, eps : float
        As for `Adam`.
    weight_decay : float, default 0.01
        From 0 to 1e30; times the learning rate.

    Raises
    ------
    ConfigError
        If a number is out of range.
    """

    weight_decay: float = 0.01

    name: ClassVar[str] = "adamw"

    def _decay(self) -> tuple[float, float]:
        return 0.0, 1.0 - self.lr * self.weight_decay


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (SGD, Adam, AdamW)}
"""Every rule by its name in settings."""


def rule_from_settings(name: str, settings: Mapping[str, Any]) -> Rule:
    """Make a rule from a name and numbers, as configuration files and options give them.

    Parameters
    ----------
    name : str
        A key of `RULES`.
    settings : mapping
        The rule's own settings; what is left out has its default.

    Returns
    -------
    Rule
        The rule.

    Raises
    ------
    ConfigError
        If the rule, or a setting, is not known, out of range, or missing.
    """
    kind = RULES.get(name)
    if kind is None:
        raise ConfigError(f"optimizer must be one of {', '.join(RULES)}, got {name!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for setting in settings:
        if setting not in fields:
            raise ConfigError(f"{name} has no setting {setting!r}; it has {', '.join(fields)}")
    for setting, field in fields.items():
        if field.default is dataclasses.MISSING and setting not in settings:
            raise ConfigError(f"{name} needs {setting}")
    return kind(**settings)
