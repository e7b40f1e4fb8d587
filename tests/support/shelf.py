"""Parameters served in ranges, to a test's taste."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from distgrad import wire
from distgrad.layout import Layout
from support.scripted_broker import Request

STATE = ("one", 1, 42)


class Shelf:
    """Serve one set of parameters in ranges, as ``docs/wire.md`` has it.

    Each `range` takes the next of `n_range`, over and over; the first `revocations` snapshots are taken back.
    """

    def __init__(
        self,
        nest: Any,
        *,
        part_bytes: int = wire.PART_BYTES,
        n_first: int = 16,
        n_range: int | Sequence[int] = 16,
    ) -> None:
        self.layout = Layout.of(nest)
        arenas = self.layout.pack(nest)
        self.parts = [
            arenas[arena][start:stop].tobytes() for arena, start, stop in self.layout.parts(part_bytes=part_bytes)
        ]
        self.n_first = n_first
        self.n_range = itertools.cycle([n_range] if isinstance(n_range, int) else n_range)
        self.revocations = 0
        self.tokens = 0
        self.rows: list[dict[str, Any]] = []

    def __call__(self, request: Request) -> None:
        self.rows.append(request.header)
        if request.op == "get":
            self.get(request)
        else:
            assert request.op == "range"
            self.range(request)

    def get(self, request: Request) -> None:
        if request.header["newer_than"] == list(STATE):
            request.answer(unchanged=True, state=STATE, fingerprint=self.layout.fingerprint)
            return
        knows = request.header["have"] == self.layout.fingerprint
        first = self.parts[: self.n_first]
        self.tokens += 1
        request.answer(
            *([] if knows else [self.layout.to_frame()]),
            *first,
            state=STATE,
            fingerprint=self.layout.fingerprint,
            unchanged=False,
            layout=not knows,
            parts=len(self.parts),
            first=0,
            token=f"t{self.tokens}" if len(first) < len(self.parts) else None,
        )

    def range(self, request: Request) -> None:
        first = request.header["first"]
        if int(request.header["token"][1:]) <= self.revocations:
            request.fail("revoked", "the snapshot is gone")
            return
        # Updates have gone on: the reply's own state is a later one.
        request.answer(
            *self.parts[first : first + next(self.n_range)], state=("one", 1, 43), parts=len(self.parts), first=first
        )
