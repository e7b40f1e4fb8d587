"""The gradient change mode: down the gradient, or up."""

from __future__ import annotations

from .errors import InvalidMode

SIGNS = {"descent": 1.0, "ascent": -1.0}
"""What a rule multiplies a gradient by, first of all."""


def checked_mode(mode: object) -> str:
    """Return a gradient change mode as it is written.

    Parameters
    ----------
    mode : str
        ``"descent"`` or ``"ascent"``, in any case.

    Returns
    -------
    str
        The mode in lower case.

    Raises
    ------
    InvalidMode
        If it is anything else.
    """
    lower = mode.lower() if isinstance(mode, str) else ""
    if lower not in SIGNS:
        raise InvalidMode(mode)
    return lower
