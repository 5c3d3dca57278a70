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
