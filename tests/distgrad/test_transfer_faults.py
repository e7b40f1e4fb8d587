"""Whole parameters over a connection that fails: whatever happens on the way, the version comes whole."""

from __future__ import annotations

import enum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrad import client as client_module
from distgrad import link_pace, transfer
from distgrad.client import ControlClient
from support.proxy import CuttingProxy
from support.scripted_broker import Request, ScriptedBroker
from support.shelf import Shelf


class Fault(enum.Enum):
    """What happens to one message between client and broker."""

    LOST = "the request is lost"
    LATE = "the reply comes after that to the next request"
    TWICE = "the reply comes twice"
    CUT = "the connection breaks before the reply"
    CUT_AFTER = "the connection breaks after the reply was sent"


@settings(max_examples=40, deadline=None)
@given(
    faults=st.lists(st.sampled_from([None, None, *Fault]), max_size=12),
    n_first=st.integers(0, 3),
    n_range=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    revocations=st.integers(0, transfer.MAX_TRIES - 1),
)
def test_whatever_is_cut_lost_late_or_repeated_the_version_comes_whole(
    faults: list[Fault | None], n_first: int, n_range: list[int], revocations: int
) -> None:
    nest = np.arange(100, dtype=np.int64)
    shelf = Shelf(nest, part_bytes=64, n_first=n_first, n_range=n_range)
    shelf.revocations = revocations
    left = iter(faults)
    late: list[Request] = []

    with CuttingProxy() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "FIRST_RETRY_S", 0.02)
        patch.setattr(client_module, "LAST_RETRY_S", 0.05)
        # Parts are tiny here, and a client would wait for as long as megabytes take.
        patch.setattr(link_pace, "FASTEST_BYTES_PER_S", 1e12)

        def script(request: Request) -> None:
            fault = next(left, None)
            if fault is Fault.LATE:
                late.append(request)
                return
            if fault is Fault.CUT:
                proxy.cut("control")
            if fault not in (Fault.LOST, Fault.CUT):
                shelf(request)
            if fault is Fault.TWICE:
                shelf(request)
            while late:
                shelf(late.pop())
            if fault is Fault.CUT_AFTER:
                proxy.cut("control")

        with (
            ScriptedBroker(script) as broker,
            ControlClient(proxy.listen(broker.address, "control")) as client,
        ):
            fetched = transfer.fetch(client)

    assert fetched is not None
    np.testing.assert_array_equal(fetched.layout.nest(fetched.layout.views(fetched.arenas)), nest)
