"""Every field of the configuration dataclasses is a flag, a variable and a TOML key."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest

from polyrex.adapters.methods.registry import METHODS, method_class
from polyrex.server.cli import serve as cli_serve
from polyrex.server.config import Launch
from polyrex.training.adapt import ADAPTATION, AdaptConfig
from polyrex.training.cli import train as cli_train
from polyrex.training.train import TrainConfig
from support.command_line import Finished, polyrex


class Command(NamedTuple):
    """A command that reads a configuration."""

    name: str
    config: type
    required: tuple[str, ...] = ()


SERVE = Command("serve", Launch)
TRAIN = Command("train", TrainConfig, ("--data", "rows", "--out", "run"))
ADAPT = Command(
    "adapt",
    AdaptConfig,
    ("--data", "rows", "--out", "run", "--task", "new", "--inventory", "inventory.safetensors"),
)


class Setting(NamedTuple):
    """A field, by its path from the configuration, and what it is called outside."""

    command: Command
    path: tuple[str, ...]
    flag: str
    value: Any

    @property
    def id(self) -> str:
        return f"{self.command.name} {'.'.join(self.path)}"


RENAMED = {
    ("server", "model"): "base",
    ("tasks_folder",): "tasks-dir",
    ("tasks",): "task",
    ("loop", "rates", "experts"): "expert-rate",
    ("loop", "rates", "gates"): "gate-rate",
    ("loop", "rates", "routing"): "routing-rate",
    ("loop", "rates", "token_routers"): "token-router-rate",
}
PREFIXED = ("registry", "embedded", "vllm")
FROM_A_FILE = ("server", "api_key_digests")  # see test_keys_come_from_the_file
CHOSEN = {"method": "trex"}


def leaves(
    config: type, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Field[Any]]]:
    hints = get_type_hints(config)
    for each in fields(config):
        if is_dataclass(hints[each.name]):
            yield from leaves(hints[each.name], (*path, each.name))
        elif (*path, each.name) != FROM_A_FILE:
            yield (*path, each.name), hints[each.name], each


def other_value(hint: Any, field: Field[Any]) -> Any:
    """A value that is not the default."""
    if field.name in CHOSEN:
        return CHOSEN[field.name]
    kinds = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    kind = kinds[0]
    if get_origin(kind) is Literal:
        return next(each for each in reversed(get_args(kind)) if each != field.default)
    if get_origin(kind) is tuple:
        return ("one", "two")
    if issubclass(kind, Enum):
        return next(each for each in reversed(kind) if each != field.default)
    if kind is bool:
        return not field.default
    if kind is int:
        return 3 if field.default in (None, MISSING) else field.default + 1
    return {float: 0.625, str: "other", Path: Path("some/where")}[kind]


def settings(command: Command) -> Iterator[Setting]:
    for path, hint, field in leaves(command.config):
        name = RENAMED.get(path, path[-1].replace("_", "-"))
        flag = f"{path[0]}.{name}" if path[0] in PREFIXED else name
        yield Setting(command, path, flag, other_value(hint, field))


SETTINGS = [each for command in (SERVE, TRAIN, ADAPT) for each in settings(command)]
Told = Callable[..., Any]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Runs a command, and returns the configuration that it was about to act on."""
    seen: list[Any] = []

    def take(config: Any, *_: Any) -> Path:
        seen.append(config)
        return Path("nowhere")

    monkeypatch.setattr(cli_serve, "_serve", take)
    monkeypatch.setattr(cli_serve, "check_exposure", lambda *_, **__: None)
    monkeypatch.setattr(cli_serve, "read_key_digests", lambda path: (str(path).encode(),))
    monkeypatch.setattr(cli_train, "run_training", take)
    monkeypatch.setattr(cli_train, "run_adaptation", take)
    for name in [each for each in os.environ if each.startswith(("POLYREX_SERVE", "POLYREX_T"))]:
        monkeypatch.delenv(name)

    def run(command: Command, *arguments: object) -> Any:
        given = [flag for flag in command.required[::2] if flag in arguments]
        required = [
            word
            for flag, value in zip(command.required[::2], command.required[1::2], strict=True)
            if flag not in given
            for word in (flag, value)
        ]
        done = polyrex(command.name, *required, *arguments)
        assert done.exit_code == 0, done.output
        return seen.pop()

    return run


def found(config: Any, setting: Setting) -> Any:
    return reduce(getattr, setting.path, config)


def as_flags(setting: Setting) -> list[object]:
    head, _, tail = setting.flag.rpartition(".")
    if setting.value is True:
        return [f"--{setting.flag}"]
    if setting.value is False:
        return [f"--{head}.no-{tail}" if head else f"--no-{tail}"]
    values = setting.value if isinstance(setting.value, tuple) else (setting.value,)
    return [word for value in values for word in (f"--{setting.flag}", value)]


