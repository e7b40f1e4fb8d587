"""Where each array of the parameters lies: paths, shapes and dtypes, and one arena per dtype.

A layout is a value. Broker and worker agree on one by its fingerprint; after that a gradient is
nothing but the bytes of its arenas.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from . import layout_frame, nests
from .arrays import DTYPES, SMALL_BYTES, TRAINABLE, aligned_empty, as_array, carried_dtype, joined_as_is
from .errors import LayoutError
from .layout_frame import MAX_FRAME_BYTES, Spec
from .leaves import Arena, Leaf, check_absent, checked, is_as_stored, put
from .nests import Nest, Structure

__all__ = ["DTYPES", "MAX_FRAME_BYTES", "TRAINABLE", "Arena", "Layout", "Leaf", "aligned_empty"]


class Layout:
    """Paths, shapes and dtypes of all leaves, and where they lie in their arenas.

    Made by `of` or `from_frame`. It never changes; two are equal if their leaves are.

    Parameters
    ----------
    structure : Structure
        How the leaves nest.
    specs : sequence of Spec
        Name, shape and dtype of each leaf, in order; checked by the caller.

    Attributes
    ----------
    leaves : tuple of Leaf
        Every array, in order.
    structure : Structure
        How they nest.
    arenas : tuple of Arena
        One per dtype that occurs, trainable ones first.
    n_trainable_arenas : int
        How many of them are trained.
    fingerprint : int
        64 bits that name the layout (``docs/wire.md``).
    gradient_bytes, parameter_bytes : int
        Bytes of the trainable arenas, and of all.
    """

    __slots__ = (
        "_frame",
        "_index",
        "_small_shapes",
        "arenas",
        "fingerprint",
        "gradient_bytes",
        "leaves",
        "n_trainable_arenas",
        "parameter_bytes",
        "structure",
    )

    def __init__(self, structure: Structure, specs: Sequence[Spec]) -> None:
        present = {dtype for _, _, dtype in specs}
        order = sorted(present, key=lambda dtype: DTYPES.index(dtype.name))
        arena_of = {dtype: number for number, dtype in enumerate(order)}
        filled = [0] * len(order)
        leaves = []
        for name, shape, dtype in specs:
            arena, size = arena_of[dtype], math.prod(shape)
            leaves.append(Leaf(name, shape, dtype, arena, filled[arena], size))
            filled[arena] += size
        self.leaves = tuple(leaves)
        self.structure = structure
        self.arenas = tuple(Arena(d, n, d.name in TRAINABLE) for d, n in zip(order, filled, strict=True))
        self.n_trainable_arenas = sum(arena.trainable for arena in self.arenas)
        sizes = [arena.size * arena.dtype.itemsize for arena in self.arenas]
        self.gradient_bytes, self.parameter_bytes = sum(sizes[: self.n_trainable_arenas]), sum(sizes)
        self.fingerprint = layout_frame.fingerprint(specs)
        # Where all leaves are of one dtype and mostly small: a call for each would cost more than the copying.
        is_small = self.n_trainable_arenas == len(sizes) == 1 and sizes[0] <= SMALL_BYTES * len(leaves)
        self._small_shapes = [leaf.shape for leaf in leaves] if is_small else []
        self._frame: bytes | None = None
        self._index: dict[str, int] | None = None

    @classmethod
    def of(cls, nest: Nest) -> Layout:
        """Lay out parameters.

        Parameters
        ----------
        nest : nest of array_like
            At least one array. Dtypes: `DTYPES`.

        Returns
        -------
        Layout
            The layout, with leaves in the order in which they were met.

        Raises
        ------
        LayoutError
            If there is no array, two paths collide, a key is no string or integer, or a leaf is no
            array of a dtype that is carried.
        """
        structure, names, values = nests.dissect(nest)
        if not names:
            raise LayoutError("parameters hold no array")
        specs = []
        for name, value in zip(names, values, strict=True):
            array = as_array(value, name)
            dtype = carried_dtype(array.dtype)
            if dtype is None:
                raise LayoutError(f"leaf {name!r} has dtype {array.dtype}; allowed: {', '.join(DTYPES)}", leaf=name)
            specs.append((name, array.shape, dtype))
        return cls(structure, specs)

    @classmethod
    def from_frame(cls, frame: bytes | memoryview) -> Layout:
        """Read a layout that a peer sent.

        Parameters
        ----------
        frame : bytes-like
            A layout frame (``docs/wire.md``). Nothing in it is trusted.

        Returns
        -------
        Layout
            The layout. Its arenas may still be larger than any memory: check `parameter_bytes`.

        Raises
        ------
        MalformedMessage
            If the frame is anything else than a whole, consistent layout.
        """
        return cls(*layout_frame.read(frame))

    def to_frame(self) -> bytes:
        """Encode the layout for the wire; made once and kept.

        Returns
        -------
        bytes
            A layout frame (``docs/wire.md``).

        Raises
        ------
        LayoutError
            If it is larger than a frame may be.
        """
        if self._frame is None:
            self._frame = layout_frame.write([leaf[:3] for leaf in self.leaves], self.structure)
        return self._frame

    def flatten(self, nest: Nest) -> list[NDArray[Any]]:
        """Take the leaves out of a nest of exactly this layout.

        Parameters
        ----------
        nest : nest of array_like
            Same paths, shapes and dtypes.

        Returns
        -------
        list of ndarray
            The leaves in order; arrays are not copied.

        Raises
        ------
        LayoutError
            If a leaf is missing, not known, or has another shape or dtype.
        """
        arrays = []
        for leaf, value in zip(self.leaves, self._gather(nest), strict=True):
            array = checked(leaf, value)
            if array.dtype != leaf.dtype and carried_dtype(array.dtype) != leaf.dtype:
                raise LayoutError(f"leaf {leaf.name!r} must be {leaf.dtype}, got {array.dtype}", leaf=leaf.name)
            arrays.append(array)
        return arrays

    def pack(self, nest: Nest) -> list[NDArray[Any]]:
        """Copy parameters into new arenas.

        Parameters
        ----------
        nest : nest of array_like
            Same paths, shapes and dtypes.

        Returns
        -------
        list of ndarray
            One array per arena; all are the caller's.

        Raises
        ------
        LayoutError
            As `flatten`.
        """
        arrays = self.flatten(nest)
        arenas = [aligned_empty(arena.size, arena.dtype) for arena in self.arenas]
        for view, array in zip(self.views(arenas), arrays, strict=True):
            view[...] = array
        return arenas

    def pack_gradient(self, nest: Nest, out: Sequence[NDArray[Any]] | None = None) -> list[NDArray[Any]]:
        """Copy a gradient into trainable arenas, cast to the parameters' dtypes.

        Parameters
        ----------
        nest : nest of array_like
            A leaf for every trainable path, in any order. Leaves that are not trained must be
            absent, ``None`` or empty. Any dtype that casts as ``same_kind``.
        out : sequence of ndarray, optional
            Trainable arenas to fill; new ones are made without.

        Returns
        -------
        list of ndarray
            The filled arenas.

        Raises
        ------
        LayoutError
            If a leaf is missing, not known, or has another shape or no fitting dtype. `out` may then
            be written in part.
        """
        values = self._gather(nest)
        if self._small_shapes:
            target = None if out is None else out[0]
            if (joined := joined_as_is(values, self._small_shapes, self.arenas[0].dtype, target)) is not None:
                return [joined]
        arenas = self.new_gradient() if out is None else list(out)
        for leaf, value in zip(self.leaves, values, strict=True):
            if leaf.arena < self.n_trainable_arenas:
                put(leaf, value, arenas[leaf.arena])
            else:
                check_absent(leaf, value)
        return arenas

    def lend_gradient(self, nest: Nest, least_bytes: int) -> list[NDArray[Any]]:
        """See a gradient as pieces, of which the large ones are the caller's own memory.

        Parameters
        ----------
        nest : nest of array_like
            As for `pack_gradient`, whose errors these are.
        least_bytes : int
            What a leaf must have not to be copied; it also has to be contiguous, and of the parameter's dtype.

        Returns
        -------
        list of ndarray, 1-D
            The trained arenas, one after the other, each in one piece or several.
        """
        if self._small_shapes or self.gradient_bytes < least_bytes:
            return self.pack_gradient(nest)
        arenas = self.new_gradient()
        pieces: list[list[NDArray[Any]]] = [[] for _ in arenas]
        begun = [0] * len(arenas)  # where what is copied and not among the pieces yet begins
        for leaf, value in zip(self.leaves, self._gather(nest), strict=True):
            if leaf.arena >= self.n_trainable_arenas:
                check_absent(leaf, value)
            elif leaf.size * leaf.dtype.itemsize < least_bytes or not is_as_stored(leaf, value):
                put(leaf, value, arenas[leaf.arena])
            else:
                if begun[leaf.arena] < leaf.offset:
                    pieces[leaf.arena].append(arenas[leaf.arena][begun[leaf.arena] : leaf.offset])
                pieces[leaf.arena].append(value.reshape(-1))
                begun[leaf.arena] = leaf.offset + leaf.size
        for arena, its_pieces, start in zip(arenas, pieces, begun, strict=True):
            if start < arena.size:
                its_pieces.append(arena[start:])
        return [piece for its_pieces in pieces for piece in its_pieces]

    def new_gradient(self) -> list[NDArray[Any]]:
        """Make uninitialised arenas for a gradient.

        Returns
        -------
        list of ndarray
            One 64-byte aligned array per trainable arena.
        """
        return [aligned_empty(arena.size, arena.dtype) for arena in self.arenas[: self.n_trainable_arenas]]

    def views(self, arenas: Sequence[NDArray[Any]], *, writeable: bool = True) -> list[NDArray[Any]]:
        """See arenas as leaves.

        Parameters
        ----------
        arenas : sequence of ndarray
            One per arena of the layout.
        writeable : bool, default True
            Whether the views may be written to.

        Returns
        -------
        list of ndarray
            One view per leaf, in order.
        """
        if not writeable:
            arenas = [arena.view() for arena in arenas]
            for arena in arenas:
                arena.flags.writeable = False
        places = [(arenas[number][offset : offset + size], shape) for _, shape, _, number, offset, size in self.leaves]
        return [part if len(shape) == 1 else part.reshape(shape) for part, shape in places]

    def nest(self, leaves: Sequence[Any], like: Nest = None) -> Nest:
        """Put leaves back into the containers that they came in.

        Parameters
        ----------
        leaves : sequence
            One object per leaf, in order.
        like : nest, optional
            Has the namedtuple classes to use, at the same paths. Without, a namedtuple becomes a
            dict.

        Returns
        -------
        nest
            New containers around the same leaves.
        """
        return nests.build(self.structure, leaves, like)

    def locate(self, arena: int, index: int) -> Leaf:
        """Tell whose element it is.

        Parameters
        ----------
        arena : int
            Number of the arena.
        index : int
            Element within it, 0 <= index < size.

        Returns
        -------
        Leaf
            The leaf that holds the element.
        """
        group = [leaf for leaf in self.leaves if leaf.arena == arena and leaf.size]
        return group[bisect_right(group, index, key=lambda leaf: leaf.offset) - 1]

    def parts(self, n_arenas: int | None = None, part_bytes: int = 1 << 20) -> list[tuple[int, int, int]]:
        """Cut the arenas into parts of whole elements.

        Parameters
        ----------
        n_arenas : int, optional
            How many arenas, from the first; all without. A gradient has `n_trainable_arenas`.
        part_bytes : int, default 1 MiB
            Largest part, at least 8.

        Returns
        -------
        list of (int, int, int)
            Arena, first element, and the element behind the last. Empty arenas have no part.
        """
        return [
            (number, start, min(start + part_bytes // arena.dtype.itemsize, arena.size))
            for number, arena in enumerate(self.arenas[:n_arenas])
            for start in range(0, arena.size, part_bytes // arena.dtype.itemsize)
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.fingerprint == other.fingerprint and self.leaves == other.leaves

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"<Layout {self.fingerprint:016x}: {len(self.leaves)} leaves, {self.parameter_bytes} bytes>"

    def _gather(self, nest: Nest) -> list[Any]:
        """Return the nest's leaves in order, ``None`` where one is absent; refuse leaves not known."""
        values: list[Any] = [None] * len(self.leaves)
        if nests.gather(self.structure, nest, values):
            return values
        _, names, found = nests.dissect(nest)
        if self._index is None:
            self._index = {leaf.name: number for number, leaf in enumerate(self.leaves)}
        values = [None] * len(self.leaves)
        for name, value in zip(names, found, strict=True):
            number = self._index.get(name)
            if number is not None:
                values[number] = value
            elif value is not None:
                raise LayoutError(nests.stranger(name, nest, list(self._index)), leaf=name)
        return values
