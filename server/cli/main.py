"""The command line, put together: which command lies where.

A command is a function, or a Typer app, of the command's name. Its module is imported when the
command is asked for, so that `polyrex tasks` does not wait for torch. This table is also the one
place that names both the server and training, which know nothing of each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module

import typer

COMMANDS = {
    "serve": "polyrex.server.cli.serve",
    "tasks": "polyrex.server.cli.tasks",
    "fit": "polyrex.server.cli.fit",
    "train": "polyrex.training.cli.train",
    "adapt": "polyrex.training.cli.train",
    "evaluate": "polyrex.training.cli.train",
    "export": "polyrex.training.cli.exchange",
    "import-poly": "polyrex.training.cli.exchange",
    "compress": "polyrex.training.cli.exchange",
    "params": "polyrex.server.cli.params",
    "plan": "polyrex.server.cli.plan",
}


def command_line(names: Iterable[str]) -> typer.Typer:
    """The program with the commands of these names."""
    program = typer.Typer(no_args_is_help=True, add_completion=False)

    @program.callback()
    def polyrex() -> None:
        """Serve thousands of tasks from one frozen language model."""

    for name in names:
        command = getattr(import_module(COMMANDS[name]), name.replace("-", "_"))
        if isinstance(command, typer.Typer):
            program.add_typer(command, name=name)
        else:
            program.command(name)(command)
    return program


def main() -> None:
    """The console script."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    command_line([asked] if asked in COMMANDS else COMMANDS)()