def as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(setting: Setting) -> str:
    head, _, tail = setting.flag.replace("-", "_").rpartition(".")
    value = setting.value
    if isinstance(value, tuple):
        shown = str(list(value))
    else:
        number = isinstance(value, int | float)
        shown = as_text(value) if number else f'"{value}"'
    table = f"{setting.command.name}.{head}" if head else setting.command.name
    return f"[{table}]\n{tail} = {shown}\n"


def variable(setting: Setting) -> str:
    name = setting.flag.upper().replace("-", "_").replace(".", "_")
    return f"POLYREX_{setting.command.name.upper()}_{name}"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.id)
def test_every_field_is_a_flag(told: Told, setting: Setting) -> None:
    assert found(told(setting.command, *as_flags(setting)), setting) == setting.value


def without(setting: Setting) -> Command:
    """The command without the required flag, where the setting is one."""
    flags, values = setting.command.required[::2], setting.command.required[1::2]
    kept = [pair for pair in zip(flags, values, strict=True) if pair[0] != f"--{setting.flag}"]
    return setting.command._replace(required=tuple(word for pair in kept for word in pair))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.id)
def test_every_field_is_an_environment_variable(
    told: Told, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable(setting), as_text(setting.value))
    assert found(told(without(setting)), setting) == setting.value


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.id)
def test_every_field_is_a_toml_key(told: Told, setting: Setting, tmp_path: Path) -> None:
    file = tmp_path / "polyrex.toml"
    file.write_text(as_toml(setting))
    assert found(told(without(setting), "--config", file), setting) == setting.value


@cache
def help_of(command: str) -> str:
    return polyrex(command, "--help").stdout


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.id)
def test_every_field_has_help(setting: Setting) -> None:
    printed = help_of(setting.command.name)
    lines = [line.strip("│ ") for line in printed.splitlines() if line.startswith("│")]
    (at,) = (i for i, line in enumerate(lines) if f"--{setting.flag} " in f"{line} ")
    row = " ".join(lines[at : at + 3])
    words = [word for word in row.split() if not word.startswith("-") and not word.isupper()]
    assert len(words) > 3


