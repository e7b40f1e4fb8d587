"""Run one function with one worker: what each process of ``distgrad worker`` is.

Started by the supervisor as ``python -P -m distgrad_worker.runner``: with ``-P`` our own imports never see the
user's folder; only then does it go first on the path, so that ``worker:train`` is the user's ``worker.py``.

The exit code tells how it ended; `Report` tells the supervisor that another attempt would end in the same way.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial, reduce
from types import FrameType
from typing import Any

from distgrad.command import BUG, DONE, INTERRUPTED, USAGE, exit_code
from distgrad.errors import ConfigError, DistgradError, Fenced, Forbidden, HistoryLost
from distgrad_worker.supervisor import Report

#: How long what was pushed may take to be settled after SIGINT or SIGTERM, in seconds.
_STOP_FLUSH_S = 10.0

#: How long the function may take to end once the supervisor is gone, in seconds.
_ORPHAN_GRACE_S = 30.0

# A module that ends in .py is a file's name, which a user is rather told than left to "no module worker.py".
_TARGET = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)(?<!\.py):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")


def split_target(target: str) -> tuple[str, str]:
    """Split ``module:function``.

    Parameters
    ----------
    target : str
        A dotted module and, after the colon, the function's name in it.

    Returns
    -------
    tuple of str
        The module and the name.

    Raises
    ------
    ConfigError
        If it has another form; the message says what to write.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        folder, _, rest = target.rpartition("/")
        module, _, name = rest.partition(":")
        example = f"{module.removesuffix('.py') or 'train'}:{name or 'train'}"
        if not _TARGET.fullmatch(example):
            example = "train:main"
        where = f" in the folder {folder}" if folder else ""
        raise ConfigError(f"{target!r} is not of the form module:function; write for example {example}{where}")
    return match["module"], match["name"]


def load_function(target: str) -> Callable[[Any], object]:
    """Import the user's function.

    Parameters
    ----------
    target : str
        ``module:function``; the module is looked up on ``sys.path``.

    Returns
    -------
    callable
        Takes the worker as its only argument.

    Raises
    ------
    ConfigError
        If there is no such module or function, if importing it fails, or if it cannot be called with one argument.
    """
    module_name, name = split_target(target)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(_import_failure(module_name, error)) from error
    try:
        function = reduce(getattr, name.split("."), module)
    except AttributeError:
        there = sorted(n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module_name)
        found = f"it defines {', '.join(there)}" if there else "it defines no function"
        where = getattr(module, "__file__", None) or module_name
        raise ConfigError(f"{where} has no {name!r}; {found}") from None
    if not callable(function):
        raise ConfigError(f"{target} is {type(function).__name__}, not a function")
    _check_signature(target, function)
    return function


def _import_failure(module_name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if module_name == error.name or module_name.startswith(error.name + "."):
            path = module_name.replace(".", "/")
            return f"there is no module {error.name!r} in {os.getcwd()}: run this in the folder that holds {path}.py"
        return f"importing {module_name} failed: no module named {error.name!r}; install it in {sys.prefix}"
    if isinstance(error, SyntaxError):
        return f"importing {module_name} failed: {error}"
    # Any other error is inside the user's code, where only a traceback helps; ours, the outer frames, are cut off.
    inner = error.__traceback__
    while inner is not None and inner.tb_next is not None and _is_import_machinery(inner.tb_frame):
        inner = inner.tb_next
    lines = "".join(traceback.format_exception(error.with_traceback(inner))).rstrip()
    return f"importing {module_name} failed: {type(error).__name__}: {error}\n{lines}"


def _is_import_machinery(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name in (__file__, importlib.__file__) or name.startswith("<frozen importlib")


def _check_signature(target: str, function: Callable[..., object]) -> None:
    name = target.rpartition(":")[2]
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{target} is async; a plain function is needed: def {name}(worker): …")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(None)
    except TypeError:
        raise ConfigError(
            f"{target} is called with one argument, the worker, but is {name}{signature}; write def {name}(worker): …"
        ) from None


def run(target: str, connect: Callable[[], Any]) -> tuple[int, Report | None]:
    """Import the function, connect the worker, and run the one with the other.

    The worker is closed in the end, and so flushed: as long as the broker answers after a return, for a bounded time
    after an exception. ``SystemExit`` passes through.

    Parameters
    ----------
    target : str
        ``module:function``.
    connect : callable
        Makes the worker, a context manager.

    Returns
    -------
    tuple of int and Report
        The exit code; a report, or ``None`` if another attempt may end better. Errors in the function have been
        printed with their traceback.
    """
    connected = False
    try:
        function = load_function(target)
        with connect() as worker:
            connected = True
            try:
                function(worker)
            except (KeyboardInterrupt, SystemExit):
                _deliver(worker)
                raise
    except KeyboardInterrupt:
        return INTERRUPTED, None
    except (Fenced, Forbidden, HistoryLost) as error:
        return _told(error, for_all=not connected)
    except DistgradError as error:
        if not connected:
            return _told(error, for_all=True)
        traceback.print_exc()
        code = exit_code(error)
        return (BUG if code == USAGE else code), None  # the usage of our interface is the function's business
    except Exception:
        traceback.print_exc()
        return BUG, None
    return DONE, None


def _deliver(worker: Any) -> None:
    """Deliver what was pushed before a stop; an error would leave the worker less time for it."""
    try:
        worker.close(timeout=_STOP_FLUSH_S)
    except (DistgradError, TimeoutError) as error:
        print(f"distgrad: stopped before everything was delivered: {error}", file=sys.stderr)


def _told(error: DistgradError, *, for_all: bool) -> tuple[int, Report]:
    code = exit_code(error)
    return code, Report(code, str(error), error.hint, for_all)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the function named on the command line in this process.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; by default the process's own.

    Returns
    -------
    int
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="distgrad_worker.runner", description="Internal to distgrad worker.")
    parser.add_argument("address")
    parser.add_argument("target")
    parser.add_argument("--id", required=True)
    parser.add_argument("--keys")
    parser.add_argument("--gradients")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    _end_with_supervisor()
    # NumPy and ZeroMQ: not needed by the supervisor, which imports this module too, and loaded before the user's
    # folder is on the path, where a file such as random.py would break them.
    from distgrad_worker import Worker

    connect = partial(Worker, options.address, worker_id=options.id, keys=options.keys, gradients=options.gradients)
    sys.path.insert(0, os.getcwd())
    sys.argv = [options.target]
    code, report = run(options.target, connect)
    if report is not None:
        sys.stderr.buffer.write(report.line())
        sys.stderr.flush()
    return code


def _end(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exit that runs every ``finally``, the worker's flush included."""
    raise SystemExit(128 + number)


def _end_with_supervisor() -> None:
    """Watch the pipe on our standard input, which closes when the supervisor is gone, however it went."""
    pipe = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # the function finds an empty standard input

    def watch() -> None:
        while os.read(pipe, 1):
            pass  # nobody writes to it
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(_ORPHAN_GRACE_S)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="distgrad-lifeline", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
