"""Faults put into the shipped code on purpose, and whether the simulation finds them: ``make mutations``.

Each is made in a copy of the packages, which comes before them on the path; seeds then run until one fails, or
until there is no time for more. What is not found tells what the simulation cannot see.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("distgrad", "broker", "worker")

# What the child may take beyond its time: to start, and to end the seed that it is at.
GRACE_S = 120.0

BROKER, WORKER, DURABLE = "broker/distgrad_broker", "worker/distgrad_worker", "distgrad/distgrad/durable"


class Edit(NamedTuple):
    """A text that stands once in a file, and what stands there instead."""

    path: str
    old: str
    new: str


class Mutation(NamedTuple):
    """A fault, and the test of crashes that finds it if seeds do so too seldom."""

    name: str
    edits: tuple[Edit, ...]
    crash_test: str | None = None


def _mutation(name: str, *edits: tuple[str, str, str], crash_test: str | None = None) -> Mutation:
    return Mutation(name, tuple(Edit(*edit) for edit in edits), crash_test)


MUTATIONS = [
    # What comes in
    _mutation(
        "a repeat is accepted again",
        (f"{BROKER}/intake.py", "if number <= member.accepted:", "if number <= member.settled:"),
        (f"{BROKER}/intake.py", "if number != member.accepted + 1:", "if number > member.accepted + 1:"),
    ),
    _mutation(
        "a gap is not noticed",
        (f"{BROKER}/intake.py", "if number != member.accepted + 1:", "if False:"),
    ),
    _mutation(
        "gradients of a superseded process are accepted",
        (
            f"{BROKER}/intake.py",
            "if gradient.session != member.session or gradient.user != member.user:",
            "if gradient.user != member.user:",
        ),
    ),
    _mutation(
        "what no grant covers is accepted",
        (f"{BROKER}/intake.py", "if member.queued_bytes + gradient.charge > member.committed:", "if False:"),
    ),
    _mutation(
        "what was computed on a version that a crash took back is not held off",
        (f"{BROKER}/intake.py", "if state.repeatable and _is_early(state, gradient)", "if False"),
    ),
    # When it is settled
    _mutation(
        "settled before the disk has it",
        (
            f"{BROKER}/state.py",
            "return self.records.sequence if self.durability == JOURNAL else self.checkpoints.last + 1",
            "return None",
        ),
    ),
    _mutation(
        "settled one record too early",
        (f"{BROKER}/settling.py", "unsettled[0][0] <= mark:", "unsettled[0][0] <= mark + 1:"),
    ),
    _mutation(
        "heartbeats tell what is accepted as settled",
        (f"{BROKER}/settling.py", "untold - 1 if untold else member.settled", "member.accepted"),
    ),
    _mutation(
        "pulls tell what is accepted as settled",
        (f"{BROKER}/pulls.py", "if member.refusals else member.settled", "if member.refusals else member.accepted"),
    ),
    _mutation(
        "pulls tell what is behind a refusal that no heartbeat told",
        (f"{BROKER}/pulls.py", "member.refusals[0][0] - 1 if member.refusals else member.settled", "member.settled"),
    ),
    _mutation(
        "hello is answered before the disk has the session and what was accepted",
        (
            f"{BROKER}/worker_operations.py",
            "        return\n    state.answer_when_durable(waiter, fields, frames, now=now)",
            "        return\n    state.answer(waiter, fields, frames)",
        ),
    ),
    _mutation(
        "hello does not wait for a checkpoint where that is what settles",
        (f"{BROKER}/worker_operations.py", "and max(member.settled, member.kept) < member.accepted", "and False"),
    ),
    _mutation(
        "clear is answered before the disk has it",
        (
            f"{BROKER}/operations.py",
            'state.answer_when_durable(waiter, {"cleared": cleared}, now=now)',
            'state.answer(waiter, {"cleared": cleared})',
        ),
    ),
    _mutation(
        "a stop that waited for its queue in vain is answered before the disk has it",
        (
            f"{BROKER}/operations.py",
            'state.answer_when_durable(late, {"changed": late.data, "drained": False}, now=then)',
            'state.answer(late, {"changed": late.data, "drained": False})',
        ),
    ),
    _mutation(
        "decided ahead of an earlier number, and forgotten",
        (
            f"{BROKER}/settling.py",
            "        use_up_ahead(state, member)\n\n\ndef settle_applied",
            "        pass\n\n\ndef settle_applied",
        ),
    ),
    _mutation(
        "gradients that share a message all get the first one's numbers",
        (
            "distgrad/distgrad/gradient_messages.py",
            "payload[index * size : (index + 1) * size]",
            "payload[:size]",
        ),
    ),
    # The disk
    _mutation(
        "a new segment's name is not synced",
        (
            f"{DURABLE}/journal.py",
            "            self._disk.sync_folder(self._folder)\n        except OSError:\n            segment.close()",
            "            pass\n        except OSError:\n            segment.close()",
        ),
    ),
    _mutation(
        "a new checkpoint's name is not synced",
        (
            f"{DURABLE}/checkpoint_file.py",
            "        self._disk.sync_folder(self._folder)\n        self._is_whole",
            "        self._is_whole",
        ),
    ),
    _mutation(
        "a checkpoint is not synced before it gets its name",
        (
            f"{DURABLE}/checkpoint_file.py",
            "        file.sync()\n        yield\n        self._close()",
            "        yield\n        self._close()",
        ),
    ),
    _mutation(
        "the same file is synced again after an error",
        (f"{DURABLE}/journal.py", "            self._give_up()\n            raise", "            raise"),
    ),
    _mutation(
        "a checkpoint is written before the journal that it covers",
        (
            f"{DURABLE}/disk_writer.py",
            "        if self._must_wait_for_records(job):\n            return\n",
            "",
        ),
        (f"{DURABLE}/disk_writer.py", "is_enough or is_awaited else", "is_enough else"),
    ),
    _mutation(
        "segments are removed that an older checkpoint needs",
        (f"{DURABLE}/disk_writer.py", "remove_before(min(self._needed.values()))", "remove_before(job.first_needed)"),
    ),
    _mutation(
        "segments are removed that hold what is queued",
        (
            f"{BROKER}/checkpoints.py",
            "gradient.sequence for gradient in waiting if gradient.sequence",
            "gradient.sequence for gradient in ()",
        ),
    ),
    _mutation(
        "what a dead process did not sync is taken for durable",
        (
            f"{DURABLE}/journal.py",
            "first = min(max(reading.synced, vouched) + 1, next_sequence)",
            "first = next_sequence",
        ),
        # Where nothing has failed before, cutting the old segment off syncs it.
        crash_test="tests/distgrad/durable/test_journal_crashes.py",
    ),
    # Recovery
    _mutation(
        "the queue is forgotten",
        (f"{BROKER}/bookkeeping.py", "for gradient in recovered.pending.values():", "for gradient in ():"),
    ),
    _mutation(
        "decisions ahead of others are not in the books",
        (
            f"{BROKER}/bookkeeping.py",
            "ahead={number: (outcome, cursor) for number, (_, outcome, _, cursor) in member.ahead.items()}",
            "ahead={}",
        ),
    ),
    _mutation(
        "a checkpoint without a journal keeps the numbers of what it does not keep",
        (
            f"{BROKER}/bookkeeping.py",
            "(member.accepted, member.cursor) if state.durability == JOURNAL else member.kept_place",
            "(member.accepted, member.cursor if state.durability == JOURNAL else member.kept_place[1])",
        ),
    ),
    _mutation(
        "a checkpoint without a journal keeps the cursor of what it does not keep",
        (
            f"{BROKER}/bookkeeping.py",
            "(member.accepted, member.cursor) if state.durability == JOURNAL else member.kept_place",
            "(member.accepted if state.durability == JOURNAL else member.kept_place[0], member.cursor)",
        ),
    ),
    _mutation(
        "decisions are carried out in another order",
        (
            f"{DURABLE}/replay.py",
            'for decision in message["decisions"]:',
            'for decision in reversed(message["decisions"]):',
        ),
    ),
    _mutation(
        "the generation is forgotten",
        (f"{BROKER}/bookkeeping.py", "    state.generation = books.generation\n", ""),
    ),
    _mutation(
        "refusals are counted twice",
        (f"{DURABLE}/replay.py", "books.refused[reason] += 1", "books.refused[reason] += 2"),
    ),
    _mutation(
        "what the policy remembers is forgotten",
        (
            f"{BROKER}/bookkeeping.py",
            "recall({**books.policy_memory, **books.policy_step})",
            "recall(books.policy_step)",
        ),
    ),
    _mutation(
        "what the policy remembers of the open step is forgotten",
        (
            f"{BROKER}/bookkeeping.py",
            "recall({**books.policy_memory, **books.policy_step})",
            "recall(books.policy_memory)",
        ),
    ),
    _mutation(
        "versions count as come again that do not, as the parameters were replaced behind lost steps",
        (f"{BROKER}/bookkeeping.py", "books.repeatable if recovered.is_forked else [*", "[*"),
        crash_test="tests/distgrad_broker/test_bookkeeping_policies.py",
    ),
    _mutation(
        "versions count as come again that do not, as the rule was changed behind lost steps",
        (
            f"{DURABLE}/replay.py",
            "holder.mode, holder.rule, books.weighing):\n            self._diverge(message)",
            "holder.mode, holder.rule, books.weighing):\n            books.repeatable = []",
        ),
        crash_test="tests/distgrad/durable/test_replay_policy.py",
    ),
    _mutation(
        "a version that cannot come again is waited for",
        (f"{BROKER}/intake.py", " and not end_vain_repetition(state, member, now):", ":"),
        crash_test="tests/distgrad_broker/test_repetition.py",
    ),
    _mutation(
        "room is not kept for those that a step waits for",
        (f"{BROKER}/settling.py", "rebalance(state.members, state.policy.places())", "rebalance(state.members)"),
        crash_test="tests/distgrad_broker/test_places.py",
    ),
    # Sessions
    _mutation(
        "sessions are not in the journal",
        (f"{BROKER}/worker_operations.py", "        membership.note_session(state.records, member)\n", ""),
    ),
    _mutation(
        "the nonces of superseded processes are forgotten",
        (f"{BROKER}/membership.py", "nonces=list(member.past_nonces)", "nonces=[]"),
        (f"{BROKER}/bookkeeping.py", "nonces=list(member.past_nonces)", "nonces=[]"),
    ),
    _mutation(
        "the nonce of the current process is forgotten",
        (f"{BROKER}/membership.py", "nonce=member.nonce", 'nonce=b""'),
        (f"{BROKER}/bookkeeping.py", "nonce=member.nonce,\n        nonces", 'nonce=b"",\n        nonces'),
    ),
    _mutation(
        "what was undecided of a superseded process stays, where there is no journal",
        (
            f"{BROKER}/worker_operations.py",
            "            updates.forget_undecided(state, member)\n",
            "            pass\n",
        ),
    ),
    # The worker
    _mutation(
        "sent again from the number after the right one",
        (f"{WORKER}/window.py", "self.sent = min(max(accepted,", "self.sent = min(max(accepted + 1,"),
    ),
    _mutation(
        "not sent again after another session or attempt",
        (f"{WORKER}/session.py", "        if self._rewind_due:\n            window.rewind(accepted)\n", ""),
        (f"{WORKER}/session.py", "return\n            window.rewind(accepted)\n", "return\n"),
    ),
]


def run(mutation: Mutation, copy: Path, *, first: int, seeds: int, seconds: float) -> str:
    """Run seeds on a copy with a fault in it; tell what came of it."""
    originals = {edit.path: (ROOT / edit.path).read_text() for edit in mutation.edits}
    changed = dict(originals)
    for path, old, new in mutation.edits:
        if changed[path].count(old) != 1:
            return f"cannot be made: {changed[path].count(old)} places in {path}"
        changed[path] = changed[path].replace(old, new)
    for path, text in changed.items():
        (copy / path).write_text(text)
    folders = [*(copy / package for package in PACKAGES), ROOT / "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"}
    if mutation.crash_test is None:
        command = ["-m", "simulation.run", "--lines=0", f"--seeds={seeds}", f"--first={first}", f"--seconds={seconds}"]
    else:
        command = ["-m", "pytest", "-qx", "-n0", "-p", "no:cacheprovider", mutation.crash_test]
    try:
        child = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds + GRACE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "found: a seed does not end"
    finally:
        for path, text in originals.items():
            (copy / path).write_text(text)
    if mutation.crash_test is not None:
        tests = re.search(r"^FAILED (\S+)", child.stdout, re.MULTILINE)
        return f"NOT FOUND by {mutation.crash_test}" if tests is None else f"found by {tests[1]}"
    failed = re.search(r"^seed (\d+) failed: (.*)", child.stdout, re.MULTILINE)
    if failed is not None:
        return f"found by seed {failed[1]}: {failed[2][:100]}"
    if child.returncode:
        return f"cannot be run: {child.stderr.strip().splitlines()[-1:]}"
    return f"NOT FOUND: {child.stdout.partition(',')[0]}"


def main() -> int:
    """Run all mutations, or those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long to look for each")
    parser.add_argument("--seeds", type=int, default=10_000, help="how many seeds to try for each")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", default="", help="a regular expression that the names of those to run match")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if re.search(options.only, mutation.name)]
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        for mutation in chosen:
            started = time.perf_counter()
            told = run(mutation, copy, first=options.first, seeds=options.seeds, seconds=options.seconds)
            found += told.startswith("found")
            print(f"{mutation.name:<75} {time.perf_counter() - started:5.1f} s  {told}", flush=True)
    print(f"{found} of {len(chosen)} found")
    return int(found < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