def test_a_flag_precedes_the_environment_the_file_and_the_default(
    told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "polyrex.toml"
    file.write_text("[serve]\nport = 3\n[serve.embedded]\nslots = 30\n")
    assert told(SERVE).server.port == 8000
    monkeypatch.setenv("POLYREX_CONFIG", str(file))
    assert told(SERVE).server.port == 3
    monkeypatch.setenv("POLYREX_SERVE_PORT", "2")
    assert told(SERVE).server.port == 2
    launch = told(SERVE, "--port", 1)
    assert (launch.server.port, launch.embedded.slots) == (1, 30)


def test_keys_come_from_the_file(told: Told, tmp_path: Path) -> None:
    launch = told(SERVE, "--api-key-file", tmp_path / "keys")
    assert launch.server.api_key_digests == (str(tmp_path / "keys").encode(),)


@pytest.mark.parametrize(
    "line",
    [
        "serve --base b --inventory i --tasks-dir t --engine vllm --dtype bfloat16 --device cpu"
        " --host h --port 1 --api-key-file k --insecure --max-in-flight 1 --eager"
        " --tensor-parallel 2 --drain-seconds 0",
        "train --data d --out o --method trex --base b --task a --task b --role r --targets t"
        " --rank 1 --rank-out 1 --experts 1 --order 1 --splits 1 --form mix --granularity model"
        " --intuition 1 --encoder e --epochs 1 --steps 1 --batch-rows 1 --accumulate 1"
        " --expert-rate 1 --gate-rate 1 --routing-rate 1 --sample-routing --seed 1",
        "train --data d --out o --no-sample-routing",
        "adapt --data d --task t --inventory i --out o --mode both --rows 1 --base b --steps 1"
        " --routing-rate 1 --seed 1",
    ],
)
def test_flags_of_before_are_still_there(told: Told, line: str) -> None:
    name, *arguments = line.split()
    assert told(Command(name, Launch), *arguments)


def test_fields_that_are_not_given_keep_the_defaults_of_the_command(told: Told) -> None:
    loop = told(ADAPT, "--seed", 5).loop
    assert {**vars(loop), "rates": None} == {**vars(ADAPTATION), "seed": 5, "rates": None}
    assert vars(told(ADAPT, "--gate-rate", 0.5).loop.rates) == {
        **vars(ADAPTATION.rates),
        "gates": 0.5,
    }


@pytest.mark.parametrize("method", METHODS)
def test_learning_rates_and_experts_are_the_methods(told: Told, method: str) -> None:
    config = told(TRAIN, "--method", method, "--gate-rate", 0.5)
    assert vars(config.loop.rates) == vars(method_class(method).rates) | {"gates": 0.5}
    assert config.spec.experts == (8 if "experts" in method_class(method).uses else 1)


def refusal(done: Finished) -> str:
    assert done.exit_code == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    return line


def toml(tmp_path: Path, text: str) -> Finished:
    file = tmp_path / "polyrex.toml"
    file.write_text(text)
    return polyrex("serve", "--config", file)


def test_an_unknown_flag_is_told_the_nearest() -> None:
    line = refusal(polyrex("serve", "--embedded.slot", 3))
    assert line == "polyrex serve: unknown option --embedded.slot; did you mean --embedded.slots?"
    assert refusal(polyrex("serv")) == "polyrex: unknown command serv; did you mean serve?"
    assert refusal(polyrex("tasks", "lst")) == (
        "polyrex tasks: unknown command lst; did you mean list?"
    )


def test_an_unknown_variable_is_told_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYREX_SERVE_EMBEDDED_SLOT", "3")
    for command in ("serve", "doctor"):
        assert refusal(polyrex(command)) == (
            f"polyrex {command}: unknown environment variable POLYREX_SERVE_EMBEDDED_SLOT;"
            " did you mean POLYREX_SERVE_EMBEDDED_SLOTS?"
        )


@pytest.mark.parametrize(
    ("text", "unknown", "near"),
    [
        ("[serve]\nprt = 1", "key of [serve] prt", "port"),
        ("[serve.embedded]\nslot = 1", "key of [serve] embedded.slot", "embedded.slots"),
        ("[serve.vlm]\neager = true", "key of [serve] vlm.eager", "vllm.eager"),
        ("[serv]\nport = 1", "table [serv]", "[serve]"),
    ],
)
def test_an_unknown_toml_key_is_told_the_nearest(
    tmp_path: Path, text: str, unknown: str, near: str
) -> None:
    line = refusal(toml(tmp_path, text))
    where = tmp_path / "polyrex.toml"
    assert line == f"polyrex serve: {where}: unknown {unknown}; did you mean {near}?"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[serve]\nport = 'x'", ("[port]", '"x"', "int")),
        ("[serve]\nport = 70000", ("[port]", '"70000"', "65535")),
        ("[serve.embedded]\nslots = 1.5", ("[embedded][slots]", '"1.5"', "int")),
        ("[serve.embedded]\nslots = 0", ("[embedded][slots]", '"0"', ">= 2")),
        ("[serve]\ndtype = 'float33'", ("[dtype]", '"float33"', "bfloat16", "float32")),
        ("[serve]\nport = [1, 2]", ("[port]", "[1, 2]", "int")),
        ("serve = 3", ("[serve]", "table", "3")),
        ("[serve", ("polyrex.toml", "cannot be read")),
    ],
)
def test_a_wrong_value_names_the_key_and_what_was_expected(
    tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    line = refusal(toml(tmp_path, text))
    assert line.startswith("polyrex serve: ")
    assert all(part in line for part in (*parts, "polyrex.toml"))


def test_a_wrong_value_of_a_flag_or_variable_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(polyrex("serve", "--port", "x"))
    assert all(part in line for part in ("--port", '"x"', "int"))
    line = refusal(polyrex("serve", "--embedded.slots", "2.5"))
    assert all(part in line for part in ("--embedded.slots", '"2.5"', "int"))
    monkeypatch.setenv("POLYREX_SERVE_PORT", "y")
    line = refusal(polyrex("serve"))
    assert all(part in line for part in ("POLYREX_SERVE_PORT", '"y"', "int"))


def test_a_file_that_is_not_there_is_named() -> None:
    assert "no/such.toml" in refusal(polyrex("serve", "--config", "no/such.toml"))


def test_help_of_serve_is_grouped() -> None:
    printed = polyrex("serve", "--help").stdout
    groups = ("Model and engine", "Server", "Limits", "Embedded engine", "vLLM engine", "Settings")
    places = [printed.index(f"─ {group} ─") for group in groups]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("command", "kept_out"),
    [
        (["--help"], ("torch", "transformers", "httpx", "fastapi", "pydantic", "numpy")),
        (["tasks", "list", "--server", "http://127.0.0.1:9"], ("torch", "fastapi", "transformers")),
        (["serve", "--help"], ("torch", "transformers")),
    ],
    ids=lambda value: value[0],
)
def test_nothing_heavy_is_imported_before_it_is_needed(
    command: list[str], kept_out: tuple[str, ...]
) -> None:
    code = (
        "import sys; from polyrex.server.cli.main import main;"
        f"main({command!r}); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert "cyclopts" in loaded
    assert not loaded & set(kept_out)
