"""``distgrad demo``: a broker and some workers on this machine learn to read handwritten digits.

Everything runs as it would on several machines: the broker and the workers are processes of their own, made with the
commands that a user would type, and this one only looks on through the control channel.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import IO, Any

import click
from rich.console import Console

from distgrad.admin import Admin
from distgrad.errors import ConfigError, DistgradError
from distgrad_worker.demo_view import Point, ProgressView, rate, workers_table

#: Fraction of the test images that must be named correctly for exit code 0.
GOAL = 0.95

#: Bears the staleness of many asynchronous workers. SGD with momentum 0.9 diverges at a mean of 4; Adam at twice this
#: rate learns as well, but now and then falls below the goal for some dozen gradients.
_RULE = ("--optimizer", "adam", "--lr", "0.0005")

_LOOK_EVERY_S = 0.02
_READY_WITHIN_S = 60.0
_ANSWER_WITHIN_S = 10.0
_END_WITHIN_S = 40.0  # more than workers take to deliver what they pushed
_LOG_LINES = 15  # shown of a process that failed

_READY = re.compile(r"control=(?P<control>\S+) gradients=\S+")


@click.command(short_help="Train on real digits with a broker and some workers, here and now.")
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Worker processes.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    default=Path("digits.png"),
    show_default=True,
    help="Where the picture goes.",
)
@click.option("--no-picture", is_flag=True, help="Draw nothing (matplotlib is then not needed).")
def demo(workers: int, out: Path, no_picture: bool) -> None:
    """Train a two-layer network on scikit-learn's handwritten digits.

    Starts a broker and the workers on this machine, each worker with its own part of the images,
    shows how loss and test accuracy go, and ends all of them again. The training code is
    examples/digits.py.

    The exit code is 0 if at least 95 % of the test images are named correctly, otherwise 1.
    """
    _check_extra(["sklearn"] if no_picture else ["sklearn", "matplotlib"])
    folder = out.absolute().parent
    if not no_picture and not os.access(folder, os.W_OK):  # better now than after the training
        raise ConfigError(f"cannot write into the folder {folder}", hint="choose another with --out")
    console = Console(highlight=False)
    with _signals_end_us(), tempfile.TemporaryDirectory(prefix="distgrad-demo-") as logs:
        points, table = _train(console, workers, Path(logs))
    last = points[-1]
    seconds = last.seconds
    console.print(workers_table(table))
    console.print(f"{last.version:,} gradients in {seconds:.1f} s: {rate(points):,.0f} per second")
    console.print(f"test accuracy: {last.accuracy:.1%}")
    if not no_picture:
        # Imported late: matplotlib takes its time, and is not needed without a picture.
        from distgrad_worker.picture import draw

        draw(points, out, title=f"{workers} workers, {last.version:,} gradients, {seconds:.1f} s", goal=GOAL)
        console.print(f"picture: {out.absolute()}", soft_wrap=True)
    if last.accuracy < GOAL:
        console.print(f"that is below the goal of {GOAL:.0%}")
        sys.exit(1)


def find_example() -> Path:
    """Find the training code: in the wheel it is inside this package, in a checkout at the top.

    Returns
    -------
    Path
        Of ``digits.py``.

    Raises
    ------
    FileNotFoundError
        If it is in neither place: the installation is not whole.
    """
    package = Path(__file__).resolve().parent
    places = [package / "examples" / "digits.py", package.parents[1] / "examples" / "digits.py"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"the demo's training code is missing: neither {places[0]} nor {places[1]} is there")


def way_to_look_on(address: str) -> str:
    """Give a command that can be typed here: after `make demo` it is not on the path, and has no extra `top`.

    Parameters
    ----------
    address : str
        The broker's control channel.

    Returns
    -------
    str
        A line for a shell in the same folder.
    """
    own = Path(sys.executable).with_name("distgrad")
    program = "distgrad" if shutil.which("distgrad") or not own.exists() else os.path.relpath(own)
    if importlib.util.find_spec("textual") is None:
        return f"{program} admin {address} status --watch"
    return f"{program} top {address}"


def _check_extra(names: Sequence[str]) -> None:
    titles = {"sklearn": "scikit-learn"}
    missing = [titles.get(name, name) for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'the demo needs {" and ".join(missing)}: pip install ".[demo]" in the clone of distgrad')


@contextlib.contextmanager
def _signals_end_us() -> Iterator[None]:
    """Turn the signals that would end us silently into an exit that ends our processes first."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    former = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)


