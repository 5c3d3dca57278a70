"""Servers with a fake engine, for the tests of HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from support.fake_server import FakeEngine, Serve, Served, serving
from support.fits.scripted import Play, player
from support.random_inventory import MakeRouter


@pytest.fixture
def serve(
    tmp_path: Path, random_inventory: Inventory, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Serve]:
    """Start servers: `serve(engine, max_in_flight=2)`; the keywords are fields of ServerConfig."""
    with ExitStack() as running:

        def start(engine: FakeEngine | None = None, **changes: Any) -> Served:
            engine = engine or FakeEngine()
            folder = tmp_path / "tasks"
            return running.enter_context(
                serving(folder, random_inventory, tokenizer, engine, **changes)
            )

        yield start


@pytest.fixture
def served(serve: Serve) -> Served:
    """A server with a fake engine that behaves."""
    return serve()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_router: MakeRouter) -> Play:
    """Lets a script play the worker of a fit."""
    return player(monkeypatch, tmp_path, make_router(1))
