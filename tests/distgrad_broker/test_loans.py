"""Loans: one version at a time is lent, and it is back when the last view is dropped."""

from __future__ import annotations

import numpy as np

from distgrad.layout import Layout
from distgrad.storage import Storage
from distgrad_broker.loans import Loans

LAYOUT = Layout.of(np.zeros(4, np.float32))


def version() -> tuple[Storage, list[bytes | memoryview]]:
    storage = Storage(LAYOUT, [np.zeros(4, np.float32)])
    return storage, [storage.arenas[0].data.cast("B")]


def test_a_version_is_out_until_the_last_view_of_it_is_dropped() -> None:
    loans = Loans()
    storage, parts = version()
    first, second = loans.lend(storage, parts), loans.lend(storage, parts)
    assert loans.covers(storage)

    del first
    assert loans.covers(storage)
    del second

    assert not loans.covers(storage)


def test_another_version_is_lent_only_when_the_former_is_back() -> None:
    loans = Loans()
    (storage, parts), (other, other_parts) = version(), version()
    lent = loans.lend(storage, parts)

    assert loans.lend(other, other_parts) is None
    assert not loans.covers(other)
    del lent

    assert loans.lend(other, other_parts) is not None


def test_copies_are_no_loan() -> None:
    loans = Loans()
    storage, _ = version()

    assert loans.lend(storage, [b"copy"]) == [b"copy"]
    assert not loans.covers(storage)
