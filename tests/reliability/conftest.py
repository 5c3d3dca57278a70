"""What the proofs run on: a tiny base model with its inventory, and empty registries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.reliability.fork_server import ForkServer
from support.reliability.small_base import SmallBase


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> SmallBase:
    """The tiny model, made once."""
    folder: Path = tmp_path_factory.mktemp("small-base")
    return SmallBase.write(folder)


@pytest.fixture(scope="session")
def forks(small_base: SmallBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts servers."""
    with ForkServer(small_base, tmp_path_factory.mktemp("servers")) as starter:
        yield starter
