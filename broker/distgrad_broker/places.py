"""Room that is kept for those that a step waits for, though they may not be there: one gradient for each place.

What the others have pushed until they come waits for the step, so nothing would ever become free (`Policy.places`). A
place is a named worker's, or open to several, of whom one after the other is served. As filling an open place count the
workers that are there, as long as they are no more than there are places; else those that push.
"""

from __future__ import annotations

from collections.abc import Sequence

from distgrad.durable.books import LIVE
from distgrad.policies import NO_PLACES, Places
from distgrad_broker.members import Member


class Kept:
    """What of a budget is free, and for whom it must stay so.

    Parameters
    ----------
    members : sequence of Member
        All that are known.
    places : Places
        Of the policy.
    budget_bytes, gradient_bytes : int
        The budget, and what one gradient is charged.
    trusts_idle : bool
        Whether to count on those that do not push, although there are more of them than places.

    Attributes
    ----------
    room : int
        Bytes that anybody may be given. Negative if others than those with a place have too much; then they have to
        give some of it back before all is as it should be.
    """

    def __init__(
        self,
        members: Sequence[Member],
        places: Places,
        budget_bytes: int,
        gradient_bytes: int,
        *,
        trusts_idle: bool = False,
    ) -> None:
        self._gradient_bytes = gradient_bytes
        self._places = places
        # What is kept for each named worker, and for the open places together.
        self._own: dict[str, int] = dict.fromkeys(places.named, gradient_bytes)
        self.room = budget_bytes
        candidates: list[Member] = []
        for member in members:
            self.room -= member.committed
            if member.worker in self._own:
                self._own[member.worker] = max(0, gradient_bytes - member.committed)
            elif self.is_eligible(member) and (member.state == LIVE or member.queued_bytes):
                candidates.append(member)
        # Whether those that do not push are more than can be counted on.
        self._are_many = len(candidates) > places.others and not trusts_idle
        if self._are_many:
            candidates = [member for member in candidates if not _is_idle(member)]
        filled = sorted((min(member.committed, gradient_bytes) for member in candidates), reverse=True)[: places.others]
        self._open = places.others * gradient_bytes - sum(filled)
        self.room -= sum(self._own.values()) + self._open

    def is_named(self, member: Member) -> bool:
        """Tell whether a place is this member's.

        Parameters
        ----------
        member : Member
            Who.

        Returns
        -------
        bool
            Whether it is one of those that must all come.
        """
        return member.worker in self._own

    def is_eligible(self, member: Member) -> bool:
        """Tell whether a member may fill an open place.

        Parameters
        ----------
        member : Member
            Who.

        Returns
        -------
        bool
            False if there is none, or it is for others.
        """
        among = self._places.among
        return self._places.others > 0 and (among is None or member.worker in among)

    def available(self, member: Member) -> int:
        """Tell how much more a member may be given.

        Parameters
        ----------
        member : Member
            Who.

        Returns
        -------
        int
            Bytes, at least 0.
        """
        return max(0, self.room + self._kept_for(member))

    def take(self, member: Member, n_bytes: int) -> None:
        """Note that a member was given something.

        Parameters
        ----------
        member : Member
            Who.
        n_bytes : int
            How much more than before.
        """
        kept = min(n_bytes, self._kept_for(member, before=n_bytes))
        if kept and self.is_named(member):
            self._own[member.worker] -= kept
        else:
            self._open -= kept
        self.room -= n_bytes - kept

    def must_give_back(self, member: Member) -> bool:
        """Tell whether a member has something that it does not use, and that is missing for others.

        Parameters
        ----------
        member : Member
            Who.

        Returns
        -------
        bool
            Whether its grant should be taken back.
        """
        if self.room >= 0 or self._places == NO_PLACES or self.is_named(member) or not _is_idle(member):
            return False
        return self._are_many or not self.is_eligible(member)

    def _kept_for(self, member: Member, before: int = 0) -> int:
        """Give what is kept that this member may use; `before` it was given so much."""
        if self.is_named(member):
            return self._own[member.worker]
        if not self.is_eligible(member) or (self._are_many and _is_idle(member)):
            return 0
        return min(self._open, max(0, self._gradient_bytes - (member.committed - before)))


def _is_idle(member: Member) -> bool:
    return not (member.want > 0 or member.queued_bytes or member.sent > member.settled)
