"""Command lines in deployment files: the command line itself says whether it would take them."""

import functools
from collections.abc import Sequence

import click
import typer.main

from tracker.cli.app import app


@functools.cache
def command_line() -> click.Command:
    """All of it; a moment passes until it is built."""
    command: click.Command = typer.main.get_command(app)
    return command


def assert_taken(arguments: Sequence[str]) -> None:
    """Parse them as `tracker ARGUMENTS…` would, without doing anything."""
    command = command_line()
    rest = list(arguments)
    names = ["tracker"]
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"there is no `{' '.join([*names, rest[0]])}`"
        command = command.commands[rest[0]]
        names.append(rest.pop(0))
    command.make_context(" ".join(names), rest)
