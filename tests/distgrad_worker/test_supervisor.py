"""Processes are started, restarted within bounds, stopped at once, and their output is told apart."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad_worker.supervisor import Command, Outcome, Report, RestartPolicy, Supervisor

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and sessions are POSIX")

AT_ONCE = RestartPolicy(max_restarts=3, first_delay_s=0.0)
COUNT = "import sys; open(sys.argv[1], 'a').write('x'); runs = len(open(sys.argv[1]).read())\n"
STUBBORN = """\
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
print("ready", flush=True)
signal.pause()
"""


class Sink(io.BytesIO):
    """Collects output, and does something when a text first appears in it: that is how tests wait."""

    def __init__(self, when: str = "", do: Callable[[], object] | None = None) -> None:
        super().__init__()
        self._when, self._do = when.encode(), do

    def flush(self) -> None:
        if self._do is not None and self._when in self.getvalue():
            do, self._do = self._do, None
            do()

    @property
    def text(self) -> str:
        return self.getvalue().decode()


def python(name: str, code: str, *arguments: object) -> Command:
    return Command(name, (sys.executable, "-I", "-S", "-c", code, *map(str, arguments)))


def supervise(
    *commands: Command,
    policy: RestartPolicy = AT_ONCE,
    grace_s: float = 60.0,
    out: Sink | None = None,
    err: Sink | None = None,
) -> Outcome:
    return Supervisor(commands, policy=policy, grace_s=grace_s, out=out or Sink(), err=err or Sink()).run()


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# Output


def test_each_line_has_its_process_in_front_and_keeps_its_stream() -> None:
    out, err = Sink(), Sink()

    supervise(
        python("w-0", "import sys; print('one\\ntwo'); print('wrong', file=sys.stderr)"),
        python("w-1", "print('no end', end='')"),
        out=out,
        err=err,
    )

    assert sorted(out.text.splitlines()) == ["w-0 | one", "w-0 | two", "w-1 | no end"]
    assert err.text == "w-0 | wrong\n"


def test_of_a_line_that_was_redrawn_the_last_state_is_kept() -> None:
    out = Sink()

    supervise(python("w", "import sys; sys.stdout.buffer.write(b' 10 %\\r 50 %\\r100 %\\nwindows\\r\\n')"), out=out)

    assert out.text == "w | 100 %\nw | windows\n"


def test_a_line_without_end_does_not_grow_without_end() -> None:
    out = Sink()

    supervise(python("w", "print('x' * 1_000_000)"), out=out)

    assert out.text.count("x") == 1_000_000
    assert max(map(len, out.text.splitlines())) < 200_000


def test_a_grandchild_that_holds_the_output_open_does_not_hold_us_up() -> None:
    code = "import subprocess as s, sys; s.Popen([sys.executable, '-c', 'import time; time.sleep(8)']); print('done')"
    out = Sink()

    outcome = supervise(python("w", code), out=out)

    assert (outcome.code, out.text) == (0, "w | done\n")


def test_nobody_reading_the_output_ends_the_run() -> None:
    code = (
        "import sys; from distgrad_worker.supervisor import Command, Supervisor\n"
        "wait = 'import time; print(1); time.sleep(60)'\n"
        "sys.exit(Supervisor([Command('w', (sys.executable, '-u', '-c', wait))]).run().code)"
    )
    read, write = os.pipe()
    os.close(read)

    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)

    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


# Ends and restarts


def test_the_exit_code_is_the_highest() -> None:
    never = RestartPolicy(max_restarts=0)
    ends = [python(str(code), f"raise SystemExit({code})") for code in (0, 70, 3)]

    assert supervise(*ends, policy=never) == Outcome(70)


def test_a_process_that_a_signal_ended_counts_as_128_and_the_signal() -> None:
    err = Sink()

    outcome = supervise(
        python("w", "import os; os.kill(os.getpid(), 9)"), policy=RestartPolicy(max_restarts=0), err=err
    )

    assert outcome == Outcome(128 + signal.SIGKILL)
    assert "ended by SIGKILL" in err.text


def test_a_process_that_fails_is_restarted_so_often_and_not_more(tmp_path: Path) -> None:
    count, err = tmp_path / "count", Sink()

    outcome = supervise(python("w", COUNT + "sys.exit(7)", count), err=err)

    assert outcome.code == 7
    assert len(count.read_text()) == 1 + AT_ONCE.max_restarts
    assert "restart 1 of 3" in err.text
    assert "not restarted again after 3 restarts" in err.text


def test_a_process_that_ends_well_after_a_restart_has_ended_well(tmp_path: Path) -> None:
    assert supervise(python("w", COUNT + "sys.exit(7 if runs < 3 else 0)", tmp_path / "count")) == Outcome(0)


def test_a_process_that_ran_for_long_starts_with_a_clean_slate(tmp_path: Path) -> None:
    forgiving = RestartPolicy(max_restarts=1, first_delay_s=0.0, reset_after_s=0.0)

    outcome = supervise(python("w", COUNT + "sys.exit(7 if runs < 6 else 0)", tmp_path / "count"), policy=forgiving)

    assert outcome == Outcome(0)


def test_others_go_on_while_one_is_given_up(tmp_path: Path) -> None:
    out = Sink()
    waits = "import os, sys; print(open(sys.argv[1]).read())"  # a FIFO: until the other one has failed for good
    os.mkfifo(fifo := tmp_path / "fifo")
    err = Sink("not restarted again", lambda: fifo.write_text("still here"))

    outcome = supervise(python("good", waits, fifo), python("bad", "raise SystemExit(7)"), out=out, err=err)

    assert outcome == Outcome(7)
    assert out.text == "good | still here\n"


@given(failures=st.integers(1, 5000))
def test_delays_double_up_to_the_longest(failures: int) -> None:
    policy = RestartPolicy()
    delay = policy.delay_s(failures)

    assert delay == (0.5 if failures == 1 else min(2 * policy.delay_s(failures - 1), 10.0))


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_and_nothing_is_restarted(number: signal.Signals) -> None:
    code = f"""\
