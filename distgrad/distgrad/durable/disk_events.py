"""What goes back and forth between whoever decides what is kept and the thread that writes it."""

from __future__ import annotations

from typing import NamedTuple

from distgrad.durable.checkpoint_header import Checkpoint


class RecordsWritten(NamedTuple):
    """Everything up to a record is on the disk."""

    sequence: int


class CheckpointEnded(NamedTuple):
    """The file thread finished a checkpoint; `error` says why it failed, or is None."""

    ticket: int
    path: str
    error: str | None


class DiskTroubled(NamedTuple):
    """The journal cannot be written, and why; or, with None, it can be again."""

    reason: str | None


class WriteCheckpoint(NamedTuple):
    """Write a checkpoint that covers all records up to a sequence; what it holds does not change until it ended.

    Attributes
    ----------
    ticket : int
        For `CheckpointEnded`.
    checkpoint : Checkpoint
        What it holds.
    first_needed : int
        The oldest record that a recovery from here needs.
    """

    ticket: int
    checkpoint: Checkpoint
    first_needed: int
