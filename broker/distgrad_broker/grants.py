"""Who may have how many bytes on the way or in the queue, so that their sum stays within the budget (PROTOCOL 9, 10).

For each member: *promised* is the latest grant, *committed* the most that the worker may still believe it has: the
largest promise since its last echo. The sum of *committed* never exceeds the budget; that is the invariant. A
smaller grant frees its difference only when the worker has echoed it, together with what it still has in flight.

If every live member can have room for one gradient, each has an equal *share*. As long as that leaves each at least
two gradients, one more share is kept in *reserve* for whoever joins next. Otherwise grants are *turns*: a push that
waits asks for one, the oldest wish is served first, and the grant falls back to 0 once nothing of the worker's is
unsettled.

Room for those that a step waits for is given to nobody else (`places`).
"""

from __future__ import annotations

from collections.abc import Iterable

from distgrad.durable.books import LIVE
from distgrad.policies import NO_PLACES, Places
from distgrad_broker.members import Member
from distgrad_broker.places import Kept


class Grants:
    """The budget and the line of those who wait for a turn.

    Parameters
    ----------
    budget_bytes : int
        The most that all grants may sum up to.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._gradient_bytes = 0
        # Whether grants are turns now, because a share would be smaller than a gradient.
        self.uses_turns = False
        self._turns: dict[str, Member] = {}
        # The policy's places when grants were last given out: named ones, open ones, and of how many workers.
        self._places = (0, 0, 0)

    @property
    def waiting_for_turn(self) -> int:
        """How many workers wait for a turn."""
        return len(self._turns)

    def committed_bytes(self, members: Iterable[Member]) -> int:
        """Sum what all members may have in flight or queued.

        Parameters
        ----------
        members : iterable of Member
            All that are known.

        Returns
        -------
        int
            Bytes; at most the budget.
        """
        return sum(member.committed for member in members)

    def resize(self, budget_bytes: int, gradient_bytes: int) -> None:
        """Take note of a new budget or of another size of a gradient; `rebalance` afterwards.

        Parameters
        ----------
        budget_bytes : int
            The budget.
        gradient_bytes : int
            What one gradient is charged; 0 while there are no parameters.
        """
        self.budget_bytes = budget_bytes
        if gradient_bytes != self._gradient_bytes:
            # Turns of the former size are of no use: they are taken back, and those who want one stand in line again.
            self.uses_turns = False
        self._gradient_bytes = gradient_bytes

    def echo(self, member: Member, grant_seq: int, held: int, want: int, sent: int) -> bool:
        """Take in what a worker says of its grant.

        Parameters
        ----------
        member : Member
            Who says it.
        grant_seq : int
            The last grant that it has seen.
        held : int
            Bytes that it may have in flight: the larger of that grant and what is in flight.
        want : int
            Bytes that a waiting push needs; 0 if none waits.
        sent : int
            The highest number that it has sent.

        Returns
        -------
        bool
            Whether to `rebalance`: something came free, is wanted, or was taken back.
        """
        before = member.committed, member.promised, len(self._turns)
        if grant_seq == member.grant_seq:
            # Never more than was promised before: a worker cannot grant itself anything.
            member.committed = max(member.promised, min(held, member.committed), member.queued_bytes)
        member.want = want
        if want <= 0:
            self._turns.pop(member.worker, None)
            # A turn that its worker does not use (the push was interrupted) goes back.
            if self.uses_turns and sent <= member.settled and member.promised and grant_seq == member.grant_seq:
                self._promise(member, 0)
        elif self.uses_turns and not member.promised and not member.queued_bytes:
            self._turns.setdefault(member.worker, member)
        # With places kept, whoever waits is looked at again: what is kept depends on who pushes.
        is_waiting = want > member.promised and any(self._places)
        return is_waiting or before != (member.committed, member.promised, len(self._turns))

    def settle(self, member: Member) -> bool:
        """Note that a gradient was settled: it may end a turn, or free what a member that is gone still covered.

        Parameters
        ----------
        member : Member
            Whose gradient it was.

        Returns
        -------
        bool
            Whether to `rebalance`.
        """
        if member.state != LIVE:
            member.committed = member.queued_bytes
            return True
        if self.uses_turns and member.promised and not member.queued_bytes:
            self._promise(member, 0)
            return True
        return False

    def withdraw(self, member: Member) -> None:
        """Take the grant of a member that is silent or has left; what it has queued stays covered.

        Parameters
        ----------
        member : Member
            Who lost it.
        """
        self._turns.pop(member.worker, None)
        member.promised = 0
        member.grant_seq += 1
        member.want = 0
        member.committed = member.queued_bytes

    def have_changed(self, places: Places) -> bool:
        """Tell whether a policy's places are others than when grants were last given out.

        Parameters
        ----------
        places : Places
            Of the policy.

        Returns
        -------
        bool
            Whether to `rebalance`.
        """
        return self._places != _count(places)

    def rebalance(self, members: Iterable[Member], places: Places = NO_PLACES) -> list[Member]:
        """Give out what is free, by shares or by turns.

        Parameters
        ----------
        members : iterable of Member
            All that are known.
        places : Places
            Of the policy.

        Returns
        -------
        list of Member
            Those whose grant has changed and who should be told.
        """
        everyone = list(members)
        live = [member for member in everyone if member.state == LIVE]
        changed: list[Member] = []
        if not live:
            return changed
        self._places = _count(places)
        kept = Kept(everyone, places, self.budget_bytes, self._gradient_bytes)
        count = len({member.worker for member in live}.union(places.named))
        count = max(count, len(places.named) + places.others)
        share = self.budget_bytes // count
        # A reserve for one more where there is plenty: who joins, after a crash say, then need not wait for the
        # others' echoes or for the end of a dead worker's lease.
        with_one_more = self.budget_bytes // (count + 1)
        if with_one_more >= 2 * max(self._gradient_bytes, 1):
            share = with_one_more
        if share >= max(self._gradient_bytes, 1):
            self.uses_turns = False
            self._turns.clear()
            for member in live:
                target = min(share, member.committed + kept.available(member))
                if kept.must_give_back(member):
                    target = 0
                if target != member.promised and (target >= self._gradient_bytes or target < member.promised):
                    kept.take(member, self._promise(member, target))
                    changed.append(member)
            return changed
        if not self.uses_turns:
            self.uses_turns = True
            for member in live:
                if member.promised:
                    self._promise(member, 0)
                    changed.append(member)
                if member.want > 0:
                    self._turns.setdefault(member.worker, member)
        # First come, first served; but a place is kept, from those as well who came before its worker.
        is_blocked = {True: False, False: False}
        for worker, member in list(self._turns.items()):
            is_eligible = kept.is_eligible(member)
            if not kept.is_named(member) and (is_blocked[True] or (is_blocked[False] and not is_eligible)):
                continue
            if self._gradient_bytes - member.committed > kept.available(member):
                is_blocked[is_eligible] = True
                continue
            del self._turns[worker]
            kept.take(member, self._promise(member, self._gradient_bytes))
            changed.append(member)
        return changed

    @staticmethod
    def _promise(member: Member, target: int) -> int:
        """Promise a grant and give the bytes that it takes from what is free."""
        member.promised = target
        member.grant_seq += 1
        before = member.committed
        member.committed = max(before, target)
        return member.committed - before


def _count(places: Places) -> tuple[int, int, int]:
    return len(places.named), places.others, len(places.among or ())
