"""The engine's process is killed or stopped, and servers are ended, amid streams."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from reliability.proofs.stress.engine_dies import (
    Strike,
    by_prompt,
    by_signal,
    engine_dies,
)
from reliability.proofs.stress.shutdown import shutdown
from support.reliability.fork_server import ForkServer
from support.reliability.stress.metrics import Scrape
from support.reliability.stress.planted import FALSE_ENDS
from support.reliability.stress.stub_engine import CRASH, HANG, SLOW, expected_text

GENEROUS = 20.0
"""Seconds; how soon it really is, is shown at full length, on a machine without neighbours."""


@pytest.mark.parametrize(
    ("engine", "strike"),
    [
        ("hosted", by_signal(signal.SIGKILL)),
        ("stub", by_signal(signal.SIGSTOP)),
        ("stub", by_prompt(HANG)),
        ("stub", by_prompt(CRASH)),
    ],
    ids=["killed", "stopped", "hangs", "crashes"],
)
def test_a_dead_engine_is_told_of_and_comes_back(
    forks: ForkServer, tmp_path: Path, engine: str, strike: Strike
) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    result = engine_dies(forks, url, strike, engine=engine, times=1, within=GENEROUS)
    assert result.missed == [], result.remarks


def test_a_slow_engine_is_left_alone(forks: ForkServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    stub = {"step_seconds": 0.02}
    body = {"prompt": [SLOW], "max_tokens": 20, "ignore_eos": True}  # four seconds
    with forks.serving(url, engine="stub", stub=stub) as server, server.client() as client:
        answer = client.post("/v1/completions", body)
        restarts = Scrape.of(client).total("polyrex_engine_restarts_total")
    assert answer.json()["choices"][0]["text"] == expected_text((SLOW,), "", 20)
    assert restarts == 0


def test_streams_that_end_as_if_whole_are_found(forks: ForkServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    strike = by_signal(signal.SIGKILL)
    result = engine_dies(forks, url, strike, engine="stub", times=1, defects=[FALSE_ENDS])
    assert result.finds(["streams that ended as if whole"])


def test_what_was_admitted_ends_well_when_the_server_ends(
    forks: ForkServer, tmp_path: Path
) -> None:
    result = shutdown(forks, tmp_path, cycles=2, late=GENEROUS)
    assert result.missed == [], result.remarks


def test_answers_that_are_cut_off_are_found(forks: ForkServer, tmp_path: Path) -> None:
    result = shutdown(forks, tmp_path, cycles=1, number=signal.SIGKILL)
    assert result.finds(["answers that were cut off", "servers that did not end, or not with 0"])