import signal, sys
def end(number, frame):
    print("got", number)
    sys.exit(5)
signal.signal({number.value}, end)
print("ready", flush=True)
signal.pause()
"""
    out = Sink("ready", send(number))

    outcome = supervise(python("w", code), out=out)

    assert outcome == Outcome(5)
    assert out.text == f"w | ready\nw | got {number.value}\n"


def test_a_second_signal_kills() -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    assert supervise(python("w", STUBBORN), out=Sink("ready", twice)) == Outcome(128 + signal.SIGKILL)


def test_what_does_not_stop_within_the_grace_is_killed() -> None:
    out = Sink("ready", send(signal.SIGTERM))

    assert supervise(python("w", STUBBORN), out=out, grace_s=0.01) == Outcome(128 + signal.SIGKILL)


def test_a_stop_does_not_wait_out_the_delay_before_a_restart() -> None:
    an_hour = RestartPolicy(first_delay_s=3600.0, longest_delay_s=3600.0)
    err = Sink("restart 1 of 3 in 3600 s", send(signal.SIGTERM))

    assert supervise(python("w", "raise SystemExit(7)"), policy=an_hour, err=err) == Outcome(7)


def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    supervise(python("w", ""))

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_process_learns_that_the_supervisor_was_killed(tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    child = f"import sys; f = open({str(fifo)!r}, 'w'); f.write('here'); f.flush(); sys.stdin.read(); f.write('gone')"
    code = (
        "import sys; from distgrad_worker.supervisor import Command, Supervisor\n"
        f"Supervisor([Command('w', (sys.executable, '-c', {child!r}))]).run()"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code])

    with fifo.open() as from_child:
        assert from_child.read(4) == "here"
        supervisor.kill()
        supervisor.wait()

        assert from_child.read() == "gone"


# Reports


def reporting(name: str, report: Report, *, before: str = "") -> Command:
    code = f"{before}\nimport sys; sys.stderr.buffer.write({report.line()!r}); sys.exit({report.code})"
    return python(name, code)


def test_a_process_that_says_that_it_is_no_use_is_not_restarted() -> None:
    err = Sink()
    report = Report(1, "another process took the id w", hint="choose another --id")

    outcome = supervise(reporting("w", report), err=err)

    assert outcome == Outcome(1)
    assert err.text == "w | distgrad: another process took the id w (choose another --id); not restarted\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"no report",
        b"",
        b"\xff",
        b'{"level": "info", "message": "a log of JSON texts, RFC 7464"}',
        b"[1, 2]",
        b'{"code": "1", "message": "m", "hint": null, "for_all": false}',
        b'{"code": 1, "message": "m", "hint": 2, "for_all": false}',
        b'{"code": 1, "message": "m", "hint": null, "for_all": 0}',
        b"[" * 60_000,
    ],
    ids=lambda rest: rest[:8].decode(errors="replace") or "nothing",
)
def test_a_line_that_only_begins_like_a_report_is_output(rest: bytes) -> None:
    err = Sink()
    length = len(rest.rstrip(b"["))
    line = f"b'\\x1e' + {rest[:length]!r} + b'[' * {len(rest) - length}"

    outcome = supervise(python("w", f"import sys; sys.stderr.buffer.write({line} + b'\\nnext\\n')"), err=err)

    assert outcome == Outcome(0)
    assert err.getvalue() == b"w | \x1e" + rest + b"\nw | next\n"


def test_what_holds_for_all_stops_all_and_is_left_to_the_caller_to_say() -> None:
    report = Report(2, "there is no module 'x'\nsecond line", for_all=True)
    waiting = [python(f"w-{n}", "import time; time.sleep(600)") for n in range(3)]
    err = Sink()

    outcome = supervise(*waiting, reporting("w-3", report), err=err)

    assert outcome == Outcome(2, report)
    assert err.text == ""


def test_who_worked_before_is_restarted_even_if_nothing_works_now(tmp_path: Path) -> None:
    """A broker that is restarted is away for a while; that is no reason to end all workers."""
    report = Report(3, "no broker answers", for_all=True)
    crashes_then_reports_then_ends_well = "if runs in (1, 3): sys.exit(70 * (runs == 1))"
    before = f"import sys; sys.argv.append({str(tmp_path / 'count')!r})\n{COUNT}{crashes_then_reports_then_ends_well}"
    err = Sink()

    outcome = supervise(reporting("w", report, before=before), err=err)

    assert outcome == Outcome(0)
    assert "no broker answers; restart 2 of 3" in err.text