def _train(console: Console, workers: int, logs: Path) -> tuple[list[Point], list[dict[str, Any]]]:
    """Run broker and workers to the end; return what was seen, and the broker's table of workers."""
    example = find_example()
    digits = _load(example)
    broker_log, workers_log = logs / "broker.log", logs / "workers.log"
    with contextlib.ExitStack() as stack:
        endpoints = ("--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0")
        broker = stack.enter_context(_process("broker", *endpoints, *_RULE, log=broker_log, stdout=subprocess.PIPE))
        address = _wait_until_ready(broker)
        if address is None:
            raise _failed(console, "the broker", broker, broker_log)
        console.print(f"broker at {address}, {workers} workers", soft_wrap=True)
        console.print(f"look on from another terminal: {way_to_look_on(address)}", soft_wrap=True)
        # No restarts: what fails in a demo is to be seen, not worked around.
        options = ("--processes", str(workers), "--id", "worker", "--max-restarts", "0")
        training = stack.enter_context(
            _process("worker", address, f"{example.stem}:train", *options, log=workers_log, cwd=example.parent)
        )
        admin = stack.enter_context(Admin(address, timeout=_ANSWER_WITHIN_S))
        try:
            points = _follow(admin, training, digits, ProgressView(console, digits.GRADIENTS // workers * workers))
            table = admin.workers()
        except DistgradError:
            _failed(console, "the broker", broker, broker_log)
            raise
        if training.returncode != 0 or not points:
            raise _failed(console, "the workers", training, workers_log)
    return points, table


def _failed(console: Console, who: str, process: subprocess.Popen[str], log: Path) -> DistgradError:
    """Show the end of a process's output, and make the error that says whose it is."""
    for line in log.read_text(errors="replace").splitlines()[-_LOG_LINES:]:
        console.print(line, markup=False, soft_wrap=True)
    how = "did not answer" if process.poll() is None else f"ended with code {process.returncode}"
    return DistgradError(f"{who} {how}; the lines above are the end of the output")


def _load(example: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("distgrad_demo_digits", example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _process(
    *arguments: str, log: Path, stdout: int | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run ``distgrad …`` while the context lasts, in a session of its own: Ctrl-C is ours to pass on."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DISTGRAD_")}
    argv = [sys.executable, "-P", "-m", "distgrad", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file if stdout is None else stdout,
            stderr=file,
            cwd=cwd,
            env=env,
            text=True,
            start_new_session=True,
            preexec_fn=_request_end_with_us(),
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(_END_WITHIN_S)
        finally:  # too slow, or a second Ctrl-C
            if process.returncode is None:
                process.kill()
                process.wait()


def _request_end_with_us() -> Callable[[], object] | None:
    """Make what a child runs first: on Linux it gets SIGTERM when we get SIGKILL, where no ``finally`` runs."""
    if sys.platform != "linux":
        return None
    set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    # Looked up before the fork: only the call itself is left to the child.
    return functools.partial(ctypes.CDLL(None).prctl, set_death_signal, signal.SIGTERM.value, 0, 0, 0)


def _wait_until_ready(broker: subprocess.Popen[str]) -> str | None:
    """Return the control address out of the line that the broker prints when it is ready; None if that never comes."""
    assert broker.stdout is not None
    addresses: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(
        target=_read_output, args=(broker.stdout, addresses), name="distgrad-demo-broker-output", daemon=True
    )
    reader.start()
    with contextlib.suppress(queue.Empty):
        return addresses.get(timeout=_READY_WITHIN_S)
    return None


def _read_output(output: IO[str], addresses: queue.SimpleQueue[str | None]) -> None:
    """Read all that the broker prints, so that its pipe never fills; hand over the address, None at the end."""
    with output:
        for line in output:
            if match := _READY.search(line):
                addresses.put(match["control"])
    addresses.put(None)


def _follow(admin: Admin, training: subprocess.Popen[str], digits: ModuleType, view: ProgressView) -> list[Point]:
    """Test each version that we see on images that no worker has, until the workers have ended."""
    _, test = digits.load_data()
    points: list[Point] = []
    started = time.monotonic()
    with view:
        while True:
            has_ended = _has_ended(training, _LOOK_EVERY_S)
            fetched = admin.fetch()
            if fetched is not None and (not points or fetched.state.version > points[-1].version):
                if not points:
                    started = time.monotonic()
                losses = [w["loss"] for w in admin.workers() if w["loss"] is not None]
                layout = fetched.layout
                test_loss, accuracy = digits.evaluate(layout.nest(layout.views(fetched.arenas)), test)
                point = Point(
                    seconds=time.monotonic() - started,
                    version=fetched.state.version,
                    train_loss=sum(losses) / len(losses) if losses else None,
                    test_loss=test_loss,
                    accuracy=accuracy,
                )
                points.append(point)
                view.show(point)
            if has_ended:
                return points


def _has_ended(process: subprocess.Popen[str], within_s: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(within_s)
    return process.returncode is not None
