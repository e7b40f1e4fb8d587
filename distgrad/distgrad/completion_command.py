"""``distgrad completion SHELL``: the script that lets a shell complete commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from distgrad.command import distgrad

SHELLS = ("bash", "zsh", "fish")
# What click looks for in the environment; the script sets it when the shell asks.
_VARIABLE = "_DISTGRAD_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in bash, zsh or fish.

    bash: put  eval "$(distgrad completion bash)"  into ~/.bashrc; zsh: the same with zsh into ~/.zshrc; fish:
    distgrad completion fish > ~/.config/fish/completions/distgrad.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(distgrad, {}, "distgrad", _VARIABLE).source())
