"""Fixtures of all tests: the real base model, a random inventory for it, random routers,
databases."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_tokenizer, resolve_base
from polyrex.adapters.spec import AdapterSpec
from support.random_inventory import MakeRouter, make_inventory, random_router
from support.shipped_server import shipped_server
from support.storage.postgres import NOT_INSTALLED, Cluster, find_binaries, running_cluster

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="the folder of golden vectors that the adapters are checked against",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of the real base model, which `make check` leaves out."""
    if "base_path" in getattr(item, "fixturenames", ()):
        item.add_marker("real_model")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what did not run for want of PostgreSQL, gcc, Ray, or whatever else is not installed."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.items():
        if "is not installed" in reason:  # of a file that is skipped, its tests are not known
            line = f"{count} tests, or files of tests, did not run: {reason}"
            terminalreporter.write_line(line, red=True)


@pytest.fixture(scope="session")
def base_path() -> str:
    """The folder of SmolLM2-135M-Instruct, converted on first use."""
    return resolve_base(DEFAULT_BASE)


@pytest.fixture(scope="session")
def tokenizer(base_path: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer."""
    return load_tokenizer(base_path)


@pytest.fixture(scope="session")
def random_inventory(base_path: str, tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    """A TensorPoly-I inventory on every projection of the base model, with random experts and with
    gates so far open that tasks give different texts."""
    path: Path = tmp_path_factory.mktemp("inventory") / "inventory.safetensors"
    spec = AdapterSpec("tensorpoly-1", rank=16, experts=8)
    return make_inventory(path, base_path, spec, spread=0.2)


@pytest.fixture(scope="session")
def make_router(random_inventory: Inventory) -> MakeRouter:
    """Makes the file of a random router for the random inventory: `make_router(seed)`."""
    return partial(random_router, random_inventory)


@pytest.fixture(scope="session")
def shipped_server_url(base_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server process with the real base model and the shipped inventory."""
    with shipped_server(tmp_path_factory.mktemp("shipped-server")) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Cluster]:
    """A PostgreSQL server that all tests share; each makes its own database."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(NOT_INSTALLED)
    with running_cluster(binaries) as cluster:
        yield cluster


@pytest.fixture
def postgres_url(postgres_cluster: Cluster) -> str:
    """The address of a new, empty PostgreSQL database."""
    return postgres_cluster.create_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a new, empty database: a test runs on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url
