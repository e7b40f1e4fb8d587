"""What is looked at, and what was found."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path


class Grade(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    """As it should be."""
    WARNING = "warning"
    """It works, but not as well as it could."""
    FAULT = "fault"
    """It does not work."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    about : str
        What it is about, in a word.
    grade : Grade
        How bad it is.
    text : str
        What was found; where it is wrong, what was expected.
    mend : str, optional
        What to do about it; given unless the grade is ``ok``.
    """

    about: str
    grade: Grade
    text: str
    mend: str | None = None


@dataclass(frozen=True)
class Subject:
    """What there is to look at beside the machine itself.

    Parameters
    ----------
    address : str, optional
        A running broker. Without one the ports are looked at on which a broker would listen here.
    keys : Path, optional
        A client's file, or a broker's folder.
    data : Path, optional
        A broker's data folder, which need not exist yet.
    control, gradients : str
        Where a broker would listen.
    workers : int
        How many it is to serve, at least 1.
    """

    address: str | None
    keys: Path | None
    data: Path | None
    control: str
    gradients: str
    workers: int


def ok(about: str, text: str) -> Finding:
    """Build a finding that all is well.

    Parameters
    ----------
    about, text : str
        As in `Finding`.

    Returns
    -------
    Finding
        Of grade ``ok``.
    """
    return Finding(about, Grade.OK, text)


def warning(about: str, text: str, mend: str) -> Finding:
    """Build a finding that something could be better.

    Parameters
    ----------
    about, text, mend : str
        As in `Finding`.

    Returns
    -------
    Finding
        Of grade ``warning``.
    """
    return Finding(about, Grade.WARNING, text, mend)


def fault(about: str, text: str, mend: str) -> Finding:
    """Build a finding that something does not work.

    Parameters
    ----------
    about, text, mend : str
        As in `Finding`.

    Returns
    -------
    Finding
        Of grade ``fault``.
    """
    return Finding(about, Grade.FAULT, text, mend)
