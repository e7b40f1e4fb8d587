"""Look for what keeps a broker or a worker from running well here, and say how to mend it.

Each check looks at one thing and yields findings. Nothing is changed but for a file in the data folder, which is
removed again.
"""

from __future__ import annotations

from collections.abc import Iterator

from distgrad.doctor import folder, machine, network
from distgrad.doctor.finding import Finding, Grade, Subject

__all__ = ["Finding", "Grade", "Subject", "examine"]


def examine(subject: Subject) -> Iterator[Finding]:
    """Look at everything, one thing after the other.

    Parameters
    ----------
    subject : Subject
        What there is to look at.

    Yields
    ------
    Finding
        At least one for each thing, as soon as it is known.
    """
    yield from machine.versions()
    yield from machine.kernels()
    yield from machine.shared_memory()
    yield from machine.open_files(subject.workers)
    yield from machine.clock()
    if subject.data is not None:
        yield from folder.data_folder(subject.data)
    if subject.keys is not None:
        yield from network.keys(subject.keys)
    if subject.address is None:
        yield from network.ports(subject.control, subject.gradients)
    else:
        yield from network.broker(subject.address, subject.keys)
