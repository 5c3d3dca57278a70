"""The command line as it is put together, and what it decides before anything is loaded."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from polyrex.server.cli.main import COMMANDS
from polyrex.server.config import default_tasks_folder
from polyrex.server.errors import StartError
from polyrex.server.launch.loading import shipped_inventory
from polyrex.server.launch.process import bind, check_exposure
from support.command_line import polyrex


def test_help_names_every_command() -> None:
    done = polyrex("--help")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = polyrex(name, "--help")
    assert done.exit_code == 0
    assert f"Usage: polyrex {name}" in done.stdout


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, keys=False, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_other_addresses_need_keys_or_a_word(host: str) -> None:
    check_exposure(host, keys=True, insecure=False)
    check_exposure(host, keys=False, insecure=True)
    with pytest.raises(StartError, match="--api-key-file"):
        check_exposure(host, keys=False, insecure=False)


async def connection_option(listener: socket.socket, option: int) -> int:
    """What a connection to the listener has for a TCP option, on the server's side."""
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, option))
        writer.close()

    async with await asyncio.start_server(accepted, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        option_set = await found
        writer.close()
        await writer.wait_closed()
    return option_set


def test_answers_do_not_wait_for_acknowledgements() -> None:
    assert asyncio.run(connection_option(bind("127.0.0.1", 0), socket.TCP_NODELAY))


def test_tasks_are_kept_in_the_users_state_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_tasks_folder() == tmp_path / "polyrex" / "tasks"


def test_a_base_without_a_shipped_inventory_is_told_so() -> None:
    with pytest.raises(StartError, match="--inventory"):
        shipped_inventory("some/other-model")


def test_of_a_repeated_option_the_last_value_counts() -> None:
    done = polyrex("params", "--method", "lora", "--rank", "1", "--rank", "16")
    assert done.exit_code == 0, done.output
    assert done.stdout == polyrex("params", "--method", "lora").stdout


def test_a_value_may_begin_with_a_hyphen(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "a", "answer": "b"}')
    question = ("fit", "--task", "t", "--rows", rows, "--instruction", "- is it?")
    done = polyrex(*question, "--server", "http://127.0.0.1:9")
    assert (done.exit_code, "http://127.0.0.1:9" in done.stderr) == (1, True)


@pytest.mark.parametrize("words", [(), ("tasks",)], ids=["polyrex", "tasks"])
def test_a_command_line_that_asks_for_nothing_prints_help_and_fails(words: tuple[str, ...]) -> None:
    done = polyrex(*words)
    assert done.exit_code == 2
    assert done.stdout.startswith("Usage: ")
    assert polyrex(*words, "--help").exit_code == 0


def test_adapting_takes_a_step(tmp_path: Path) -> None:
    files = ("--data", tmp_path, "--inventory", tmp_path, "--out", tmp_path)
    done = polyrex("adapt", "--task", "t", "--steps", "0", *files)
    assert (done.exit_code, "at least 1 step, got 0" in done.stderr) == (2, True)
