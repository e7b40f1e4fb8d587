"""What must hold: after each turn of a broker, after each recovery, and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distgrad.durable.books import Recovered
from distgrad.holder import ParameterHolder
from distgrad_broker.data import OpenData
from distgrad_broker.report import lost
from simulation.clockwork import Violation
from simulation.reference import Reference
from simulation.watch import same

if TYPE_CHECKING:
    from simulation.broker_process import BrokerProcess
    from simulation.world import World


def check_state(broker: BrokerProcess) -> None:
    """Compare the core's books with each other, with the budget and with the reference."""
    state = broker.core.state
    committed = queued = 0
    workers = broker.watch.reference.workers
    for member in state.members:
        committed += member.committed
        queued += member.queued_bytes
        if not 0 <= member.queued_bytes <= member.committed or member.promised > member.committed:
            raise Violation(
                f"{member.worker}: {member.queued_bytes} bytes queued, {member.promised} promised, "
                f"{member.committed} committed"
            )
        own = workers[member.worker]
        if not member.settled <= member.decided == own.decided <= member.accepted == own.accepted:
            raise Violation(
                f"{member.worker}: settled {member.settled}, decided {member.decided} ({own.decided}), "
                f"accepted {member.accepted} ({own.accepted})"
            )
        if member.applied + member.superseded + member.refused + member.cleared != len(own.outcomes):
            raise Violation(
                f"{member.worker}: {member.applied} applied, {member.superseded} superseded, {member.refused} refused, "
                f"{member.cleared} cleared, but {len(own.outcomes)} were decided on"
            )
    if committed > state.grants.budget_bytes or queued != state.queued_bytes:
        raise Violation(f"{committed} bytes committed, {queued} queued, {state.queued_bytes} counted")
    if state.generation != broker.watch.reference.generation:
        raise Violation(f"generation {state.generation}, not {broker.watch.reference.generation}")
    if missing := lost(state):
        raise Violation(f"{missing} gradients were accepted, and are not settled, queued, held or on their way")
    if sum(state.refused.values()) != state.outcomes["refused"]:
        raise Violation(f"{state.outcomes['refused']} were refused, but by reason: {state.refused}")
    deadline = broker.core.next_deadline()
    if deadline is not None and deadline > broker.now + 5.0:
        raise Violation(f"a request waits until {deadline - broker.now} s from now")


def check_recovery(world: World, data: OpenData, holder: ParameterHolder) -> Reference:
    """Compare what was recovered with what it must be, and give the reference for it."""
    recovered, former = data.recovered, world.former
    if recovered.damaged:
        raise Violation(f"damaged after a crash: {recovered.damaged}")
    if former is None:
        reference = Reference()
        reference.mode = holder.mode
        reference.rule = None if holder.rule is None else (holder.rule.name, holder.rule.settings())
        return reference
    reference = former.expected(recovered)
    world.told.check(reference, recovered.sequence)
    _compare_books(recovered, reference)
    ours, theirs = _settings(holder, recovered), _settings_of(reference)
    if ours != theirs:
        raise Violation(f"recovered {ours}, not {theirs}")
    storage = holder.storage
    arenas = [] if storage is None else storage.arenas
    if holder.layout != reference.layout or not same(arenas, reference.arenas, is_exact=world.plan.is_exact):
        raise Violation(f"recovered parameters {arenas}, not {reference.arenas}")
    bits = [arena.tobytes() for arena in arenas]
    for arrays in holder.state.values():
        bits += [array.tobytes() for array in arrays]
    if arenas and former.bits.get((reference.generation, reference.version), bits) != bits:
        raise Violation(f"version {reference.version} has other bits than before the crash")
    world.count_recovery(recovered)
    return reference


def check_core(broker: BrokerProcess, recovered: Recovered) -> None:
    """Compare the core's memory, as it begins, with what was recovered."""
    state, reference = broker.core.state, broker.watch.reference
    if recovered.books.policy_memory and state.policy.memory() != recovered.books.policy_memory:
        raise Violation(f"the policy begins with {state.policy.memory()}, not {recovered.books.policy_memory}")
    if state.policy.step_memory() != recovered.books.policy_step:
        raise Violation(f"the policy begins with {state.policy.step_memory()}, not {recovered.books.policy_step}")
    queued = [(gradient.worker, gradient.number) for gradient in state.queue]
    if queued != list(reference.pending):
        raise Violation(f"{queued} are queued after a restart, not {list(reference.pending)}")
    for member in state.members:
        own = reference.workers[member.worker]
        found = (member.accepted, member.decided, member.settled, member.state, member.cursor, member.decided_cursor)
        expected = (own.accepted, own.decided, own.decided, own.state, own.cursor, own.decided_cursor)
        if found != expected or set(member.ahead) != set(own.ahead):
            raise Violation(f"{member.worker} begins with {found}, not {expected}")
    if recovered.books.incarnation and +state.outcomes != +reference.outcomes:
        raise Violation(f"the counters begin with {state.outcomes}, not {reference.outcomes}")


def _compare_books(recovered: Recovered, reference: Reference) -> None:
    books = recovered.books
    if books.members.keys() != reference.workers.keys():
        raise Violation(f"recovered workers {sorted(books.members)}, not {sorted(reference.workers)}")
    for name, own in reference.workers.items():
        book = books.members[name]
        # Who left has no session any more.
        session = None if own.state == "left" else (book.incarnation, book.counter)
        found = (book.accepted, book.decided, book.state, session, book.cursor, book.decided_cursor, sorted(book.ahead))
        session = None if own.state == "left" else own.session
        expected = (own.accepted, own.decided, own.state, session, own.cursor, own.decided_cursor, sorted(own.ahead))
        if found != expected:
            raise Violation(f"recovered {name}: {found}, not {expected}")
        counts = {outcome: count for outcome, count in book.counts.items() if count}
        if sum(counts.values()) != len(own.outcomes):
            raise Violation(f"recovered {name} with {counts}, but {len(own.outcomes)} were decided on")
        for number, reason, *_ in book.refusals:
            if own.outcomes[number][:2] != ("refused", reason):
                raise Violation(
                    f"recovered that {number} of {name} was refused: {reason}; it was {own.outcomes[number]}"
                )
    if list(recovered.pending) != list(reference.pending):
        raise Violation(f"recovered in the queue {list(recovered.pending)}, not {list(reference.pending)}")


def _settings(holder: ParameterHolder, recovered: Recovered) -> tuple[Any, ...]:
    rule, books = holder.rule, recovered.books
    named = None if rule is None else (rule.name, rule.settings())
    return holder.version, books.generation, books.is_running, holder.mode, named, list(books.policy or ())


def _settings_of(reference: Reference) -> tuple[Any, ...]:
    policy = list(reference.policy or ())
    return (
        reference.version, reference.generation, reference.is_running, reference.mode, reference.rule, policy
    )  # fmt: skip
