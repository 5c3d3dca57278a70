"""The command line: which command lies where, and how its errors reach the user.

A command's module is imported when the command is asked for, so that `polyrex tasks` does not wait
for torch. This table is also the one place that names both the server and training, which know
nothing of each other.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.exceptions import UnknownCommandError, UnknownOptionError

from polyrex.adapters.errors import PolyrexError
from polyrex.kernels.cpu.threads import thread_variables

from .settings import EVERY_OPTION, PREFIX, nearest, sources, unknown


class Command(NamedTuple):
    """Where a command lies, and its line in `polyrex --help`."""

    path: str
    help: str
    failure: int = 1
    """The exit status after an error."""


COMMANDS = {
    "serve": Command("polyrex.server.cli.serve:serve", "Serve an inventory and its tasks."),
    "doctor": Command("polyrex.server.cli.doctor:doctor", "Check the installation."),
    "tasks": Command(
        "polyrex.server.cli.tasks:command",
        "List, show, add, drop and change tasks of a running server.",
    ),
    "tenants": Command(
        "polyrex.server.cli.remote.tenants:command",
        "Create, list and change the tenants of a running server.",
    ),
    "keys": Command(
        "polyrex.server.cli.remote.keys:command",
        "Create, list, rotate and revoke API keys of a running server.",
    ),
    "registry": Command(
        "polyrex.server.cli.registry:app", "Migrate, check, back up and copy the registry of tasks."
    ),
    "fit": Command(
        "polyrex.server.cli.fit:fit", "Fit a task to a few rows on a running server.", failure=2
    ),
    "train": Command(
        "polyrex.training.cli.train:train", "Train an inventory and its routers.", failure=2
    ),
    "adapt": Command(
        "polyrex.training.cli.train:adapt", "Adapt a new task from a few rows.", failure=2
    ),
    "evaluate": Command(
        "polyrex.training.cli.train:evaluate", "Score tasks and the base model.", failure=2
    ),
    "export": Command(
        "polyrex.training.cli.exchange:export", "Write a task's adapter as a LoRA.", failure=2
    ),
    "import-poly": Command(
        "polyrex.training.cli.exchange:import_poly", "Convert a PEFT poly checkpoint.", failure=2
    ),
    "compress": Command(
        "polyrex.training.cli.exchange:compress", "Compress many LoRAs to shared bases.", failure=2
    ),
    "params": Command(
        "polyrex.server.cli.params:params", "Count the parameters of a method.", failure=2
    ),
    "plan": Command(
        "polyrex.server.cli.plan:plan", "Predict the memory and speed of a deployment.", failure=2
    ),
}

GROUPS = ("tasks", "tenants", "keys", "registry")
"""Commands that have subcommands, and print their help where none is asked for."""

_SETTINGS = (
    "A setting comes from its flag, else from its environment variable"
    f" ({PREFIX}SERVE_PORT for --port of serve, {PREFIX}SERVE_EMBEDDED_SLOTS for"
    " --embedded.slots), else from the file of --config (port = 8000 in the table [serve],"
    " slots = 1024 in [serve.embedded]), else from its default."
)


def program(asked: str | None = None) -> App:
    """The command line as one program, whose commands are not imported yet.

    `asked` is the command that will run: its help is its own, the others' is one line.
    """
    root = App(
        name="polyrex",
        help="Serve thousands of tasks from one frozen language model.",
        help_epilogue=_SETTINGS,
        version=_version,
        help_format="markdown" if asked else "plaintext",  # Markdown takes long to import
        default_parameter=EVERY_OPTION,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    for name, (path, text, _) in COMMANDS.items():
        root.command(path, name=name, help=None if name == asked else text)

    @root.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            Path | None,
            Parameter(
                help="TOML file of settings, with a table for each command.",
                env_var=f"{PREFIX}CONFIG",
                group=Group("Settings", sort_key=100),
            ),
        ] = None,
    ) -> object:
        root.config = sources(config, COMMANDS)
        result: object = root(tokens)
        return result

    return root.meta


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; an error is one line on stderr."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = next((each for each in given if each in COMMANDS), None)
    os.environ.update(thread_variables(os.environ))  # no command has imported torch yet
    try:
        status = program(name)(given)
    except CycloptsError as error:
        print(f"{_title(name)}: {_explain(error)}", file=sys.stderr)
        return 2
    except PolyrexError as error:
        print(f"{_title(name)}: {error}", file=sys.stderr)
        return COMMANDS[name].failure if name else 1
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if not given or given in [[group] for group in GROUPS]:  # only help was printed
        return 2
    return status if isinstance(status, int) else 0


def _version() -> str:
    from importlib.metadata import version  # takes long to import

    return version("polyrex")


def _title(name: str | None) -> str:
    return f"polyrex {name}" if name else "polyrex"


def _explain(error: CycloptsError) -> str:
    """One line on what is wrong with the command line."""
    if isinstance(error, UnknownCommandError) and error.unused_tokens:
        return str(unknown("command", error.unused_tokens[0], _commands(error.app)))
    if isinstance(error, UnknownOptionError):
        names = [name for each in error.argument_collection for name in each.names]
        flag = error.token.keyword or error.token.value
        options = [name for name in names if name.startswith("--")]
        return f"unknown option {flag}; did you mean {nearest(flag, options)}?"
    return " ".join(str(error).split())


def _commands(app: App | None) -> list[str]:
    return [name for name in app or COMMANDS if not name.startswith("-")]
