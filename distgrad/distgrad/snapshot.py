"""What a fetch brings its caller: one version of the parameters, in the caller's own memory."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from distgrad.layout import Layout
from distgrad.wire import State


class Snapshot:
    """One consistent version of the parameters.

    Parameters
    ----------
    layout : Layout
        What the arenas hold.
    arenas : list of ndarray, 1-D
        The memory behind `parameters`, one array per dtype.
    state : State
        Its full name: incarnation, generation, version.
    like : nest, optional
        A nest whose namedtuples `parameters` takes over.
    is_lent : bool
        Whether the memory is the broker's: read-only, and valid until the worker's next push or pull.
    """

    def __init__(
        self,
        layout: Layout,
        arenas: list[np.ndarray[Any, Any]],
        state: State,
        like: Any = None,
        *,
        is_lent: bool = False,
    ) -> None:
        self.layout = layout
        self.arenas = arenas
        self.state = state
        self.like = like
        self.is_lent = is_lent

    @cached_property
    def parameters(self) -> Any:
        """The nest as it was set, in arrays of the caller's own if they are not lent; a namedtuple is a dict."""
        return self.layout.nest(self.layout.views(self.arenas), like=self.like)

    @property
    def version(self) -> int:
        """Updates that had been applied."""
        return self.state.version

    def shaped_like(self, like: Any) -> Snapshot:
        """Give the same arrays in the nest of another object.

        Parameters
        ----------
        like : nest
            Of the same layout; its namedtuples are taken over.

        Returns
        -------
        Snapshot
            Shares the memory of this one.
        """
        return Snapshot(self.layout, self.arenas, self.state, like, is_lent=self.is_lent)

    def __repr__(self) -> str:
        return f"Snapshot(version={self.version}, generation={self.state.generation}, leaves={len(self.layout.leaves)})"
