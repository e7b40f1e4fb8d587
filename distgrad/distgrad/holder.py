"""The one owner of parameters, optimizer state and version. It has no thread, no socket and no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from numpy.typing import DTypeLike, NDArray

from . import nests, update
from .arrays import lasting_empty
from .errors import ConfigError, NoParameters
from .executor import Executor
from .layout import Layout
from .modes import SIGNS, checked_mode
from .nests import Nest
from .reduction import Reduction
from .rules import Rule
from .storage import Storage
from .update import Plan, cover

Array: TypeAlias = NDArray[Any]


class ParameterHolder:
    """Holds parameters, and applies gradients to them one at a time.

    Not thread-safe: one owner calls it. Large updates are shared with threads of its `Executor`,
    which are idle between calls; `close` ends them.

    Parameters
    ----------
    mode : str, default "descent"
        ``"descent"`` or ``"ascent"``, in any case.
    rule : Rule, optional
        Without, a gradient is the step: ``p - g`` or ``p + g``.
    threads : int, optional
        Passed on to `Executor`.
    executor : {"numba", "numpy"}, optional
        Passed on to `Executor`.

    Attributes
    ----------
    layout : Layout or None
        Of the current parameters.
    storage : Storage or None
        The current version of the parameters. Arenas of integers are shared between versions.
    version : int
        Updates applied since the holder was made.
    steps : int
        Updates applied since the rule's state was reset.
    mode : str
        ``"descent"`` or ``"ascent"``.
    rule : Rule or None
        The rule.
    state : dict of str to list of ndarray
        The rule's state: for each slot an array per trainable arena (float32 for 16 bits).
    """

    def __init__(
        self,
        mode: str = "descent",
        rule: Rule | None = None,
        *,
        threads: int | None = None,
        executor: str | None = None,
    ) -> None:
        self.mode = checked_mode(mode)
        self.rule = _checked_rule(rule)
        self.layout: Layout | None = None
        self.storage: Storage | None = None
        self.version = 0
        self.steps = 0
        self.state: dict[str, list[Array]] = {}
        self._executor = Executor(threads, executor)
        self._like: Nest = None
        self._plans: list[Plan] = []
        self._single: Plan | None = None
        # Made when gradients are first combined: it needs the memory of one.
        self._reduction: Reduction | None = None

    @property
    def executor(self) -> str:
        """``"numba"`` or ``"numpy"``: both are deterministic, but they may differ by rounding."""
        return self._executor.kind

    def set_nest(self, nest: Nest, *, adopt: bool = False) -> None:
        """Take new parameters; reset the rule's state and keep the version.

        Parameters
        ----------
        nest : nest of array_like
            The parameters.
        adopt : bool, default False
            Use the arrays themselves, and change them in place, instead of a copy.

        Raises
        ------
        LayoutError
            If they cannot be laid out or adopted. The former parameters then stay.
        """
        layout = Layout.of(nest)
        storage = Storage.adopt(layout, nest) if adopt else Storage(layout, layout.pack(nest))
        self._set(layout, storage, nests.skeleton(nest))

    def set_arenas(self, layout: Layout, arenas: Sequence[Array]) -> None:
        """Take new parameters in arenas; reset the rule's state and keep the version.

        Parameters
        ----------
        layout : Layout
            Their layout.
        arenas : sequence of ndarray
            One per arena of the layout, which are the holder's from now on.

        Raises
        ------
        ConfigError
            If they do not fit the layout, or cannot be written. The former parameters then stay.
        """
        if len(arenas) != len(layout.arenas):
            raise ConfigError(f"the layout has {len(layout.arenas)} arenas, got {len(arenas)}")
        for number, (spec, arena) in enumerate(zip(layout.arenas, arenas, strict=True)):
            if arena.shape != (spec.size,) or arena.dtype != spec.dtype or not arena.flags.carray:
                raise ConfigError(f"arena {number} must be {spec.size} contiguous, writeable elements of {spec.dtype}")
        self._set(layout, Storage(layout, arenas), None)

    def clear(self) -> None:
        """Take the parameters away, and the rule's state with them; keep the version."""
        self.layout = self.storage = self._like = self._single = self._reduction = None
        self._plans, self.state, self.steps = [], {}, 0

    def set_mode(self, mode: str) -> None:
        """Change the gradient change mode, from the next update on.

        Parameters
        ----------
        mode : str
            ``"descent"`` or ``"ascent"``, in any case.

        Raises
        ------
        InvalidMode
            If it is anything else.
        """
        self.mode = checked_mode(mode)
        self._prepare()

    def set_rule_numbers(self, **numbers: Any) -> None:
        """Change some of the rule's numbers, such as ``lr``, and keep its state.

        Parameters
        ----------
        **numbers : float or bool
            Settings of the rule.

        Raises
        ------
        ConfigError
            If there is no rule, it has no such setting, or a value is out of range.
        """
        if self.rule is None:
            raise ConfigError(f"there is no optimizer whose {', '.join(numbers)} could be set")
        self.replace_rule(self.rule.replace(**numbers))

    def replace_rule(self, rule: Rule | None) -> None:
        """Change the rule, from the next update on.

        Parameters
        ----------
        rule : Rule or None
            The new rule. One of the same class and with the same state arrays keeps the state;
            otherwise the state is reset.

        Raises
        ------
        ConfigError
            If it is no rule.
        """
        former, self.rule = self.rule, _checked_rule(rule)
        if type(former) is not type(self.rule) or tuple(self.state) != update.slots_of(self.rule):
            self._reset_state()
        self._prepare()

    def apply(self, gradient: Sequence[Array], *, spare: Storage | None = None) -> Storage | None:
        """Apply one gradient, whole or not at all.

        Parameters
        ----------
        gradient : sequence of ndarray
            1-D contiguous arrays of the arenas' dtypes that cover the trainable arenas in order; cut
            anywhere within an arena. They may be read-only.
        spare : Storage, optional
            From `new_spare`, or a former version that nobody reads any more. The next version is
            written into it, and the current one is left as it is. Without, the update is in place.

        Returns
        -------
        Storage or None
            The former version, which is the caller's now; ``None`` in place.

        Raises
        ------
        GradientRefused
            If the gradient does not cover the arenas, or holds a number that is not finite or too
            large for the rule. Parameters, state and version are untouched.
        NoParameters
            If there are none.
        ConfigError
            If `spare` is not a version of the current layout, or the parameters are adopted arrays.
        """
        storage = self._begin(spare)
        single = self._single
        # A small model in one part is the usual case and must cost microseconds: see docs/wire.md on parts.
        if single is not None and len(gradient) == 1 and update.is_whole(gradient[0], single):
            done = update.apply_single(single, gradient[0], storage, spare)
        else:
            done = update.apply_parts(self._plans, cover(self._plans, gradient), storage, spare, self._executor)
        if not done:
            raise update.refusal(storage.layout, self._plans, cover(self._plans, gradient))
        return self._end(storage, spare)

    def apply_sum(
        self, gradients: Sequence[Sequence[Array]], weights: Sequence[float], *, spare: Storage | None = None
    ) -> Storage | None:
        """Apply the weighted sum of some gradients as one update, whole or not at all.

        Parameters
        ----------
        gradients : sequence of sequence of ndarray
            At least one, in the order in which they are summed; each as for `apply`.
        weights : sequence of float
            One for each. See `Reduction.combine` for the arithmetic.
        spare : Storage, optional
            As for `apply`.

        Returns
        -------
        Storage or None
            As for `apply`.

        Raises
        ------
        GradientRefused
            If one does not cover the arenas, or the sum is not finite or too large for the rule.
        NoParameters, ConfigError
            As for `apply`.
        """
        storage = self._begin(spare)
        covers = [cover(self._plans, gradient) for gradient in gradients]
        if self._reduction is None:
            self._reduction = Reduction(storage.layout, self._executor)
        if spare is None or self.state:
            # The whole sum must be good before any of it is used up.
            return self.apply(self._reduction.combine(covers, weights), spare=spare)
        if not self._reduction.step(self._plans, covers, weights, storage, spare):
            total = self._reduction.combine(covers, weights)
            raise update.refusal(storage.layout, self._plans, cover(self._plans, total))
        return self._end(storage, spare)

    def check(self, gradient: Sequence[Array], *, before_sum: bool = False) -> None:
        """Find out whether a gradient could be applied, without applying it.

        Parameters
        ----------
        gradient : sequence of ndarray
            As for `apply`.
        before_sum : bool, default False
            Look only for what `apply_sum` would not find: what is not finite is not in any sum either.

        Raises
        ------
        GradientRefused
            If not.
        NoParameters
            If there are none.
        """
        storage, plans = self._begin(None), self._plans
        covered = cover(plans, gradient)
        is_told = before_sum and all(plan.is_open for plan in plans)
        if not (is_told or update.passes(plans, covered, self._executor)):
            raise update.refusal(storage.layout, plans, covered)

    def new_spare(self, empty: Callable[[int, DTypeLike], Array] = lasting_empty) -> Storage:
        """Make room for another version.

        Parameters
        ----------
        empty : callable, default `lasting_empty`
            Makes an array of a size and a dtype.

        Returns
        -------
        Storage
            The same integer arenas and new, uninitialised float arenas.

        Raises
        ------
        NoParameters
            If there are none.
        ConfigError
            If the parameters are adopted arrays, which are updated in place.
        """
        if self.storage is None or self.layout is None:
            raise NoParameters("no parameters were set")
        if self.storage.adopted is not None:
            raise ConfigError("adopted arrays are updated in place and have no other version")
        specs = self.layout.arenas[: self.layout.n_trainable_arenas]
        trained = [empty(spec.size, spec.dtype) for spec in specs]
        return Storage(self.layout, [*trained, *self.storage.arenas[len(trained) :]])

    def restore_state(self, state: Mapping[str, Sequence[Array]], steps: int) -> None:
        """Put the rule's state back that belongs to the current parameters.

        Parameters
        ----------
        state : mapping of str to sequence of ndarray
            For each slot an array per trainable arena, which are the holder's from now on.
        steps : int
            Updates since it was reset.

        Raises
        ------
        ConfigError
            If it does not fit the rule or the layout.
        """
        for slot, own in self.state.items():
            given = state.get(slot, ())
            if [(array.size, array.dtype) for array in given] != [(array.size, array.dtype) for array in own]:
                raise ConfigError(f"the state {slot!r} does not fit the rule and the parameters")
        if state.keys() != self.state.keys():
            raise ConfigError(f"the rule has the state {', '.join(self.state)}, got {', '.join(state)}")
        self.state = {slot: list(state[slot]) for slot in self.state}
        self.steps = steps
        self._prepare()

    def nest(self, *, copy: bool = True) -> Nest:
        """Return the parameters in the nest that they were set in.

        Parameters
        ----------
        copy : bool, default True
            Copy every array. Otherwise they are read-only views of the current version.

        Returns
        -------
        nest or None
            ``None`` if there are no parameters.
        """
        if self.storage is None or self.layout is None:
            return None
        leaves = self.storage.leaves()
        return self.layout.nest([leaf.copy() for leaf in leaves] if copy else leaves, self._like)

    def close(self) -> None:
        """End the executor's threads. The holder stays usable."""
        self._executor.close()

    def _begin(self, spare: Storage | None) -> Storage:
        """Check what an update is made of, and bring the rule's constants up to date."""
        storage = self.storage
        if storage is None:
            raise NoParameters("no parameters were set that the gradient could be applied to")
        if spare is not None and (spare.layout is not self.layout or spare is storage or storage.adopted is not None):
            raise ConfigError("spare is not another version of the current parameters: make one with new_spare()")
        if self.rule is not None and self.rule.varies:
            update.renew_numbers(self._plans, self.rule, SIGNS[self.mode], self.steps + 1)
        return storage

    def _end(self, storage: Storage, spare: Storage | None) -> Storage | None:
        """Count an update, and give the former version away."""
        self.steps += 1
        self.version += 1
        self.storage = storage if spare is None else spare
        return None if spare is None else storage

    def _set(self, layout: Layout, storage: Storage, like: Nest) -> None:
        self.layout, self.storage, self._like, self._reduction = layout, storage, like, None
        self._reset_state()
        self._prepare()

    def _reset_state(self) -> None:
        self.steps = 0
        self.state = {} if self.layout is None else update.make_state(self.layout, self.rule)

    def _prepare(self) -> None:
        """Bind kernels and constants, so that an update has nothing left to look up."""
        if self.layout is None or self.storage is None:
            return
        state = list(self.state.values())
        plans = update.make_plans(self.storage, state, self.rule, SIGNS[self.mode], self.steps + 1, self._executor)
        self._plans = plans
        simple = len(plans) == 1 and not plans[0].split and self.storage.adopted is None
        self._single = plans[0] if simple else None


def _checked_rule(rule: object) -> Rule | None:
    if rule is None or isinstance(rule, Rule):
        return rule
    raise ConfigError(f"optimizer must be a rule such as distgrad.SGD(lr=0.1), got {rule!r}")
