"""Apply every gradient when it arrives."""

from __future__ import annotations

from distgrad.policies.policy import Policy


class Asynchronous(Policy):
    """Apply every gradient when it arrives, however old what it was computed on.

    References: Recht et al. 2011 (Hogwild!); Dean et al. 2012 (Downpour SGD).
    """

    name = "async"
    is_immediate = True
