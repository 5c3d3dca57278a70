"""What the proofs run on: a tiny base model with its inventory, and empty registries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.reliability.fork_server import ForkServer
from support.reliability.small_base import SmallBase


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is tiny: a second thread would only be waited for, and servers want the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
