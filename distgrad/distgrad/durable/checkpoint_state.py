"""What a checkpoint holds beside arrays: one msgpack map (``docs/checkpoint.md`` has its keys)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from distgrad.durable.books import Books
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.replay import rule_named
from distgrad.holder import ParameterHolder


def pack_state(holder: ParameterHolder, books: Books, first_needed: int) -> bytes:
    """Write down what a checkpoint holds beside arrays.

    Parameters
    ----------
    holder : ParameterHolder
        With the parameters of the checkpoint.
    books : Books
        The rest.
    first_needed : int
        The oldest record that a recovery needs.

    Returns
    -------
    bytes
        For `restore`.
    """
    rule = holder.rule
    packed: bytes = msgpack.packb(
        {
            "books": books.to_map(),
            "steps": holder.steps,
            "mode": holder.mode,
            "rule": None if rule is None else [rule.name, rule.settings()],
            "executor": holder.executor,
            "first_needed": first_needed,
        }
    )
    return packed


def restore(holder: ParameterHolder, found: Checkpoint) -> tuple[Books, int]:
    """Put a checkpoint's content in place.

    Parameters
    ----------
    holder : ParameterHolder
        Whose parameters, state, mode, rule and version are replaced.
    found : Checkpoint
        Read, and whole.

    Returns
    -------
    books : Books
        The rest.
    first_needed : int
        The first record to read.
    """
    state: Mapping[str, Any] = msgpack.unpackb(found.state, strict_map_key=False)
    holder.set_mode(state["mode"])
    holder.replace_rule(rule_named(state["rule"], holder.rule))
    if found.layout is not None:
        holder.set_arenas(found.layout, found.arenas)
        holder.restore_state(found.slots, state["steps"])
    holder.version = found.version
    return Books.from_map(state["books"]), state["first_needed"]


def computed_by(found: Checkpoint) -> str:
    """Tell what computed the updates of whoever wrote a checkpoint.

    Parameters
    ----------
    found : Checkpoint
        Read, and whole.

    Returns
    -------
    str
        ``"numba"`` or ``"numpy"``.
    """
    return str(msgpack.unpackb(found.state, strict_map_key=False)["executor"])
