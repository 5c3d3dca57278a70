"""What counts as progress of an engine, in turns and not by a clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from polyrex.server.engines.process.progress import Progress, any_stopped, processes_of
from support.engine_process.hosted import wait_until


def still_after(turns: list[tuple[int | None, bool]]) -> int:
    """The turns in which it stood still at the end; each says what was heard, and if it is busy."""
    progress = Progress()
    for mark, busy in turns:
        if mark is not None:
            progress.hear(mark)
        progress.turn(busy=busy)
    return progress.still


@pytest.mark.parametrize(
    ("turns", "still"),
    [
        ([(1, True), (2, True), (3, True)], 0),
        ([(1, True), (1, True), (1, True)], 2),
        ([(1, False), (1, False), (1, False)], 0),
        ([(1, False), (None, False), (None, False)], 2),
        ([(1, True), (None, True), (None, True), (2, True)], 0),
        ([(1, False), (1, False), (1, True)], 1),
        ([(None, False), (None, False), (None, True)], 0),
    ],
    ids=[
        "moves",
        "busy and on the spot",
        "idle",
        "silent",
        "silent and back",
        "a request that nothing happened for",
        "has not said anything yet",
    ],
)
def test_a_turn_without_progress_counts(turns: list[tuple[int | None, bool]], still: int) -> None:
    assert still_after(turns) == still


def test_a_pause_of_the_server_itself_is_no_pause_of_the_engine() -> None:
    progress = Progress()
    progress.hear(1)
    progress.turn(busy=True)
    # However long the server was stopped here, it has had no turn, and hears the engine at once.
    progress.hear(2)
    progress.turn(busy=True)
    assert progress.still == 0


def test_a_stopped_process_is_seen_among_those_of_its_session() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            found = processes_of(session=process.pid)
            before = any_stopped(found)
            os.kill(process.pid, signal.SIGSTOP)
            stopped = wait_until(lambda: any_stopped(found))
            os.kill(process.pid, signal.SIGCONT)
            again = wait_until(lambda: not any_stopped(found))
        finally:
            process.kill()
    assert found == (process.pid,)
    assert (before, stopped, again) == (False, True, True)
    assert not any_stopped(found)  # it has ended
