"""A model's parameters as leaves of the broker's: whose memory is shared, and whose is copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from distgrad.errors import LayoutError, StateError
from distgrad.snapshot import Snapshot
from distgrad_worker.torch.tensors import Array, as_array, as_tensor, check_trainable, name_of


class Trained(NamedTuple):
    """A parameter under the name that it has at the broker; `group` is the index of its parameter group."""

    name: str
    parameter: torch.nn.Parameter
    group: int


def trained_of(groups: Iterable[dict[str, Any]]) -> list[Trained]:
    """Name the parameters that are trained.

    Parameters
    ----------
    groups : iterable of dict
        The parameter groups of an optimizer, ``param_names`` included if there are names.

    Returns
    -------
    list of Trained
        In order, without those that are frozen. Without names a parameter's name is its position among all, frozen
        ones included, as in an optimizer's ``state_dict``.

    Raises
    ------
    LayoutError
        If there is none, two have one name, two share memory, or one cannot be trained.
    """
    found: list[Trained] = []
    names: set[str] = set()
    position = 0
    for group, settings in enumerate(groups):
        given = settings.get("param_names")
        for place, parameter in enumerate(settings["params"]):
            name = str(position) if given is None else str(given[place])
            position += 1
            if name in names:
                raise LayoutError(f"two parameters are called {name!r}", leaf=name)
            names.add(name)
            if parameter.requires_grad:
                check_trainable(name, parameter)
                found.append(Trained(name, parameter, group))
    if not found:
        raise LayoutError("there is no parameter that requires a gradient")
    _check_apart(found)
    return found


class Parameters:
    """The trained parameters of a model, and the memory that the broker's come into.

    A parameter that lies on the CPU, one number behind the other, becomes a view of the memory that pulls are received
    into, so that a pull changes it without another copy. Others (on a GPU, of another memory format, shared with other
    processes) are copied to after each pull; for a GPU's that memory is pinned.

    Parameters
    ----------
    trained : sequence of Trained
        The parameters.

    Attributes
    ----------
    trained : list of Trained
        The same.
    snapshot : Snapshot
        The version that the model has.
    """

    def __init__(self, trained: Sequence[Trained]) -> None:
        self.trained = list(trained)
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._is_on_gpu = any(parameter.device.type != "cpu" for _, parameter, _ in trained)
        self._snapshot: Snapshot | None = None

    @property
    def snapshot(self) -> Snapshot:
        """The version that the model has."""
        if self._snapshot is None:
            raise StateError("the broker's parameters were not pulled yet")
        return self._snapshot

    def offered(self) -> dict[str, Array]:
        """Give the model's values, for an offer.

        Returns
        -------
        dict of str to ndarray
            One array for each trained parameter; of the same memory where it can be.
        """
        return {name: as_array(parameter.detach().cpu()) for name, parameter, _ in self.trained}

    def take(self, snapshot: Snapshot) -> None:
        """Have the model show a version.

        Parameters
        ----------
        snapshot : Snapshot
            From a pull, into the memory of the last one if possible. It belongs to this object from now on.

        Raises
        ------
        LayoutError
            If it has not just the parameters that this model trains.
        """
        former = self._snapshot
        if (
            former is None
            or snapshot.layout.fingerprint != former.layout.fingerprint
            or any(new is not old for new, old in zip(snapshot.arenas, former.arenas, strict=True))
        ):
            snapshot = self._bind(snapshot)
        self._snapshot = snapshot
        for parameter, source in self._copied:
            parameter.copy_(source, non_blocking=True)
        if self._is_on_gpu:
            torch.cuda.synchronize()
        for _, parameter, _ in self.trained:
            # What a backward pass has saved of the former version must not be taken for this one.
            torch.autograd.graph.increment_version(parameter)

    def _bind(self, snapshot: Snapshot) -> Snapshot:
        layout = snapshot.layout
        places = {leaf.name: place for place, leaf in enumerate(layout.leaves)}
        for name, parameter, _ in self.trained:
            if name not in places:
                raise LayoutError(f"the broker's parameters have no {name!r}, which this model trains", leaf=name)
            leaf = layout.leaves[places[name]]
            if leaf.shape != tuple(parameter.shape) or leaf.dtype.name != name_of(parameter.dtype):
                raise LayoutError(
                    f"the broker's {name!r} is {leaf.dtype.name} of shape {leaf.shape}, this model's is "
                    f"{name_of(parameter.dtype)} of shape {tuple(parameter.shape)}",
                    leaf=name,
                )
        own = {name for name, _, _ in self.trained}
        for leaf in layout.leaves:
            if leaf.arena < layout.n_trainable_arenas and leaf.name not in own:
                raise LayoutError(
                    f"the broker trains {leaf.name!r}, which this model has not, or has frozen", leaf=leaf.name
                )
        if self._is_on_gpu:
            snapshot = Snapshot(layout, [_pinned(arena) for arena in snapshot.arenas], snapshot.state, snapshot.like)
        views = layout.views(snapshot.arenas)
        self._copied = []
        for name, parameter, _ in self.trained:
            source = as_tensor(views[places[name]])
            if parameter.device.type == "cpu" and parameter.is_contiguous() and not parameter.is_shared():
                parameter.data = source
            else:
                self._copied.append((parameter.data, source))
        return snapshot


def _pinned(arena: Array) -> Array:
    """Copy an arena into memory that a GPU can read from by itself."""
    pinned: Array = torch.empty(arena.nbytes, dtype=torch.uint8, pin_memory=True).numpy().view(arena.dtype)
    pinned[:] = arena
    return pinned


def _check_apart(trained: Sequence[Trained]) -> None:
    """Refuse parameters of which two share memory: apart from each other they would be trained as two."""
    spans = sorted(
        (
            (parameter.device, parameter.data_ptr(), name, parameter)
            for name, parameter, _ in trained
            if parameter.numel()
        ),
        key=lambda span: (str(span[0]), span[1]),
    )
    end, owner, device = 0, "", None
    for where, low, name, parameter in spans:
        if where == device and low < end:
            raise LayoutError(
                f"parameters {owner!r} and {name!r} share memory: tie them by using one Parameter in both places",
                leaf=name,
            )
        reach = sum(stride * (length - 1) for stride, length in zip(parameter.stride(), parameter.shape, strict=True))
        high = low + (reach + 1) * parameter.element_size()
        if where != device or high > end:
            end, owner, device = high, name, where
