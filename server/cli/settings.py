"""Settings from the environment and from a TOML file, for every command.

A flag comes before the environment, the environment before the file, and the file before the
default. A name that no setting has is an error that names the nearest setting.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, get_args

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter
from cyclopts.config import Dict, Env
from cyclopts.exceptions import CoercionError

PREFIX = "POLYREX_"

_READS_SETTINGS_OF = {"doctor": "serve"}
"""Commands that read another command's settings."""

Source = Callable[[App, tuple[str, ...], ArgumentCollection], None]


def sources(path: Path | None, commands: Iterable[str]) -> tuple[Source, ...]:
    """The sources of settings that no flag gave, in order of precedence.

    `path` is the TOML file, if there is one. Raises CycloptsError where it cannot be read, or has
    a table that belongs to none of `commands`.
    """
    tables = [name for name in commands if name not in _READS_SETTINGS_OF]
    files = () if path is None else (_File(_read(path, tables), source=str(path)),)
    return (_Environment(PREFIX, show=False), *files, _refuse_fractions)


class _Environment(Env):
    """Variables such as POLYREX_SERVE_PORT and POLYREX_SERVE_EMBEDDED_SLOTS."""

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        commands = _owner(commands)
        if not commands:
            return
        prefix = self.prefix + "".join(f"{_variable(command)}_" for command in commands)
        known = [prefix + _variable(name) for name in _options(arguments)]
        for name in os.environ:
            if name.startswith(prefix) and name not in known:
                raise unknown("environment variable", name, known)
        super().__call__(app, commands, arguments)


class _File(Dict):
    """Tables of a TOML file, such as [serve] and [serve.embedded]."""

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        commands = _owner(commands)
        table: Any = self.config
        for command in commands:
            table = table.get(command, {})
        known = [name.removeprefix("--").replace("-", "_") for name in _options(arguments)]
        kind = f"key of [{'.'.join(commands)}]"
        for key in _keys(table) if commands else ():
            if key.replace("-", "_") not in known:
                raise unknown(kind, key, known, f"{self.source}: ")
        super().__call__(app, commands, arguments)


def _refuse_fractions(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise where a whole number is asked for and a fraction came, which would be rounded."""
    for argument in arguments:
        if int in (argument.hint, *get_args(argument.hint)) and not argument.children:
            for token in argument.tokens:
                if "." in token.value:
                    raise CoercionError(token=token, argument=argument, target_type=int)


EVERY_OPTION = Parameter(negative_iterable=(), allow_repeating=True, allow_leading_hyphen=True)
"""Of an option that is repeated the last value counts; a value may begin with a hyphen."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> CycloptsError:
    """The error about a name that is not known; it names the nearest that is."""
    hint = f"did you mean {nearest(name, known)}?"
    return CycloptsError(msg=f"{where}unknown {kind} {name}; {hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like this one."""
    return max(known, key=lambda each: SequenceMatcher(None, name.lower(), each.lower()).ratio())


def _owner(commands: tuple[str, ...]) -> tuple[str, ...]:
    """The command whose settings these are."""
    return tuple(_READS_SETTINGS_OF.get(command, command) for command in commands)


def _options(arguments: ArgumentCollection) -> Iterator[str]:
    """The names of all settings, as flags."""
    for argument in arguments:
        if argument.parse and not argument.children:
            yield from (name for name in argument.parameter.name or () if name.startswith("--"))


def _variable(name: str) -> str:
    return name.upper().lstrip("-").replace("-", "_").replace(".", "_")


def _keys(table: Mapping[str, Any]) -> Iterator[str]:
    """The dotted names of all that a table holds."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _keys(value))
        else:
            yield key


def _read(path: Path, commands: Iterable[str]) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CycloptsError(msg=f"{path}: cannot be read: {reason}") from error
    for name, table in tables.items():
        if name not in commands:
            raise unknown("table", f"[{name}]", [f"[{each}]" for each in commands], f"{path}: ")
        if not isinstance(table, dict):
            raise CycloptsError(msg=f"{path}: [{name}] must be a table, not {table!r}")
    return tables
