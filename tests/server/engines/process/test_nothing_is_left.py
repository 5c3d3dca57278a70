"""Whatever way a server ends, nothing of its engine outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.engine_process.hosted import SECONDS, runs, started, wait_until

SERVER = """
import asyncio, sys
from pathlib import Path
from support.engine_process.hosted import stub_client

async def main():
    client = stub_client(Path(sys.argv[1]))
    await client.start()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running engine", "stopped engine"])
def test_a_server_that_is_killed_leaves_no_engine_behind(tmp_path: Path, stopped: bool) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        (engine,) = started(tmp_path)
        before = runs(engine)
        if stopped:
            os.kill(engine, signal.SIGSTOP)
        server.kill()
    gone = wait_until(lambda: not runs(engine), SECONDS)
    if not gone:
        os.kill(engine, signal.SIGKILL)
    assert (said, before, gone) == ("ready\n", True, True)


def test_signals_to_the_whole_group_are_the_servers_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        (engine,) = started(tmp_path)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(engine, number)
        kept = not wait_until(lambda: not runs(engine), seconds=1)
        server.kill()
    assert kept
    assert wait_until(lambda: not runs(engine), SECONDS)
