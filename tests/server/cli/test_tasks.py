"""`polyrex tasks`, against a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polyrex.server.http.auth import read_key_digests
from support.command_line import polyrex
from support.fake_server import Serve, Served
from support.random_inventory import MakeRouter


@pytest.fixture
def router(make_router: MakeRouter, tmp_path: Path) -> Path:
    file = tmp_path / "colour.safetensors"
    file.write_bytes(make_router(1))
    return file


def ask(served: Served, *arguments: object) -> dict[str, Any]:
    done = polyrex("tasks", *arguments, "--server", served.url)
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_task_is_added_shown_replaced_listed_and_dropped(served: Served, router: Path) -> None:
    assert ask(served, "add", router)["name"] == "colour"
    assert ask(served, "add", router, "--name", "shade")["name"] == "shade"
    assert ask(served, "add", router, "--name", "shade", "--replace")["name"] == "shade"
    assert ask(served, "show", "shade")["name"] == "shade"
    listed = polyrex("tasks", "list", "--server", served.url).stdout
    assert [name in listed for name in ("colour", "shade")] == [True, True]
    ask(served, "drop", "shade")
    gone = polyrex("tasks", "show", "shade", "--server", served.url)
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert gone.stderr.startswith("polyrex tasks: ")
    assert "shade" in gone.stderr


def test_the_connection_may_stand_before_or_after_the_subcommand(
    serve: Serve, tmp_path: Path, router: Path
) -> None:
    (tmp_path / "key").write_text("secret\n")
    served = serve(api_key_digests=read_key_digests(tmp_path / "key"))
    connection = ("--server", served.url, "--api-key-file", tmp_path / "key")
    assert polyrex("tasks", "add", router, *connection).exit_code == 0
    before = polyrex("tasks", *connection, "show", "colour")
    after = polyrex("tasks", "show", "colour", *connection)
    split = polyrex("tasks", *connection[:2], "show", *connection[2:], "colour")
    assert before.exit_code == 0, before.output
    assert before == after == split
    assert "API key" in polyrex("tasks", *connection[:2], "show", "colour").stderr


def test_the_connection_comes_from_the_environment_or_a_file(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "polyrex.toml"
    file.write_text(f'[tasks]\nserver = "{served.url}"\n')
    assert polyrex("tasks", "list", "--config", file).exit_code == 0
    monkeypatch.setenv("POLYREX_TASKS_SERVER", "http://127.0.0.1:9")
    assert polyrex("tasks", "list", "--config", file).exit_code == 1
    monkeypatch.setenv("POLYREX_TASKS_SERVER", served.url)
    assert polyrex("tasks", "list").exit_code == 0


def test_a_server_that_is_not_there_is_named() -> None:
    done = polyrex("tasks", "list", "--server", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert done.stderr.startswith("polyrex tasks: http://127.0.0.1:9: ")


def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name in ("no-such-file", "empty"):
        done = polyrex("tasks", "list", "--api-key-file", tmp_path / name)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"polyrex tasks: {tmp_path / name}: ")


def test_add_names_a_file_that_is_not_there() -> None:
    done = polyrex("tasks", "add", "no-such.safetensors")
    assert done.exit_code == 2
    assert "no-such.safetensors" in done.stderr
