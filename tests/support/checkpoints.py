"""Checkpoints of parameters, and a disk that a process's end or an error cuts short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from distgrad.durable.checkpoint_file import CheckpointWriter
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.disk import Disk
from distgrad.layout import Layout
from distgrad.rules import state_dtype

Array = np.ndarray[Any, Any]


def checkpoint_of(
    nest: Any,
    slots: tuple[str, ...] = (),
    *,
    sequence: int = 7,
    version: int = 5,
    state: bytes = b"state",
    seed: int = 0,
) -> Checkpoint:
    """Make a checkpoint of parameters, with random bits as the rule's state."""
    layout = Layout.of(nest)
    rng = np.random.default_rng(seed)
    trained = layout.arenas[: layout.n_trainable_arenas]
    return Checkpoint(
        sequence,
        version,
        state,
        layout,
        layout.pack(nest),
        {slot: [random_bits(rng, arena.size, state_dtype(arena.dtype)) for arena in trained] for slot in slots},
    )


def random_bits(rng: np.random.Generator, size: int, dtype: np.dtype[Any]) -> Array:
    """Make an array of any bits whatever: NaNs with a payload too."""
    return np.frombuffer(bytearray(rng.bytes(size * dtype.itemsize)), dtype)


def write(disk: Disk, path: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in one go."""
    writer = CheckpointWriter(disk, path, checkpoint)
    while not writer.step():
        pass


def content(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """Give all that is in a checkpoint in a form that can be compared, bit for bit."""
    return (
        checkpoint.sequence,
        checkpoint.version,
        checkpoint.state,
        checkpoint.layout,
        [_bits(array) for array in checkpoint.arenas],
        {slot: [_bits(array) for array in arrays] for slot, arrays in checkpoint.slots.items()},
        list(checkpoint.slots),
    )


def _bits(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


class Killed(BaseException):
    """Stands for the end of a process: whoever catches it cannot do anything any more."""


class Gate:
    """Sees every call of a disk and its files before it is made, and may raise instead.

    Parameters
    ----------
    rule : callable
        Given the number of the call, from 0, and its name.
    """

    def __init__(self, rule: Callable[[int, str], None]) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._rule = rule
        self._open: list[Any] = []

    @classmethod
    def kill(cls, at: int) -> Gate:
        """End the process at a call."""

        def rule(number: int, _: str) -> None:
            if number >= at:
                raise Killed

        return cls(rule)

    @classmethod
    def fail(cls, at: int, error: OSError) -> Gate:
        """Fail once, at a call."""

        def rule(number: int, _: str) -> None:
            if number == at:
                raise error

        return cls(rule)

    @classmethod
    def watch(cls) -> Gate:
        """Only watch."""
        return cls(lambda number, name: None)

    def disk(self, disk: Disk) -> Disk:
        """Put the gate before a disk."""
        return cast(Disk, _Gated(self, disk))

    def end(self) -> None:
        """Close what a killed process had open, as the operating system does."""
        for file in self._open:
            with contextlib.suppress(OSError):
                file.close()

    def call(self, target: Any, name: str, args: tuple[Any, ...]) -> Any:
        """Make a call, or not."""
        self.calls.append((name, args))
        self._rule(len(self.calls) - 1, name)
        result = getattr(target, name)(*args)
        if name == "close":
            self._open.remove(target)
        if name in ("create", "open", "lock"):
            self._open.append(result)
            return _Gated(self, result)
        return result


class _Gated:
    def __init__(self, gate: Gate, target: Any) -> None:
        self._gate = gate
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._gate.call(self._target, name, args)
