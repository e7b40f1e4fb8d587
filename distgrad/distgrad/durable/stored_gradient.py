"""A gradient's numbers as the journal keeps them: raw, as on the wire, or in a layout of their own.

Within one process a gradient may be added before there are parameters, so that nothing tells yet how its numbers are to
be laid out. It is kept with its own names, shapes and dtypes. Nobody takes this encoding from the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrad import nests
from distgrad.arrays import as_array
from distgrad.codec import decode, encode, fill
from distgrad.layout import Layout
from distgrad.nests import Nest
from distgrad.wire import PART_BYTES, Gradient

EARLY = "early"
"""Encoding of a gradient that was added before there were parameters."""

_LENGTH_BYTES = 8


def early_parts(gradients: Nest) -> list[Any]:
    """Write down a gradient in a layout of its own.

    Parameters
    ----------
    gradients : nest of ndarray
        Of dtypes that are carried; leaves may be None.

    Returns
    -------
    list of buffers
        The payload: length and frame of the layout, then its arenas.

    Raises
    ------
    LayoutError
        If it has more leaves than a layout's frame can hold.
    """
    _, names, values = nests.dissect(gradients)
    given = {name: as_array(value, name) for name, value in zip(names, values, strict=True) if value is not None}
    if not given:
        return []
    layout = Layout.of(given)
    frame = layout.to_frame()
    head = len(frame).to_bytes(_LENGTH_BYTES, "little") + frame
    return [head, *encode(layout, layout.pack(given), trained_only=False)]


def stored_arrays(layout: Layout, gradient: Gradient) -> list[np.ndarray[Any, Any]]:
    """Read a gradient from the journal for parameters of a layout.

    Parameters
    ----------
    layout : Layout
        Of the parameters; the payload is already cut where its arenas end.
    gradient : Gradient
        From the journal.

    Returns
    -------
    list of ndarray, 1-D
        Arrays that cover the trained arenas.

    Raises
    ------
    LayoutError
        If an early one does not fit.
    GradientRefused
        If another one does not.
    """
    if gradient.encoding == EARLY:
        return layout.pack_gradient(_early_nest(gradient.parts))
    return decode(layout, gradient.encoding, gradient.parts, gradient.size)


def _early_nest(parts: Sequence[Any]) -> Nest:
    payload = memoryview(b"".join(parts))
    if not payload:
        return {}
    end = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    layout = Layout.from_frame(payload[_LENGTH_BYTES:end])
    arenas = [np.empty(arena.size, arena.dtype) for arena in layout.arenas]
    pieces = []
    for arena in layout.arenas:
        stop = end + arena.size * arena.dtype.itemsize
        pieces += [payload[start : min(start + PART_BYTES, stop)] for start in range(end, stop, PART_BYTES)]
        end = stop
    fill(layout, pieces, arenas)
    return layout.nest(layout.views(arenas))
