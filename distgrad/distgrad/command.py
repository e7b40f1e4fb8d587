"""The command ``distgrad``: finds its sub-commands, runs one, and turns errors into lines and exit codes.

Sub-commands are entry points of the group ``distgrad.commands``, so the shared package knows neither side. Only the
one that is used is imported. Exit codes: 0 done, 1 refused by the broker, 2 wrong usage or configuration,
3 unreachable, 70 a bug, 130 interrupted.
"""

from __future__ import annotations

import ast
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click

from distgrad.errors import BrokerUnreachable, CheckpointError, ConfigError, DistgradError, KeyFileError
from distgrad.log import escape
from distgrad.version import __version__

GROUP = "distgrad.commands"

DONE, REFUSED, USAGE, UNREACHABLE, BUG, INTERRUPTED = 0, 1, 2, 3, 70, 130


class LazyGroup(click.Group):
    """A group whose commands are entry points, loaded when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands without loading any.

        Parameters
        ----------
        ctx : click.Context
            Not used.

        Returns
        -------
        list of str
            In alphabetical order.
        """
        return sorted(_found())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command.

        Parameters
        ----------
        ctx : click.Context
            Not used.
        cmd_name : str
            Its name.

        Returns
        -------
        click.Command or None
            None if there is none of this name.

        Raises
        ------
        ConfigError
            If it needs a module that is not installed.
        """
        entry = _found().get(cmd_name)
        if entry is None:
            return None
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            hint = f"in the clone of distgrad, pip install '.[{cmd_name}]' may bring it" if cmd_name == "demo" else None
            raise ConfigError(f"{cmd_name!r} needs the module {error.name!r}, which is missing", hint=hint) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"entry point {entry.value} of {GROUP} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands with their first sentences, without loading any.

        Parameters
        ----------
        ctx : click.Context
            Not used.
        formatter : click.HelpFormatter
            Receives the list.
        """
        rows = [(name, _summary(entry)) for name, entry in sorted(_found().items())]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distgrad", message="%(prog)s %(version)s")
def distgrad() -> None:
    """Apply the gradients of many machines, each exactly once, to one set of parameters."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Instead of the process's.

    Returns
    -------
    int
        The exit code.
    """
    try:
        result = distgrad.main(
            None if arguments is None else list(arguments), prog_name="distgrad", standalone_mode=False
        )
        # Here, so that a reader that went away is noticed here and not while the interpreter ends. Click ends the
        # process with the same code if it notices first.
        sys.stdout.flush()
        # With standalone_mode off, click returns the code of --help, --version and ctx.exit().
        return result if isinstance(result, int) else DONE
    except DistgradError as error:
        return _told(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        _forget_output()
        return REFUSED
    except Exception:
        traceback.print_exc()
        print("error: this is a bug in distgrad; please report the lines above", file=sys.stderr)
        return BUG


def exit_code(error: DistgradError) -> int:
    """Tell the exit code for an error that ends a command.

    Parameters
    ----------
    error : DistgradError
        The error.

    Returns
    -------
    int
        1, 2 or 3, by whose fault it is.
    """
    if isinstance(error, BrokerUnreachable):
        return UNREACHABLE
    if isinstance(error, (ConfigError, KeyFileError, CheckpointError)):
        return USAGE
    return REFUSED


def _told(error: DistgradError) -> int:
    """Print an error as a line, and its hint as another; both may quote a peer."""
    print(f"error: {escape(str(error))}", file=sys.stderr)
    if error.hint:
        print(f"hint: {escape(error.hint)}", file=sys.stderr)
    return exit_code(error)


def _forget_output() -> None:
    """Let the interpreter flush into nothing when it ends, instead of into a closed pipe."""
    with suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def _found() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _summary(entry: EntryPoint) -> str:
    """Read the first sentence of a command's docstring from its source.

    Importing six commands takes as many tenths of a second, and one that fails to import must not spoil the list.
    """
    with suppress(OSError, SyntaxError, ValueError, ImportError):
        for node in ast.parse(_source(entry.module)).body:
            if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
                return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _source(module: str) -> str:
    """Find a module's text without importing the packages around it."""
    folders: list[str] | None = None
    parts = module.split(".")
    for depth in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), folders)
        if spec is None:
            raise ImportError(module)
        folders = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    if spec is None or spec.origin is None:
        raise ImportError(module)
    return Path(spec.origin).read_text(encoding="utf-8")
