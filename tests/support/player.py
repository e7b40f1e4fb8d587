"""Records of a journal made by hand, and carried out at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from distgrad import wire
from distgrad.codec import encode
from distgrad.durable.books import Books
from distgrad.durable.journal import Journal
from distgrad.durable.replay import APPLIED, Replay
from distgrad.holder import ParameterHolder
from distgrad.layout import Layout
from distgrad.rules import Rule

LAYOUT = Layout.of({"a": np.zeros(2, np.float32), "n": np.zeros(1, np.int64), "z": np.zeros(3, np.float64)})
NOTHING = memoryview(b"")


def payload_of(layout: Layout, value: float, *, trained_only: bool = True) -> memoryview:
    specs = layout.arenas[: layout.n_trainable_arenas] if trained_only else layout.arenas
    arenas = [np.full(arena.size, value, arena.dtype) for arena in specs]
    return memoryview(b"".join(encode(layout, arenas, trained_only=trained_only)))


def gradient_header(worker: str, number: int, layout: Layout = LAYOUT, **keys: Any) -> bytes:
    header = {"v": 1, "kind": "gradient", "worker": worker, "session": "one:1", "attempt": 1, "number": number}
    return wire.pack({**header, "fingerprint": layout.fingerprint, **keys})


class Player:
    """A replay that begins with parameters of zeros, and records numbered from 1.

    Parameters
    ----------
    rule, layout, until : Rule, Layout, int, optional
        Of the replay.
    journal : Journal, optional
        Takes each record as well.
    """

    def __init__(
        self,
        *,
        rule: Rule | None = None,
        layout: Layout | None = LAYOUT,
        until: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.journal = journal
        self.holder = ParameterHolder(rule=rule, executor="numpy")
        if layout is not None:
            self.holder.set_arenas(layout, [np.zeros(arena.size, arena.dtype) for arena in layout.arenas])
        self.replay = Replay(self.holder, Books(), until)
        self.books = self.replay.books
        self.sequence = 0

    def record(self, kind: str, payload: memoryview = NOTHING, **keys: Any) -> None:
        self._execute(msgpack.packb([kind, keys]), payload)

    def _execute(self, header: bytes, payload: memoryview) -> None:
        self.sequence += 1
        if self.journal is not None:
            self.journal.append(header, [payload])
        self.replay.execute(memoryview(header), payload, self.sequence)

    def began(self, incarnation: str, **keys: Any) -> None:
        told = {"executor": "numpy", "distgrad": "0.1", "settings": {}, "running": True, "durability": "journal"}
        self.record("began", incarnation=incarnation, **{**told, **keys})

    def session(self, worker: str = "w", **keys: Any) -> None:
        told: dict[str, Any] = {"user": None, "generated": False, "incarnation": "one", "counter": 1}
        self.record("session", worker=worker, **{**told, "nonce": b"a" * 16, "nonces": [], **keys})

    def gradient(self, number: int, worker: str = "w", *, value: float = 1.0, **keys: Any) -> None:
        self._execute(gradient_header(worker, number, **keys), payload_of(LAYOUT, value))

    def decided(self, *decisions: Any, version: int | None = None, **keys: Any) -> None:
        self.record("decided", version=self.holder.version if version is None else version, decisions=decisions, **keys)

    def apply(self, *step: tuple[str, int], weights: Sequence[float] | None = None) -> None:
        self.decided([APPLIED, step, weights])

    @property
    def values(self) -> list[float]:
        """The first element of each trained arena."""
        assert self.holder.storage is not None
        return [float(arena[0]) for arena in self.holder.storage.arenas[: LAYOUT.n_trainable_arenas]]
